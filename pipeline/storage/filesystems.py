"""Paths and URLs to file systems, and foreign errors to ours: the boundary to fsspec."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa

from pipeline.errors import ExpertError, MissingDependencyError

# A failure comes back as our error; without a handler, Python would print gcsfs's traceback of it as well. Whoever has
# set up logging hears gcsfs all the same.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

_NETWORK_MODULES = ("aiohttp", "botocore", "aiobotocore", "s3fs", "gcsfs", "google", "requests", "urllib3")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def protocol_of(url: str) -> str:
    """The protocol of a URL, e.g. `"s3"`; `"file"` for a plain path."""
    head, separator, _ = url.partition("://")
    return head if separator else "file"


def open_filesystem(
    url: str | os.PathLike[str], options: Mapping[str, Any] | None, error: type[ExpertError]
) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Args:
        url: A local path, or any fsspec URL that is not chained.
        options: Passed to the file system, e.g. an endpoint.
        error: The kind of error to raise when there is no such file system.

    Raises:
        MissingDependencyError: The file system's package is not installed.
        ExpertError: Of the kind `error`: the protocol is not known, or the options do not fit.
    """
    text = os.fspath(url)
    protocol = protocol_of(text)
    if "::" in text:
        raise error(f"{text} is a chained URL", hint="Give a plain path or URL; unpack archives first.")
    try:
        filesystem, path = fsspec.core.url_to_fs(text, **(options or {}))
    except ImportError as cause:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise MissingDependencyError(
            f"{text} cannot be opened: {cause}", hint=f"Install {package} on every machine of the job."
        ) from cause
    except (ValueError, TypeError, OSError) as cause:
        raise error(f"{text} cannot be opened: {cause}", hint="Check the protocol and the storage options.") from cause
    return filesystem, path


def is_local(filesystem: Any) -> bool:
    """Whether the file system is the machine's own."""
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def full_path(filesystem: Any, path: str) -> str:
    """What opens the file from anywhere: an absolute local path, or a URL."""
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


@contextmanager
def translated(message: str, error: type[ExpertError], *, hint: str) -> Iterator[None]:
    """Turn what files, networks and pyarrow raise into one of our errors.

    Args:
        message: What failed, e.g. `"a.csv cannot be read"`; the foreign error's first line is added to it.
        error: The kind of error to raise.
        hint: What to do next.
    """
    try:
        yield
    except (ExpertError, MemoryError):
        raise
    except Exception as cause:
        if not is_foreign(cause):
            raise
        raise error(f"{message}: {first_line(cause)}", hint=hint) from cause


def is_foreign(cause: Exception) -> bool:
    """Whether an error is of the kinds that files, networks, their clients and pyarrow raise."""
    # TypeError: a storage option that the file system does not know shows only when it connects
    is_common = isinstance(cause, OSError | ValueError | EOFError | TypeError | pa.ArrowException)
    return is_common or type(cause).__module__.startswith(_NETWORK_MODULES)


def first_line(cause: Exception) -> str:
    """What an error says, without what follows its first line; its kind when it says nothing."""
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(cause).__name__
