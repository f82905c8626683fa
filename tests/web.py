"""A web server of this machine, while a test asks it."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class QuietFiles(SimpleHTTPRequestHandler):
    """The files of a folder, and nothing on standard error."""

    def log_message(self, *_: Any) -> None:
        """Nobody wants to know."""


@contextmanager
def listening(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server in a thread; its address, such as `http://127.0.0.1:1234`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serving_files(folder: Path) -> AbstractContextManager[str]:
    """A server of a folder's files; its address."""
    return listening(functools.partial(QuietFiles, directory=str(folder)))
