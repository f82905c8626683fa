"""Hostile and broken archives: each is refused by name, nothing is written elsewhere, and nothing is left behind."""

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ArchiveError, ConfigError, LoadError, ManifestError
from pipeline.package import ArchiveLimits, open_package
from tests.package.expert_fixtures import BLOCK, archive, expert_files, good_members, header, member, padded, pax, tar

SMALL = ArchiveLimits(total_bytes=64 << 20, file_bytes=32 << 20, members=200, path_length=200, depth=8)
GOOD = good_members()
LINK, HARD, DIRECTORY = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def sparse() -> bytes:
    return header(b"hole", 0, tarfile.GNUTYPE_SPARSE)


def gnu_long(name: bytes) -> bytes:
    return member(b"././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


def bomb() -> bytes:
    return archive(GOOD, member("zeros", bytes(30 << 20)))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("manifest.json", "{}")
    return buffer.getvalue()


def bad_crc() -> bytes:
    whole = bytearray(archive(GOOD))
    whole[-8] ^= 1
    return bytes(whole)


def bad_header_sum() -> bytes:
    block = bytearray(header(b"a"))
    block[0] ^= 1
    return archive(GOOD, bytes(block))


UNSAFE = "not safe to unpack"
DAMAGED = "is damaged"
# (hostile-inputs number and name, bytes, part of the message)
CASES: list[tuple[str, Callable[[], bytes], str]] = [
    ("01 parent", lambda: archive(GOOD, member("../canary/x")), "holds '..'"),
    ("01 parent inside", lambda: archive(GOOD, member("a/../../canary/x")), "holds '..'"),
    ("01 parent directory", lambda: archive(GOOD, member("..", kind=DIRECTORY)), "holds '..'"),
    ("01 parent by pax", lambda: archive(GOOD, pax([(b"path", b"../canary/x")]), member("x")), "holds '..'"),
    ("01 parent by GNU name", lambda: archive(GOOD, gnu_long(b"../canary/x"), member("x")), "holds '..'"),
    ("02 absolute", lambda: archive(GOOD, member("/tmp/x")), "is absolute"),  # noqa: S108  # never written
    ("03 drive", lambda: archive(GOOD, member("C:/x")), "drive letter"),
    ("03 backslash", lambda: archive(GOOD, member("..\\x")), "backslash"),
    ("04 symlink out", lambda: archive(GOOD, header(b"l", kind=LINK, link=b"../canary")), "is a symbolic link"),
    (
        "05 chained symlinks",
        lambda: archive(GOOD, header(b"a", kind=LINK, link=b"b"), header(b"b", kind=LINK, link=b"..")),
        "is a symbolic link",
    ),
    (
        "06 write through a symlink",
        lambda: archive(GOOD, header(b"l", kind=LINK, link=b"../canary"), member("l/x")),
        "is a symbolic link",
    ),
    ("07 hard link", lambda: archive(GOOD, header(b"l", kind=HARD, link=b"/etc/passwd")), "is a hard link"),
    ("08 hard link inside", lambda: archive(GOOD, header(b"l", kind=HARD, link=b"a/b")), "is a hard link"),
    ("07 pax linkpath", lambda: archive(GOOD, pax([(b"linkpath", b"/etc/passwd")]), member("x")), "is a link"),
    ("04 GNU long link", lambda: archive(GOOD, member(b"l", b"x" * 200, tarfile.GNUTYPE_LONGLINK)), "is a link"),
    ("09 long path", lambda: archive(GOOD, pax([(b"path", b"a/" * 2500 + b"x")]), member("x")), "longer than 200"),
    ("22 long part", lambda: archive(GOOD, pax([(b"path", b"n" * 10_000)]), member("x")), "longer than 200"),
    ("22 deep path", lambda: archive(GOOD, pax([(b"path", b"a/" * 20 + b"x")]), member("x")), "deeper than 8"),
    ("10 character device", lambda: archive(GOOD, header(b"d", kind=tarfile.CHRTYPE)), "a character device"),
    ("10 block device", lambda: archive(GOOD, header(b"d", kind=tarfile.BLKTYPE)), "a block device"),
    ("10 pipe", lambda: archive(GOOD, header(b"d", kind=tarfile.FIFOTYPE)), "a named pipe"),
    ("10 unknown type", lambda: archive(GOOD, header(b"d", kind=b"Z")), "unknown type"),
    ("11 duplicate", lambda: archive(GOOD, member("grammar.gbnf", b"other")), "occurs twice"),
    ("11 duplicate by dot", lambda: archive(GOOD, member("./grammar.gbnf", b"other")), "occurs twice"),
    ("12 case", lambda: archive(GOOD, member("GRAMMAR.gbnf")), "one name on some file systems"),
    ("12 case of a directory", lambda: archive(GOOD, member("Tests/x")), "one name on some file systems"),
    ("12 NFC and NFD", lambda: archive(GOOD, member("\u00e9"), member("e\u0301")), "one name on some file systems"),
    ("13 file then directory", lambda: archive(GOOD, member("x"), member("x/y")), "both a file and a directory"),
    ("13 directory then file", lambda: archive(GOOD, member("x/y"), member("x")), "both a file and a directory"),
    ("14 bomb by size", lambda: archive(GOOD, member("z", bytes(33 << 20))), "a file may have"),
    ("14 bomb by ratio", bomb, "times its size"),
    ("14 bomb after the end", lambda: gzip.compress(tar(GOOD) + bytes(30 << 20)), "times its size"),
    ("17 truncated gzip", lambda: archive(GOOD)[:-200], "cut short"),
    ("17 truncated trailer", lambda: archive(GOOD)[:-4], "cut short"),
    ("17 header only", lambda: archive(GOOD)[:10], "cut short"),
    ("17 truncated tar", lambda: gzip.compress(GOOD + padded(b"x")[:100]), "ends inside a member's header"),
    ("17 no end of archive", lambda: gzip.compress(GOOD), "ends inside a member's header"),
    ("17 truncated member", lambda: gzip.compress(GOOD + header(b"x", 1000) + b"short"), "ends inside 'x'"),
    ("18 bad CRC", bad_crc, "fails its checksum"),
    ("18 bad header checksum", bad_header_sum, "header is corrupt"),
    ("18 flipped bits", lambda: archive(GOOD)[:60] + b"\xff" * 40 + archive(GOOD)[100:], "corrupt"),
    ("19 trailing garbage", lambda: archive(GOOD) + b"garbage", "follows the end of the gzip stream"),
    ("19 garbage in the tar", lambda: gzip.compress(tar(GOOD) + b"x"), "follows the end of the tar"),
    ("20 concatenated gzip", lambda: archive(GOOD) + archive(member("more")), "follows the end of the gzip stream"),
    ("20 second tar", lambda: gzip.compress(tar(GOOD) + tar(member("more"))), "follows the end of the tar"),
    ("21 many members", lambda: archive(*(member(f"m{number}") for number in range(300))), "more than 200 members"),
    ("21 many global headers", lambda: archive(*[pax([(b"comment", b"x")], tarfile.XGLTYPE)] * 300), "more than 200"),
    ("23 GNU sparse", lambda: archive(GOOD, sparse()), "a sparse file"),
    ("23 pax sparse", lambda: archive(GOOD, pax([(b"GNU.sparse.major", b"1")]), member("x")), "a sparse file"),
    ("24 not UTF-8", lambda: archive(GOOD, member(b"\xff\xfe")), "not UTF-8"),
    ("24 NUL in a field", lambda: archive(GOOD, member(b"good\0evil")), "holds a NUL"),
    ("24 NUL in pax", lambda: archive(GOOD, pax([(b"path", b"a\0b")]), member("x")), "control character"),
    ("24 newline", lambda: archive(GOOD, member("a\nb")), "control character"),
    ("25 pax size", lambda: archive(GOOD, pax([(b"size", b"1024")]), member("x", b"a")), "different sizes"),
    ("26 negative size", lambda: archive(GOOD, header(b"x", size_field=b"\xff" * 11 + b"\x00")), "bytes"),
    ("26 size in letters", lambda: archive(GOOD, header(b"x", size_field=b"00000z00000\0")), "header is corrupt"),
    ("26 huge size", lambda: archive(GOOD, header(b"x", size_field=b"\x80" + b"\x7f" * 11)), "a file may have"),
    (
        "27 unterminated pax",
        lambda: archive(GOOD, member(b"p", b"12 path=abc", tarfile.XHDTYPE), member("x")),
        "corrupt",
    ),
    (
        "27 pax of length 0",
        lambda: archive(GOOD, member(b"p", b"0 path=abc\n", tarfile.XHDTYPE), member("x")),
        "corrupt",
    ),
    ("27 huge pax", lambda: archive(GOOD, header(b"p", 1 << 30, tarfile.XHDTYPE)), "an extended header has"),
    ("27 pax at the end", lambda: archive(GOOD, pax([(b"path", b"a")])), "after an extended header"),
    ("27 pax twice", lambda: archive(GOOD, pax([(b"path", b"a")]), pax([(b"path", b"b")]), member("x")), "repeated"),
    ("27 pax key twice", lambda: archive(GOOD, pax([(b"path", b"a"), (b"path", b"b")]), member("x")), "twice"),
    (
        "27 global path",
        lambda: archive(GOOD, pax([(b"path", b"a")], tarfile.XGLTYPE), member("x")),
        "set values for all",
    ),
    ("28 two long names", lambda: archive(GOOD, gnu_long(b"a"), pax([(b"path", b"b")]), member("x")), "both a GNU"),
    ("29 file named as directory", lambda: archive(GOOD, member("x/")), "with the name of a directory"),
    ("29 directory with content", lambda: archive(GOOD, member("x", b"abc", DIRECTORY)), "a directory none"),
    ("33 zip", zipped, "zip archive, which is not supported yet"),
    ("33 zstandard", lambda: b"\x28\xb5\x2f\xfd" + bytes(100), "zstandard"),
    ("33 plain tar", lambda: tar(GOOD), "a tar archive without gzip"),
    ("33 web page", lambda: b"<!DOCTYPE html>", "a web page"),
    ("33 Git LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("33 random", lambda: b"\x00\x01\x02", "something else"),
    ("32 empty file", lambda: b"", "an empty file"),
]


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`, whatever it is, and its bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
        if (not path.is_dir() or path.is_symlink()) and path.suffix != ".lock"
    }


@pytest.mark.parametrize(("build", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_hostile_archives_are_refused(build: Callable[[], bytes], expected: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "alive").write_text("untouched")
    source = tmp_path / "hostile.expert"
    source.write_bytes(build())
    before = tree(tmp_path)
    with pytest.raises(ArchiveError) as caught:
        open_package(source, cache_dir=cache, limits=SMALL)
    assert expected in str(caught.value)
    assert "hostile.expert" in caught.value.message
    assert tree(tmp_path) == before
    assert list((cache / "packages").iterdir()) == [] if cache.exists() else True


@pytest.mark.parametrize("inner", [(), ("expert/",)])
def test_an_archive_without_a_manifest_is_refused(inner: tuple[str, ...], tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "x.expert"
    source.write_bytes(archive(*(member(f"{name}manifest.json", b"{}") for name in inner)))
    with pytest.raises(ManifestError, match=r"holds no manifest\.json at its root") as caught:
        open_package(source, cache_dir=cache)
    assert caught.value.details == tuple(f"found {name}manifest.json" for name in inner)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([member(".", kind=DIRECTORY)], id="root-entry"),
        pytest.param([member("tests", kind=DIRECTORY)], id="directory-after-its-files"),
        pytest.param([member("empty/", kind=DIRECTORY)], id="empty-directory"),
        pytest.param([pax([(b"comment", b"commit")], tarfile.XGLTYPE)], id="git-archive"),
        pytest.param([pax([(b"mtime", b"1.5"), (b"path", "ü/x".encode())]), member("x", b"1")], id="pax"),
        pytest.param([pax([(b"size", b"1")]), member("x", b"1")], id="pax-size-that-agrees"),
        pytest.param([gnu_long(b"a" * 120), member("a" * 100, b"1")], id="gnu-long-name"),
        pytest.param([member("old", b"1", tarfile.AREGTYPE)], id="v7-type"),
        pytest.param([member(b"\xc3\xa9", b"1")], id="utf8-name"),
        pytest.param([member("nested.expert", archive(GOOD))], id="16 nested archive stays closed"),
    ],
)
def test_unusual_but_harmless_archives_open(extra: list[bytes], tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "x.expert"
    source.write_bytes(archive(GOOD, *extra))
    assert open_package(source, cache_dir=cache).label == "expert-test@0.1.0"


def test_a_dot_slash_archive_opens(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "x.expert"
    source.write_bytes(archive(good_members({f"./{name}": data for name, data in expert_files().items()})))
    assert open_package(source, cache_dir=cache).files[0].path == "adapter_config.json"


def test_setuid_and_missing_modes_become_0644(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "x.expert"
    source.write_bytes(archive(GOOD, member("tool", b"x", mode=b"0006777\0"), member("none", b"x", mode=b"0000000\0")))
    root = open_package(source, cache_dir=cache).root
    assert {(root / name).stat().st_mode & 0o7777 for name in ("tool", "none")} == {0o644}


def test_a_fifo_is_not_opened(tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "x.expert")
    with pytest.raises(ArchiveError, match="neither a file nor a directory"):
        open_package(tmp_path / "x.expert", cache_dir=cache)


def test_a_file_larger_than_the_limit_is_not_read(expert_file: Path, cache: Path) -> None:
    with pytest.raises(ArchiveError, match="at most 100 are read"):
        open_package(expert_file, cache_dir=cache, limits=replace(SMALL, total_bytes=100))


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "9"])
def test_limits_are_whole_positive_numbers(value: int) -> None:
    with pytest.raises(ConfigError, match="members"):
        ArchiveLimits(members=value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_changes_nothing(data: st.DataObject, tmp_path: Path, cache: Path) -> None:
    blocks = bytearray(tar(GOOD))
    at = data.draw(st.integers(0, len(GOOD) // BLOCK - 1)) * BLOCK + data.draw(st.integers(0, BLOCK - 1))
    blocks[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del blocks[data.draw(st.integers(0, len(blocks))) :]
    source = tmp_path / "fuzzed.expert"
    source.write_bytes(gzip.compress(blocks, 1))
    with suppress(LoadError):
        open_package(source, cache_dir=cache, limits=SMALL)
    assert {path.name for path in tmp_path.iterdir()} <= {"fuzzed.expert", "cache"}
