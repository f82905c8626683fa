"""`Expert.load` of packages behind URLs: a web server, a model hub and Google Cloud Storage, each on this machine."""

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest

from pipeline import Expert, demo
from pipeline.errors import LoadError, PackageNotFoundError
from tests.gcs import gcs_server
from tests.web import listening, serving_files

PACKAGE = demo.package("sql")
NAME = "expert-sql.expert"
QUESTION = "How many users are there per city?"
SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "cache"))


def answer(url: str, **options: Any) -> str:
    with Expert.load(url, base_model=demo.BASE_MODEL, device="cpu", **options) as expert:
        return expert.generate(QUESTION, schema=SCHEMA).text


class Failing(BaseHTTPRequestHandler):
    """A web server whose paths are the statuses of its answers."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nobody wants to know."""


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub's API as `HfFileSystem` uses for one file of one repository, `org/experts`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = PACKAGE.read_bytes()
        if self.path.startswith("/api/models/org/experts/tree/main"):
            self._tell([{"type": "file", "path": NAME, "size": len(data), "oid": "0" * 40}])
        elif self.path == "/api/models/org/experts":
            self._tell({"id": "org/experts", "sha": "a" * 40, "siblings": [], "private": False, "tags": []})
        elif self.path.endswith(f"/org/experts/resolve/main/{NAME}"):
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self._send(206, data[int(first) : int(last) + 1 if last else None])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tell(self, told: Any) -> None:
        self._send(200, json.dumps(told).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nobody wants to know."""


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / NAME).write_bytes(PACKAGE.read_bytes())
    with serving_files(tmp_path / "files") as address:
        assert answer(f"{address}/{NAME}") == "SELECT city, COUNT(*) FROM users GROUP BY city"
        with pytest.raises(PackageNotFoundError, match=r"nothing is at http://127\.0\.0\.1:\d+/other\.expert"):
            answer(f"{address}/other.expert")


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (404, PackageNotFoundError, "nothing is at"),
        (403, LoadError, "may not be read"),
        (503, LoadError, "cannot be fetched: ClientResponseError: 503"),
    ],
)
def test_what_a_web_server_says_instead(status: int, kind: type[LoadError], says: str) -> None:
    with listening(Failing) as address, pytest.raises(kind, match=says) as caught:
        answer(f"{address}/{status}.expert")
    assert type(caught.value) is kind


def test_a_model_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(Hub) as address:
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the tests are; this hub is here
        options = {"storage_options": {"endpoint": address, "token": False, "skip_instance_cache": True}}
        assert answer(f"hf://org/experts/{NAME}", **options) == "SELECT city, COUNT(*) FROM users GROUP BY city"
        for missing in ("hf://org/experts/other.expert", f"hf://org/nothing/{NAME}"):
            with pytest.raises(PackageNotFoundError, match=f"nothing is at {missing}"):
                answer(missing, **options)


def test_google_cloud_storage() -> None:
    with gcs_server() as options:
        fsspec.filesystem("gs", **options).pipe_file(f"bucket/{NAME}", PACKAGE.read_bytes())
        assert (
            answer(f"gs://bucket/{NAME}", storage_options=options) == "SELECT city, COUNT(*) FROM users GROUP BY city"
        )
        with pytest.raises(PackageNotFoundError, match=r"nothing is at gs://bucket/other\.expert"):
            answer("gs://bucket/other.expert", storage_options=options)


def test_memory() -> None:
    fsspec.filesystem("memory").pipe_file(f"/{NAME}", PACKAGE.read_bytes())
    assert answer(f"memory://{NAME}") == "SELECT city, COUNT(*) FROM users GROUP BY city"


def test_a_host_that_does_not_answer() -> None:
    with pytest.raises(LoadError, match=r"http://127\.0\.0\.1:9/x\.expert cannot be fetched") as caught:
        answer("http://127.0.0.1:9/x.expert")
    assert "network" in caught.value.hint
