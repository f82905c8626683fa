"""SHA-256 of what passes by, computed beside the work on it: hashing leaves Python's lock to other threads."""

import hashlib
import queue
import threading
from typing import BinaryIO

_INLINE_BYTES = 1 << 20  # what is shorter is hashed at once: a thread would cost more than it saves
_WAITING = 16
CHUNK_BYTES = 1 << 20


class BackgroundHash:
    """A SHA-256 that a thread of its own computes, once there is much to hash."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._count = 0
        self._queue: queue.Queue[bytes | None] | None = None
        self._thread: threading.Thread | None = None

    def update(self, data: bytes) -> None:
        """Add bytes; they must not change afterwards."""
        self._count += len(data)
        if self._queue is None and self._count <= _INLINE_BYTES:
            self._hash.update(data)
            return
        if self._queue is None:
            self._queue = queue.Queue(_WAITING)
            self._thread = threading.Thread(target=self._work, args=(self._queue,), daemon=True)
            self._thread.start()
        self._queue.put(data)

    def hexdigest(self) -> str:
        """The digest of all bytes; nothing can be added afterwards."""
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread, if there is one; also where the digest is no longer wanted."""
        if self._queue is not None and self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._queue = self._thread = None

    def _work(self, waiting: "queue.Queue[bytes | None]") -> None:
        while (data := waiting.get()) is not None:
            self._hash.update(data)


def hash_with_tail(file: BinaryIO, skip: int) -> tuple[str, str]:
    """The SHA-256 of a file, and that of what follows its first bytes, side by side.

    Args:
        file: At its beginning.
        skip: So many bytes.
    """
    whole, tail = hashlib.sha256(), BackgroundHash()
    head = file.read(skip)
    whole.update(head)
    try:
        while data := file.read(CHUNK_BYTES):
            tail.update(data)
            whole.update(data)
        return whole.hexdigest(), tail.hexdigest()
    finally:
        tail.close()
