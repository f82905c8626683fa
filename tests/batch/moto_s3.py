"""moto's S3 server in a thread, with faults before it: errors, answers that are lost, late or cut off."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

Fault = Literal["error", "lost", "slow", "short"]
SLOW_SECONDS = 0.2
BUCKET = "bucket"


@dataclass
class FaultyS3:
    """A WSGI application before moto's.

    Args:
        port: Where it listens.
        choose: Told method and path of each request; the fault that it meets, if any. `error` is a 500 before anything
            is done, `lost` one after it was done, `slow` an answer that comes late, `short` one that is cut off.
        met: Each fault so far, with the request's method and path.
    """

    port: int = 0
    choose: Callable[[str, str], Fault | None] = lambda *_: None
    met: list[tuple[Fault, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.choose(method, path)
        if fault is not None:
            self.met.append((fault, method, path))
        if fault == "error":
            return self._failed(start_response)
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        chunks, status, headers = run_wsgi_app(self._moto, environ, buffered=True)
        body = b"".join(chunks)
        if fault == "lost":
            return self._failed(start_response)
        start_response(status, list(headers))
        return [body[: len(body) // 2] if fault == "short" else body]

    @property
    def options(self) -> dict[str, Any]:
        """Storage options to reach it with; whoever asks gives up after one retry of botocore's."""
        return {
            "key": "test",
            "secret": "test",
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{self.port}", "region_name": "us-east-1"},
            "config_kwargs": {"retries": {"max_attempts": 1}},
        }

    @staticmethod
    def _failed(start_response: Any) -> list[bytes]:
        body = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
        start_response("500 Internal Server Error", [("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """A server with an empty bucket `bucket`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    application = FaultyS3()
    server = make_server("127.0.0.1", 0, application, threaded=True)
    application.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{application.port}"
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 - moto takes any
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield application
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
