"""Fetch a package that lies behind a URL, through fsspec."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from pipeline.errors import ArchiveError, LoadError, MissingDependencyError, PackageNotFoundError
from pipeline.package.integrity import CHUNK_BYTES, MAX_SIDECAR_BYTES, SIDECAR_SUFFIX
from pipeline.package.limits import ArchiveLimits
from pipeline.package.locks import scratch_directory

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(source: str) -> bool:
    """Whether `source` is a URL rather than a local path (a drive letter is none)."""
    return _URL.match(source) is not None


def same_protocol(one: str, other: str) -> bool:
    """Whether two places are of one kind of storage, so that options for the one are meant for the other, too."""
    return is_url(one) and is_url(other) and urlsplit(one).scheme == urlsplit(other).scheme


def url_file_name(url: str) -> str:
    """The file name at the end of a URL, without its query."""
    return unquote(urlsplit(url).path or urlsplit(url).netloc).rstrip("/").rpartition("/")[2] or "package.expert"


@contextmanager
def downloaded(
    url: str, cache_dir: Path, limits: ArchiveLimits, storage_options: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A local copy of the file behind `url`, with its `.sha256` file beside it where there is one.

    The copy is removed at the end.

    Args:
        url: Any URL that fsspec reads, e.g. `s3://bucket/expert-sql.expert`.
        cache_dir: Where the copy is kept meanwhile.
        limits: `total_bytes` bounds the download.
        storage_options: Passed to the file system, e.g. an endpoint.

    Raises:
        ArchiveError: The file is larger than the limits.
        LoadError: It cannot be fetched.
        MissingDependencyError: fsspec needs another package for this kind of URL.
        PackageNotFoundError: Nothing is there.
    """
    name = url_file_name(url)
    with scratch_directory(cache_dir / "downloads") as scratch:
        copy = scratch / Path(name).name
        try:
            _fetch(url, copy, limits.total_bytes, storage_options)
        except FileNotFoundError as problem:
            raise PackageNotFoundError(f"nothing is at {_shown(url)}", hint="Check the URL.") from problem
        except PermissionError as problem:
            raise LoadError(f"{_shown(url)} may not be read", hint="Check your credentials.") from problem
        if not urlsplit(url).query:  # the query of a signed URL holds for that one file
            with suppress(
                FileNotFoundError, PermissionError
            ):  # S3 forbids a missing file where names may not be listed
                sidecar = copy.with_name(copy.name + SIDECAR_SUFFIX)
                _fetch(url + SIDECAR_SUFFIX, sidecar, MAX_SIDECAR_BYTES, storage_options)
        yield copy


def _fetch(url: str, target: Path, max_bytes: int, options: Mapping[str, Any] | None) -> None:
    """Copy the file behind `url`; FileNotFoundError and PermissionError are left to the caller."""
    try:
        with _open(url, options) as remote, target.open("xb") as local:
            count = 0
            while count <= max_bytes and (chunk := remote.read(CHUNK_BYTES)):
                local.write(chunk)
                count += len(chunk)
    except Exception as raised:  # noqa: BLE001  # each file system raises the errors of its own client library
        target.unlink(missing_ok=True)
        problem = _web_failure(raised) or raised
        if isinstance(problem, FileNotFoundError | PermissionError | MissingDependencyError):
            raise problem from raised.__cause__
        raise LoadError(
            f"{_shown(url)} cannot be fetched: {type(problem).__name__}: {problem}",
            hint="Check the URL, the network and your credentials.",
        ) from problem
    if count > max_bytes:
        raise ArchiveError(f"{_shown(url)} has more than {max_bytes:,} bytes", hint="Raise limits.total_bytes.")


def _web_failure(problem: Exception) -> Exception | None:
    """What went wrong on the web: fsspec calls every failure there a missing file, whose cause is the reason."""
    cause = problem.__cause__
    if not isinstance(problem, FileNotFoundError) or not isinstance(cause, Exception):
        return None
    if not type(cause).__module__.startswith("aiohttp"):
        return None
    status = getattr(cause, "status", None)
    if status in (404, 410):
        return None
    return PermissionError(str(cause)) if status in (401, 403) else cause


def _open(url: str, options: Mapping[str, Any] | None) -> Any:
    try:
        file_system, path = fsspec.core.url_to_fs(url, **(options or {}))
    except ImportError as problem:
        raise MissingDependencyError(
            f"{_shown(url)} needs a package that is not installed", hint=str(problem)
        ) from problem
    return file_system.open(path, "rb")


def _shown(url: str) -> str:
    """A URL without its credentials and its query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
