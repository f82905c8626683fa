"""Copies to this machine."""

import hashlib
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


def copy_hashed(source: BinaryIO, path: str) -> str:
    """Write what `source` holds to a new local file, which is gone again after an error.

    Returns:
        The SHA-256 of the bytes.
    """
    digest, target = hashlib.sha256(), Path(path)
    try:
        with target.open("xb") as copy:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
    except FileExistsError:
        raise
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return digest.hexdigest()
