"""Archives: unusual ones that open, limits, and damage at random. Hostile ones are in `hostile_cases`."""

import gzip
import os
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ArchiveError, ConfigError, LoadError, ManifestError
from pipeline.package import ArchiveLimits, open_package
from tests.package.expert_fixtures import BLOCK, archive, expert_files, good_members, member, pax, tar

SMALL = ArchiveLimits(total_bytes=64 << 20, file_bytes=32 << 20, members=200, path_length=200, depth=8)
GOOD = good_members()
DIRECTORY = tarfile.DIRTYPE


def gnu_long(name: bytes) -> bytes:
    return member(b"././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME)


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
