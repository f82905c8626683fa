"""HTTP whose heads are bounded: by itself uvicorn reads a request's line and headers at any length, for any time."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30.0


class BoundedHeads(HttpToolsProtocol):
    """A connection that is closed when a head is too large, or not there in time; the arguments are uvicorn's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_bytes = 0  # of a head that is not complete
        self._timer: asyncio.TimerHandle | None = None  # while one is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless it is too much."""
        super().data_received(data)
        if self._timer is not None:
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """A head begins; the first one is waited for already."""
        super().on_message_begin()
        if self._timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._have_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._num_bytes = 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self._refuse, b"408 Request Timeout")

    def _have_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _refuse(self, status: bytes) -> None:
        self._have_head()
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
