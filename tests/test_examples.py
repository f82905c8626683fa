"""The examples do what they say. That of a batch is in `e2e`, as it starts Ray; that of Gradio in `integrations`."""

import asyncio
import importlib.util
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from pipeline import demo
from pipeline.engine.runtime import open_experts
from pipeline.package import open_package
from pipeline.serve.api import make_api
from pipeline.serve.keys import KeyRing, key_hash
from pipeline.serve.local import local_backend
from tests.documents import of_language
from tests.serve.scripted import serving

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
KEY = "a-key-of-the-tests"
QUESTION = "How many users are there per city?"
ANSWER = "SELECT city, COUNT(*) FROM users GROUP BY city"


def example(name: str) -> ModuleType:
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_listed(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    assert f"[{path.name}]({path.name})" in (path.parent / "README.md").read_text()


def test_the_command_line_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["command_line.py", QUESTION])
    assert example("command_line").main() == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    monkeypatch.setattr(sys, "argv", ["command_line.py", "users " * 3000])
    assert example("command_line").main() == 1
    assert "the prompt has" in capsys.readouterr().err


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    experts = open_experts({"expert-sql": open_package(demo.package("sql"))}, demo.BASE_MODEL, device="cpu")
    with local_backend(experts) as backend:
        keys = KeyRing({"tests": key_hash(KEY)})
        with serving(make_api(backend, backend.cards, keys=keys)) as address:
            yield address


def test_the_rest_client(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    assert example("rest_client").ask(service, QUESTION) == ANSWER


@pytest.mark.parametrize("name", ["batch_script", "rest_client"])
def test_a_script_called_without_its_arguments_says_how(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in EXAMPLES if path.stem == name)
    monkeypatch.setattr(sys, "argv", [path.name])
    with pytest.raises(SystemExit, match=f"python examples/{path.name}"):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(("name", "extra"), [("gradio_page", "gradio"), ("langchain_chain", "langchain")])
def test_an_example_says_what_to_install(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = {"gradio": "gradio", "langchain": "langchain_core"}[extra]
    for module in [*sys.modules, package]:
        if module.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, f"pipeline.integrations.{extra}", raising=False)
    path = next(path for path in EXAMPLES if path.stem == name)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 2
    assert f'pip install "expert-pipeline[{extra}]"' in capsys.readouterr().err


def test_the_rest_client_says_that_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in EXAMPLES if path.stem == "rest_client")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(sys, "argv", [path.name, address, QUESTION])
        with pytest.raises(SystemExit, match=f"nothing answers at {address}"):
            runpy.run_path(str(path), run_name="__main__")


def test_the_fastapi_service() -> None:
    async def ask() -> list[httpx.Response]:
        app = example("fastapi_service").app
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
        async with app.router.lifespan_context(app), client:
            tables = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"
            bodies = [{"question": QUESTION, "tables": tables}, {"question": "users " * 3000, "tables": tables}]
            return list(await asyncio.gather(*(client.post("/sql", json=body) for body in bodies)))

    right, wrong = asyncio.run(ask())
    assert right.json() == {"sql": ANSWER}
    assert wrong.status_code == 400
    assert "tokens" in wrong.json()["detail"]


def test_the_guides_fastapi_service() -> None:
    (block,) = (block for block in of_language("python") if "FastAPI()" in block.code)
    made: dict[str, Any] = {}
    exec(compile(block.code, block.page, "exec"), made)  # noqa: S102  # our own

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(made["app"]), base_url="http://service") as client:
            schema = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"
            return await client.get("/sql", params={"question": QUESTION, "schema": schema})

    with made["expert"]:
        assert asyncio.run(ask()).json() == ANSWER


def test_the_langchain_chain(capsys: pytest.CaptureFixture[str]) -> None:
    example("langchain_chain").main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == ANSWER
    assert second == ANSWER.replace("city", "age")
