"""Looking after the cache: what is in it, whether it is whole, and what may go."""

import hashlib
import os
import time
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ConfigError
from pipeline.package import PackageStore, open_package
from pipeline.package.cache import INDEX_NAME
from pipeline.package.cache_admin import DAY_SECONDS, CachedItem, list_cache, parse_size, prune_cache, verify_cache
from pipeline.package.known_archives import known_sha256
from tests.package.expert_fixtures import expert_files, weights, write_archive


@pytest.fixture
def archives(tmp_path: Path, cache: Path) -> list[Path]:
    """Three archives, opened 3, 2 and 1 days ago."""
    made = []
    for number in range(3):
        archive = write_archive(tmp_path / f"{number}.expert", expert_files(adapter_model__safetensors=weights(number)))
        past = time.time() - 100
        os.utime(archive, (past, past))
        entry = open_package(archive).root.parent
        used = time.time() - (3 - number) * DAY_SECONDS
        os.utime(entry / INDEX_NAME, (used, used))
        made.append(archive)
    return made


def test_what_was_used_last_comes_first(archives: list[Path], cache: Path) -> None:
    items = list_cache(cache)
    assert [round((time.time() - item.used) / DAY_SECONDS) for item in items] == [1, 2, 3]
    assert {item.label for item in items} == {"expert-test@0.1.0"}
    assert all(item.is_whole and item.size > 1000 and item.kind == "packages" for item in items)
    assert list_cache(cache / "nothing") == ()


def test_opening_counts_as_use(archives: list[Path], cache: Path) -> None:
    oldest = list_cache(cache)[-1]
    open_package(archives[0])
    assert list_cache(cache)[0].key == oldest.key


def test_what_is_unused_or_too_much_goes(archives: list[Path], cache: Path) -> None:
    keys = [item.key for item in list_cache(cache)]
    assert [item.key for item in prune_cache(cache, unused_days=1.5, dry_run=True)] == keys[1:]
    assert len(list_cache(cache)) == 3
    room = sum(item.size for item in list_cache(cache)[:2])
    assert [item.key for item in prune_cache(cache, max_bytes=room)] == keys[2:]
    assert [item.key for item in prune_cache(cache, unused_days=1.5)] == keys[1:2]
    assert [item.key for item in list_cache(cache)] == keys[:1]
    assert prune_cache(cache) == ()
    open_package(archives[2])
    assert prune_cache(cache, everything=True) == ()
    assert open_package(archives[0]).label == "expert-test@0.1.0"


def test_damage_is_found_and_what_cannot_be_read_goes(archives: list[Path], cache: Path) -> None:
    assert set(verify_cache(cache).values()) == {()}
    one, other, _ = list_cache(cache)
    text = (one.path / "files" / "grammar.gbnf").read_bytes()
    (one.path / "files" / "grammar.gbnf").write_bytes(text[::-1])
    (other.path / INDEX_NAME).unlink()
    problems = {item.key: found for item, found in verify_cache(cache).items()}
    assert problems[one.key] == ("grammar.gbnf differs from its checksum",)
    assert problems[other.key][0].startswith("its index cannot be read")
    assert [item.key for item in prune_cache(cache)] == [other.key]


def test_what_killed_processes_left_is_swept(archives: list[Path], cache: Path) -> None:
    (cache / "packages" / ".fresh-dead").mkdir()
    prune_cache(cache)
    assert not (cache / "packages" / ".fresh-dead").exists()


def aged(cache: Path) -> dict[str, CachedItem]:
    """The entries, last used two hours ago, by key: so that they may go."""
    for item in list_cache(cache):
        used = time.time() - 7200
        os.utime(item.path / INDEX_NAME, (used, used))
    return {item.key: item for item in list_cache(cache)}


def key_of(archive: Path) -> str:
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def test_what_has_lost_its_source_goes(archives: list[Path], cache: Path, tmp_path: Path) -> None:
    deleted, changed, kept = archives
    keys = [key_of(archive) for archive in archives]
    assert prune_cache(cache, source_gone=True) == ()
    copy = tmp_path / "copy of the one that stays"
    copy.write_bytes(kept.read_bytes())
    open_package(copy)
    kept.unlink()  # its copy is there, and the entry is the copy's, too
    deleted.unlink()
    write_archive(changed, expert_files(adapter_model__safetensors=weights(9)))
    items = aged(cache)
    assert {key: item.source_is_gone for key, item in items.items()} == {keys[0]: True, keys[1]: True, keys[2]: False}
    assert {item.key for item in prune_cache(cache, source_gone=True, dry_run=True)} == set(keys[:2])
    assert len(list_cache(cache)) == 3
    assert {item.key for item in prune_cache(cache, source_gone=True)} == set(keys[:2])
    assert [item.key for item in list_cache(cache)] == keys[2:]
    copy.unlink()
    assert [item.key for item in prune_cache(cache, source_gone=True)] == keys[2:]
    assert list((cache / "archives").iterdir()) == []


def test_what_another_version_took_the_place_of_goes(tmp_path: Path, cache: Path) -> None:
    archive, keys = tmp_path / "x.expert", []
    for number in range(3):
        write_archive(archive, expert_files(adapter_model__safetensors=weights(number)))
        open_package(archive)
        keys.append(key_of(archive))
    aged(cache)
    assert {item.key for item in prune_cache(cache, source_gone=True)} == set(keys[:2])
    assert open_package(archive).root.parent.name == keys[2]
    assert [item.source_is_gone for item in list_cache(cache)] == [False]


def test_what_came_from_elsewhere_has_no_source_to_lose(tmp_path: Path, cache: Path) -> None:
    staged = PackageStore(tmp_path / "store").stage(write_archive(tmp_path / "x.expert"), cache_dir=tmp_path / "other")
    open_package(staged.url)
    fsspec.filesystem("memory").pipe_file("/b/x.expert", (tmp_path / "x.expert").read_bytes())
    try:
        open_package("memory://b/x.expert")
    finally:
        fsspec.filesystem("memory").store.clear()
    items = list(aged(cache).values())
    assert [(item.sources, item.source_is_gone) for item in items] == [((), False)] * 2
    assert prune_cache(cache, source_gone=True) == ()


def test_the_command_says_whose_source_is_gone(archives: list[Path], cache: Path) -> None:
    archives[0].unlink()
    key = next(key for key, item in aged(cache).items() if item.source_is_gone)
    listed = CliRunner().invoke(app, ["cache", "ls", "--cache-dir", str(cache)], env={"COLUMNS": "200"})
    assert [line.split()[-1] for line in listed.stdout.splitlines() if key[:12] in line] == ["gone"]
    pruned = CliRunner().invoke(app, ["cache", "prune", "--source-gone", "--cache-dir", str(cache)])
    assert pruned.exit_code == 0
    assert "freed" in pruned.stdout
    assert "in 1 entries" in pruned.stdout
    assert key not in {item.key for item in list_cache(cache)}


def test_an_archive_is_hashed_again_only_when_it_may_have_changed(tmp_path: Path, cache: Path) -> None:
    archive = write_archive(tmp_path / "x.expert")
    open_package(archive)
    assert known_sha256(cache, archive, archive.stat()) is None  # too fresh: a change could have the same times
    past = time.time_ns() - 10**11
    remembered = []

    class Settled:
        def __getattr__(self, name: str) -> int:
            return past if name in ("st_mtime_ns", "st_ctime_ns") else int(getattr(archive.stat(), name))

    from pipeline.package.known_archives import remember_archive

    settled: os.stat_result = Settled()  # type: ignore[assignment]  # a file that nobody has touched for a while
    remember_archive(cache, archive, settled, "ab" * 32)
    remembered.append(known_sha256(cache, archive, settled))
    remembered.append(known_sha256(cache, archive, archive.stat()))
    remembered.append(known_sha256(cache, tmp_path / "y.expert", settled))
    assert remembered == ["ab" * 32, None, None]


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("500MB", 500_000_000), ("20 GiB", 20 << 30), ("1.5k", 1500), ("7 b", 7)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "many", "5 XB", "1e999GB", "nanGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)
