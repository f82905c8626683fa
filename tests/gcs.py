"""Google Cloud Storage's API in a thread: an emulator's, with the one condition on writes that it does not know."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from tests.web import listening

BUCKET = "bucket"


class TakenError(Exception):
    """There is an object of that name."""


class ConditionalStorage(Storage):  # type: ignore[misc]  # it has no types
    """Storage that refuses to replace an object while `is_create` is set."""

    is_create = False

    def create_file(self, bucket_name: str, file_name: str, *args: Any, **kwargs: Any) -> Any:
        """Create one, or replace it where that is allowed."""
        taken = file_name in self.objects.get(bucket_name, {})
        if self.is_create and taken:
            raise TakenError
        return super().create_file(bucket_name, file_name, *args, **kwargs)


class ConditionalHandler(RequestHandler):  # type: ignore[misc]  # likewise
    """The emulator's handler; `ifGenerationMatch=0` means that the object must be new, as Google documents it."""

    guard: ClassVar[threading.Lock] = threading.Lock()
    loses: ClassVar[list[int]] = []  # each answers one write with its status, after it was done

    def do_GET(self) -> None:  # noqa: N802  # the handler's own name
        with self.guard:
            super().do_GET()

    def do_DELETE(self) -> None:  # noqa: N802  # the handler's own name
        if self.path.startswith("/upload/"):  # an upload is given up: the emulator knows of none, and Google answers so
            self._answer(499, "Client Closed Request")
            return
        with self.guard:
            super().do_DELETE()

    def do_POST(self) -> None:  # noqa: N802  # the handler's own name
        self._written(super().do_POST)

    def do_PUT(self) -> None:  # noqa: N802  # the handler's own name
        self._written(super().do_PUT)

    def _written(self, write: Any) -> None:
        query = parse_qs(urlsplit(self.path).query)
        with self.guard:
            self.storage.is_create = query.get("ifGenerationMatch") == ["0"]
            try:
                if self.loses:
                    answer, self.wfile = self.wfile, BytesIO()
                    write()
                    self.wfile = answer
                    self._answer(self.loses.pop(), "Lost")
                else:
                    write()
            except TakenError:
                self._answer(412, "Precondition Failed")

    def _answer(self, status: int, reason: str) -> None:
        self.send_response(status, reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nobody wants to know."""


@contextmanager
def gcs_server() -> Iterator[dict[str, Any]]:
    """A server with an empty bucket `bucket`; the storage options that lead to it."""
    storage = ConditionalStorage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    with listening(partial(ConditionalHandler, storage)) as address:
        yield {"endpoint_url": address, "token": "anon"}
