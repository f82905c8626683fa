"""What a dataset names -> its files, in a fixed order, with names that are the same on every machine."""

import difflib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from pipeline.batch.compression import CODECS, split_codec
from pipeline.batch.shards import FORMATS, Format
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage.filesystems import full_path, is_local, open_filesystem, translated

Dataset = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_EXTENSIONS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
}
TEXT_FORMATS: tuple[Format, ...] = ("jsonl", "csv")  # those that may be compressed as a whole
_MAX_NAMED = 8
_KNOWN = f"{', '.join(_EXTENSIONS)} (text also with {', '.join(CODECS)})"


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset: where it is, its name relative to the dataset's root, and its size in bytes."""

    path: str
    name: str
    size: int


@dataclass(frozen=True)
class _Match:
    """What one item of the dataset names: files below a root."""

    filesystem: Any
    root: str
    sizes: Mapping[str, int]


def find_files(dataset: Dataset, storage_options: Mapping[str, Any] | None = None) -> list[DataFile]:
    """The files a dataset names, sorted by name.

    In a directory (searched at any depth) and in a glob, names that start with `_` or `.` are left out, unless the
    glob asks for them. A file named twice counts once. The root of one item is the directory itself, what stands
    before a glob's first `*`, or a file's directory; several items share the deepest directory that holds all roots.

    Args:
        dataset: A path, a glob, a directory, any fsspec URL, or a list of them.
        storage_options: Passed to the file system.

    Raises:
        DatasetError: Nothing is there, or it cannot be listed.
    """
    items = [dataset] if isinstance(dataset, str | os.PathLike) else list(dataset)
    if not items:
        raise DatasetError("the dataset is an empty list", hint="Name at least one file, directory or glob.")
    matches = [_match(os.fspath(item), storage_options) for item in items]
    protocols = {str(match.filesystem.protocol) for match in matches}
    if len(protocols) > 1:
        raise DatasetError(
            "the dataset lies on several file systems",
            details=[str(item) for item in items[:_MAX_NAMED]],
            hint="Copy it to one, or run one job for each.",
        )
    root = _common_root([match.root for match in matches])
    sizes = {path: (match.filesystem, size) for match in matches for path, size in match.sizes.items()}
    files = [
        DataFile(full_path(filesystem, path), _relative(path, root), size) for path, (filesystem, size) in sizes.items()
    ]
    for file in files:
        _check_name(file)
    return sorted(files, key=lambda file: file.name)


def file_format(files: Sequence[DataFile], format_name: str | None) -> Format:
    """The format of all files: the one given, or told by their extensions.

    Raises:
        ConfigError: The format given is not one of ours.
        DatasetError: An extension is not known, or the files have several formats.
    """
    if format_name is not None:
        if format_name not in FORMATS:
            raise ConfigError(f"format is {format_name!r}", hint=f"Give one of {', '.join(FORMATS)}.")
        return cast(Format, format_name)
    formats = {file.name: format_of(file.name) for file in files}
    unknown = [name for name, found in formats.items() if found is None]
    if unknown:
        raise DatasetError(
            f"{len(unknown)} of the dataset's {len(files)} files have an extension that tells no format",
            details=_some(unknown),
            hint=f"Name only {_KNOWN} files, or give format ({', '.join(FORMATS)}).",
        )
    first = {found: name for name, found in reversed(formats.items())}
    if len(first) > 1:
        raise DatasetError(
            "the dataset mixes formats",
            details=sorted(f"{found}  {name}" for found, name in first.items()),
            hint="Run one job for each format, with a glob such as *.parquet.",
        )
    found = next(iter(first), None)
    if found is None:
        raise DatasetError("the dataset has no files", hint="Name at least one file.")
    return found


def format_of(name: str) -> Format | None:
    """The format that a file's extension tells, if any: `jsonl` for `a.jsonl` and `a.jsonl.gz`."""
    bare, codec = split_codec(name)
    found = _EXTENSIONS.get(PurePosixPath(bare).suffix.lower())
    return found if codec is None or found in TEXT_FORMATS else None


def _match(item: str, options: Mapping[str, Any] | None) -> _Match:
    filesystem, path = open_filesystem(item, options, DatasetError)
    with translated(f"{item} cannot be listed", DatasetError, hint="Check that it exists and may be read."):
        filesystem.invalidate_cache()
        if filesystem.isdir(path):
            sizes = dict(_walk(filesystem, path))
            visible = {found: size for found, size in sizes.items() if not is_hidden(_relative(found, path))}
            if not visible:
                raise DatasetError(
                    f"the directory {item} holds no data files",
                    details=[f"left out, for its first character  {name}" for name in _some(sorted(sizes))],
                    hint=f"Put {_KNOWN} files there, or name another directory.",
                )
            return _Match(filesystem, path, visible)
        if filesystem.exists(path):
            return _Match(filesystem, filesystem._parent(path), {path: _file_size(filesystem, path)})
        if any(character in path for character in "*?["):
            return _glob(filesystem, path, item)
    raise DatasetError(
        f"nothing is at {item}",
        details=_siblings(filesystem, path),
        hint="Check the path; a relative one starts at the working directory.",
    )


def _glob(filesystem: Any, pattern: str, item: str) -> _Match:
    parts = pattern.split("/")
    magic = next(i for i, part in enumerate(parts) if any(character in part for character in "*?["))
    root = "/".join(parts[:magic])
    wants_hidden = any(part.startswith(("_", ".")) for part in parts[magic:])
    sizes: dict[str, int] = {}
    for path in filesystem.glob(pattern):
        if filesystem.isdir(path):
            sizes.update(_walk(filesystem, path))
        else:
            sizes[path] = _file_size(filesystem, path)
    visible = {path: size for path, size in sizes.items() if wants_hidden or not is_hidden(_relative(path, root))}
    if not visible:
        raise DatasetError(
            f"nothing matches {item}",
            details=_siblings(filesystem, pattern),
            hint="Check the pattern; quote it in a shell.",
        )
    return _Match(filesystem, root, visible)


def _walk(filesystem: Any, directory: str) -> Iterator[tuple[str, int]]:
    """Path and size of every file at any depth. Local links are followed, except back up to a directory we are in."""
    if not is_local(filesystem):
        for path, info in filesystem.find(directory, detail=True).items():
            if not path.endswith("/"):  # an object that stands for a directory
                yield path, _checked_size(path, info["type"] == "file", info.get("size"))
        return
    for parent, directories, names in os.walk(directory, followlinks=True, onerror=_raise):
        here = Path(parent).resolve()
        directories[:] = sorted(name for name in directories if not _leads_back(here, name))
        for name in names:
            path = f"{parent}/{name}"
            yield path, _file_size(filesystem, path)


def _leads_back(here: Path, name: str) -> bool:
    return (here / name).is_symlink() and here.is_relative_to((here / name).resolve())


def _raise(error: OSError) -> None:
    raise error


def _file_size(filesystem: Any, path: str) -> int:
    if is_local(filesystem):
        status = os.stat(path)  # noqa: PTH116 - the path is text from fsspec
        return _checked_size(path, stat.S_ISREG(status.st_mode), status.st_size)
    info = filesystem.info(path)
    return _checked_size(path, info["type"] == "file", info.get("size"))


def _checked_size(path: str, is_file: bool, size: Any) -> int:
    if not is_file:
        raise DatasetError(f"{path} is not a regular file", hint="Name files, not pipes or devices.")
    if not isinstance(size, int):
        raise DatasetError(f"the size of {path} is not known", hint="Copy it to a file system that tells sizes.")
    return size


def _common_root(roots: Sequence[str]) -> str:
    """The deepest directory that holds all of them."""
    shared = []
    for level in zip(*(root.split("/") for root in roots), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "/".join(shared)


def _check_name(file: DataFile) -> None:
    try:
        file.name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"the file name {file.name!r} is not UTF-8", hint="Rename the file.") from error


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def is_hidden(name: str) -> bool:
    """Whether listing a dataset passes over this relative path: a part of it begins with an underscore or a dot."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _siblings(filesystem: Any, path: str) -> list[str]:
    """The names beside a missing path that look most like it."""
    parent = filesystem._parent(path)
    try:
        names = [PurePosixPath(name).name for name in filesystem.ls(parent, detail=False)]
    except (OSError, ValueError):
        return [f"its directory is missing too  {parent}"]
    wanted = PurePosixPath(path).name
    names = [name for name in names if not is_hidden(name)]
    alike = [name for name in sorted(names) if PurePosixPath(name).suffix == PurePosixPath(wanted).suffix]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or alike[:3] or sorted(names)[:3]
    return [f"beside it  {name}" for name in near]


def _some(names: Iterable[str]) -> list[str]:
    items = list(names)
    rest = len(items) - _MAX_NAMED
    return [*items[:_MAX_NAMED], *([f"and {rest} more"] if rest > 0 else [])]
