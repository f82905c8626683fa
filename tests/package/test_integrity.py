"""Checksums of files, packages and archives."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ArchiveError, IntegrityError
from pipeline.package import ArchiveLimits, open_package
from pipeline.package.integrity import content_digest, scan_directory
from tests.package.expert_fixtures import write_files

LIMITS = ArchiveLimits()


def sidecar(archive: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    archive.with_name(archive.name + ".sha256").write_bytes(data)


def test_the_digest_is_the_documented_one(tmp_path: Path) -> None:
    write_files(tmp_path, {"b/c": b"two", "a": b"one", "b-": b"three"})
    lines = sorted(
        f"{name}\0{hashlib.sha256(data).hexdigest()}\n"
        for name, data in {"b/c": b"two", "a": b"one", "b-": b"three"}.items()
    )
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert content_digest(scan_directory(tmp_path, LIMITS)) == expected
    assert content_digest(reversed(scan_directory(tmp_path, LIMITS))) == expected


@pytest.mark.parametrize("change", ["content", "name", "more", "less"])
def test_any_change_changes_the_digest(change: str, tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"one", "b": b"two"})
    before = content_digest(scan_directory(tmp_path, LIMITS))
    match change:
        case "content":
            (tmp_path / "a").write_bytes(b"onE")
        case "name":
            (tmp_path / "a").rename(tmp_path / "c")
        case "more":
            (tmp_path / "c").write_bytes(b"")
        case _:
            (tmp_path / "b").unlink()
    assert content_digest(scan_directory(tmp_path, LIMITS)) != before


@pytest.mark.parametrize("line", ["{sha}  test.expert\n", "{sha} *test.expert", "{SHA}  dist/test.expert\r\n"])
def test_a_matching_sidecar_is_accepted(line: str, expert_file: Path, cache: Path) -> None:
    sha = hashlib.sha256(expert_file.read_bytes()).hexdigest()
    sidecar(expert_file, line.format(sha=sha, SHA=sha.upper()))
    assert open_package(expert_file, cache_dir=cache).label == "expert-test@0.1.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{'0' * 64}  test.expert\n", "test.expert differs from its checksum"),
        (f"{'0' * 64}  other.expert\n", "does not name test.expert"),
        ("no checksum\n", "is not a checksum file"),
        ("", "is not a checksum file"),
        (b"\xff\xfe", "is not a checksum file"),
        (f"{'0' * 64}  test.expert\n" * 2000, "is not a checksum file"),
    ],
)
def test_a_wrong_sidecar_is_refused(text: str | bytes, expected: str, expert_file: Path, cache: Path) -> None:
    sidecar(expert_file, text)
    with pytest.raises(IntegrityError, match=expected):
        open_package(expert_file, cache_dir=cache)
    assert not cache.exists()


def test_a_cached_package_is_still_checked_against_its_sidecar(expert_file: Path, cache: Path) -> None:
    open_package(expert_file, cache_dir=cache)
    sidecar(expert_file, f"{'0' * 64}  test.expert\n")
    with pytest.raises(IntegrityError):
        open_package(expert_file, cache_dir=cache)


def _link_out(root: Path) -> None:
    (root / "link").symlink_to("/etc/passwd")


def _link_directory(root: Path) -> None:
    (root / "link").symlink_to(root / "tests", target_is_directory=True)


def _fifo(root: Path) -> None:
    os.mkfifo(root / "pipe")


def _bytes_name(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).write_bytes(b"")


def _newline(root: Path) -> None:
    (root / "a\nb").write_bytes(b"")


def _case(root: Path) -> None:
    (root / "GRAMMAR.gbnf").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_link_out, "symbolic link"),
        (_link_directory, "symbolic link"),
        (_fifo, "device, pipe or socket"),
        (_bytes_name, "not UTF-8"),
        (_newline, "control character"),
        (_case, "one name on some file systems"),
    ],
)
def test_a_directory_holds_only_files(
    spoil: Callable[[Path], None], expected: str, expert_dir: Callable[..., Path]
) -> None:
    root = expert_dir()
    spoil(root)
    with pytest.raises(ArchiveError) as caught:
        open_package(root)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (ArchiveLimits(members=3), "more than 3 files"),
        (ArchiveLimits(total_bytes=100), "more than 100 bytes"),
        (ArchiveLimits(file_bytes=100), "at most 100 are allowed in one file"),
        (ArchiveLimits(depth=1), "deeper than 1"),
    ],
)
def test_limits_hold_for_directories(limits: ArchiveLimits, expected: str, expert_dir: Callable[..., Path]) -> None:
    with pytest.raises(ArchiveError) as caught:
        open_package(expert_dir(), limits=limits)
    assert expected in str(caught.value)
