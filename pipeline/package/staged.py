"""What stands in a store of packages: names, the marker of a whole one, and how it comes to this machine.

<store>/packages/<digest>/files/...          a package, file by file
<store>/packages/<digest>/complete.json      written last: every file with size and sha256
<store>/models/<digest>/...                  a base model, alike
<store>/versions/<name>/<version>/<digest>   empty: which versions of an expert there are
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import IntegrityError, PackageNotFoundError, StoreError
from pipeline.package.cache import FILES_NAME, INDEX_NAME, KINDS, CacheEntry, Check, Kind, accept, cached, read_entry
from pipeline.package.download import is_url
from pipeline.package.integrity import FileRecord, content_digest
from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import NameTable, safe_path

if TYPE_CHECKING:
    from pipeline.storage import Storage

MARKER = "complete.json"
MARKER_FORMAT = 1
MAX_MARKER_BYTES = 16 << 20
_REFERENCE = re.compile(rf"(?P<store>.+?)/+(?P<kind>{'|'.join(KINDS)})/(?P<digest>[0-9a-f]{{64}})/?", re.DOTALL)
_RETRY_SECONDS = (0.1, 0.5, 2.0)
_MODEL_LIMITS = ArchiveLimits(total_bytes=1 << 42, file_bytes=1 << 42)


@dataclass(frozen=True)
class Reference:
    """One staged package or base model, as its URL names it: `<store>/packages/<digest>`."""

    store: str
    kind: Kind
    digest: str

    @property
    def url(self) -> str:
        """The URL again."""
        return f"{self.store}/{self.kind}/{self.digest}"


@dataclass(frozen=True)
class Marker:
    """What the marker of a whole package says.

    Args:
        label: `name@version` of an expert, the directory's name of a base model.
        files: Every file, sorted by path.
    """

    label: str
    files: tuple[FileRecord, ...]

    def to_json(self) -> bytes:
        """The same bytes for the same content, whoever writes it."""
        document = {"format": MARKER_FORMAT, "label": self.label, "files": [asdict(record) for record in self.files]}
        return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def parse_reference(place: str) -> Reference | None:
    """The reference that a path or URL spells, or None where it names something else.

    A directory that is an unpacked package, or an entry of the cache, is none, whatever its name.
    """
    match = _REFERENCE.fullmatch(place)
    if match is None:
        return None
    folder = Path(place)
    if any((folder / name).exists() for name in ("manifest.json", "config.json", INDEX_NAME)):
        return None
    kind: Kind = "packages" if match["kind"] == "packages" else "models"
    store = match["store"] if is_url(place) else os.path.abspath(match["store"])  # noqa: PTH100  # follows no links
    return Reference(store, kind, match["digest"])


def read_marker(storage: "Storage", digest: str) -> Marker | None:
    """The marker of one folder of a store; None where there is none, or where it is not of that digest.

    Args:
        storage: The folder.
        digest: What the files must add up to.

    Raises:
        StoreError: The store cannot be read.
    """
    if not storage.exists(MARKER):
        return None
    data = storage.read(MARKER)
    try:
        document = json.loads(data[: MAX_MARKER_BYTES + 1])
        if document["format"] != MARKER_FORMAT:
            return None
        files = tuple(_record(record) for record in document["files"])
        marker = Marker(str(document["label"]), files)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return marker if content_digest(files) == digest else None


def _record(record: Mapping[str, Any]) -> FileRecord:
    path, size, sha256 = record["path"], record["size"], record["sha256"]
    if not isinstance(path, str) or type(size) is not int or size < 0 or not isinstance(sha256, str):
        raise TypeError(path)
    return FileRecord(path, size, sha256)


def localise(
    reference: Reference,
    cache_dir: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    limits: ArchiveLimits | None = None,
    check: Check = accept,
    without: tuple[str, ...] = (),
) -> CacheEntry:
    """Bring what is staged to this machine, once: the first process copies it, the others wait for it.

    Every file is compared with its checksum, and all of them with the digest, by the marker's list.

    Args:
        reference: What.
        cache_dir: The cache of this machine.
        storage_options: Of the store's file system.
        limits: What a package may hold.
        check: Looks at it before it is kept.
        without: Files whose names end so are not brought, where the whole is not here already.

    Raises:
        IntegrityError: What the store holds differs from the digest, read after read.
        LoadError: What `check` raises.
        PackageNotFoundError: Nothing whole is staged there.
        StoreError: The store cannot be read, or the cache not be written.
    """
    final = cache_dir / reference.kind / reference.digest
    entry = read_entry(final)
    if entry is not None and entry.digest == reference.digest:
        return entry

    def fill(root: Path) -> tuple[FileRecord, ...]:
        from pipeline.storage import open_storage  # it brings in pyarrow

        options = storage_options if is_url(reference.url) else None
        storage = open_storage(reference.url, options, error=StoreError, any_protocol=True)
        marker = read_marker(storage, reference.digest)
        if marker is None:
            raise PackageNotFoundError(
                f"nothing whole is staged at {reference.url}",
                hint="Stage it (expert stage), and name the reference that this prints.",
            )
        bounds = limits if limits is not None and reference.kind == "packages" else _MODEL_LIMITS
        _check_names(marker.files, bounds, reference)
        files = tuple(record for record in marker.files if not (without and record.path.endswith(without)))
        for record in files:
            target = root / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(storage, record, target, reference)
        return files

    key = reference.digest
    if without:
        key = hashlib.sha256("\n".join((key, *without)).encode()).hexdigest()
    return cached(cache_dir, reference.kind, key, fill, check)


def _check_names(files: tuple[FileRecord, ...], limits: ArchiveLimits, reference: Reference) -> None:
    """A store that others can write to is not believed: names and sizes are held to what an archive may hold."""
    names, problem = NameTable(), ""
    try:
        for record in files:
            names.add(safe_path(record.path, limits), "file")
    except ValueError as error:
        problem = str(error)
    if any(safe_path(record.path, limits) != record.path or not record.path for record in files if not problem):
        problem = "a path is not plain"
    if len(files) > limits.members or sum(record.size for record in files) > limits.total_bytes:
        problem = "it holds more than the limits allow"
    if problem:
        raise StoreError(f"what is staged at {reference.url} cannot be used", hint="Stage it again.", details=[problem])


def _fetch(storage: "Storage", record: FileRecord, target: Path, reference: Reference) -> None:
    for pause in (*_RETRY_SECONDS, None):
        problem: StoreError | None = None
        try:
            actual = storage.fetch(f"{FILES_NAME}/{record.path}", str(target))
        except StoreError as error:
            problem = error
        else:
            if actual == record.sha256:
                return
            target.unlink()
        if pause is None:
            raise problem or IntegrityError(
                f"{record.path} of {reference.url} differs from its checksum",
                hint="Remove that file from the store and stage the package again: expert stage.",
                details=[f"the marker says sha256 {record.sha256}", f"the store has   sha256 {actual}"],
            )
        time.sleep(pause)
