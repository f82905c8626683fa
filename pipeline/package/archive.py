"""The only code that unpacks an untrusted archive: tar.gz, tar.zst or zip, counted while it is read.

Nothing here follows what the archive says without a check: the members are walked by hand, only plain files and
directories are written, and each file is created new, relative to a directory that nobody else writes to.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.errors import ArchiveError
from pipeline.package.hashing import BackgroundHash
from pipeline.package.integrity import FileRecord
from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import NameTable
from pipeline.package.streams import CHUNK_BYTES, ByteStream, DamageError, Gzip, Zstandard
from pipeline.package.tar_reader import ArchiveReader, Member, TarReader
from pipeline.package.zip_reader import ZipReader

HEAD_BYTES = 512
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOKS_LIKE = (
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True)
class Unpacked:
    """What was written: every file, sorted by path, and the sha256 of the compressed bytes that were read."""

    files: tuple[FileRecord, ...]
    archive_sha256: str


def unpack(archive: BinaryIO, destination: Path, limits: ArchiveLimits, *, source: str) -> Unpacked:
    """Write the files of an archive below `destination`.

    Args:
        archive: The open file; it must be able to seek.
        destination: An existing empty directory that only this process writes to. On an error it holds a part of the
            files, and the caller removes it.
        limits: What the archive may hold.
        source: The package, as messages name it.

    Raises:
        ArchiveError: The archive is damaged, unsafe or larger than the limits; nothing is written outside
            `destination`.
    """
    size = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    make_reader = _reader_of(archive.read(HEAD_BYTES), source)
    archive.seek(0)
    if size > limits.total_bytes:
        raise ArchiveError(
            f"{source} has {size:,} bytes; at most {limits.total_bytes:,} are read", hint="Raise limits.total_bytes."
        )
    hashed = _Hashed(archive)
    names, records = NameTable(), []
    try:
        reader = make_reader(cast(BinaryIO, hashed), size, limits)
        with closing(hashed), _Destination(destination) as folder:
            for member in reader.members():
                names.add(member.path, "directory" if member.is_directory else "file")
                if member.is_directory:
                    folder.make(member.path)
                else:
                    records.append(FileRecord(member.path, member.size, folder.write(reader, member)))
                    reader.end_member()
            reader.finish()
    except DamageError as problem:
        raise ArchiveError(
            f"{source} is damaged", hint="Fetch the package again; it may be incomplete.", details=[str(problem)]
        ) from problem
    except ValueError as problem:
        raise ArchiveError(
            f"{source} is not safe to unpack",
            hint="Pack the expert again as a plain tar.gz of files and directories.",
            details=[str(problem)],
        ) from problem
    return Unpacked(tuple(sorted(records, key=lambda record: record.path)), hashed.sha256())


def _tar_gz(file: BinaryIO, size: int, limits: ArchiveLimits) -> ArchiveReader:
    return TarReader(ByteStream(Gzip(file), size, limits), limits)


def _tar_zst(file: BinaryIO, size: int, limits: ArchiveLimits) -> ArchiveReader:
    return TarReader(ByteStream(Zstandard(file), size, limits), limits)


_READERS: tuple[tuple[bytes, Callable[[BinaryIO, int, ArchiveLimits], ArchiveReader]], ...] = (
    (b"\x1f\x8b", _tar_gz),
    (b"\x28\xb5\x2f\xfd", _tar_zst),
    (b"PK\x03\x04", ZipReader),
    (b"PK\x05\x06", ZipReader),
)


def _reader_of(head: bytes, source: str) -> Callable[[BinaryIO, int, ArchiveLimits], ArchiveReader]:
    """What reads an archive that begins so; the name's extension counts for nothing."""
    for magic, reader in _READERS:
        if head.startswith(magic):
            return reader
    looks = next((words for magic, words in _LOOKS_LIKE if head.startswith(magic)), "something else")
    if not head:
        looks = "an empty file"
    elif head[257:262] == b"ustar":
        looks = "a tar archive without gzip"
    raise ArchiveError(
        f"{source} is no tar.gz, tar.zst or zip archive: it looks like {looks}",
        hint="Pack it again as tar.gz: expert pack.",
    )


class _Hashed:
    """The archive's file; its bytes are hashed as they are read from the beginning to the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = BackgroundHash()
        self._is_in_order = True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self._is_in_order:
            self._hash.update(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._is_in_order = False
        return self._file.seek(offset, whence)

    def sha256(self) -> str:
        """Of the whole file; what was read in another order is read once more."""
        if self._is_in_order:
            return self._hash.hexdigest()
        self._file.seek(0)
        digest = hashlib.sha256()
        while data := self._file.read(CHUNK_BYTES):
            digest.update(data)
        return digest.hexdigest()

    def close(self) -> None:
        self._hash.close()


class _Destination:
    """A directory that is written to by handles, so that no name in it is looked up twice."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, _FOLDER_FLAGS)
        self._path, self._handle = "", self._root

    def __enter__(self) -> "_Destination":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        os.close(self._root)

    def make(self, path: str) -> None:
        """Make a directory and those above it, and go there."""
        if path == self._path:
            return
        self._leave()
        for part in path.split("/") if path else ():
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=self._handle)
            below = os.open(part, _FOLDER_FLAGS, dir_fd=self._handle)
            self._close()
            self._handle = below
        self._path = path

    def write(self, reader: ArchiveReader, member: Member) -> str:
        """Create one file from what the reader gives, and return its sha256."""
        folder, _, name = member.path.rpartition("/")
        self.make(folder)
        digest, missing = BackgroundHash(), member.size
        with (
            closing(digest),
            os.fdopen(os.open(name, _FILE_FLAGS, 0o644, dir_fd=self._handle), "wb", buffering=0) as file,
        ):
            while missing:
                chunk = reader.read(min(missing, CHUNK_BYTES))
                if not chunk:
                    raise DamageError(f"The archive ends inside {name!r}.")
                digest.update(chunk)
                _write_all(file, chunk)
                missing -= len(chunk)
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _leave(self) -> None:
        """Go back to the root; what was made in the folder lasts."""
        os.fsync(self._handle)
        self._close()
        self._path, self._handle = "", self._root

    def _close(self) -> None:
        if self._handle != self._root:
            os.close(self._handle)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
