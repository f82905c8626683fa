"""The cache: whole entries only, whoever asks at the same time, whatever happened to it."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Barrier

import pytest

from pipeline.errors import LoadError, StoreError
from pipeline.package import open_package
from pipeline.package.cache import INDEX_NAME, default_cache_dir, read_entry
from tests.package.dying import dying_at
from tests.package.expert_fixtures import expert_files, weights, write_archive


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "packages").iterdir())


def test_an_entry_is_made_once_and_used_again(expert_file: Path, cache: Path) -> None:
    first = open_package(expert_file, cache_dir=cache)
    (entry,) = entries(cache)
    made = (entry / INDEX_NAME).stat().st_ino
    assert open_package(expert_file, cache_dir=cache) == first
    assert (entry / INDEX_NAME).stat().st_ino == made
    assert first.root == entry / "files"


def test_the_same_bytes_under_another_name_share_an_entry(expert_file: Path, cache: Path, tmp_path: Path) -> None:
    first = open_package(expert_file, cache_dir=cache)
    copy = tmp_path / "copy.expert"
    copy.write_bytes(expert_file.read_bytes())
    assert open_package(copy, cache_dir=cache).root == first.root
    assert open_package(copy, cache_dir=cache).source == str(copy)


def _delete(entry: Path) -> None:
    (entry / "files" / "grammar.gbnf").unlink()


def _grow(entry: Path) -> None:
    with (entry / "files" / "grammar.gbnf").open("a") as file:
        file.write("x")


def _add(entry: Path) -> None:
    (entry / "files" / "extra").write_text("x")


def _link(entry: Path) -> None:
    (entry / "files" / "extra").symlink_to("/etc/passwd")


def _no_index(entry: Path) -> None:
    (entry / INDEX_NAME).unlink()


def _cut_index(entry: Path) -> None:
    text = (entry / INDEX_NAME).read_text()
    (entry / INDEX_NAME).write_text(text[: len(text) // 2])


def _other_index(entry: Path) -> None:
    index = json.loads((entry / INDEX_NAME).read_text())
    index["files"][0]["sha256"] = "0" * 64
    (entry / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("spoil", [_delete, _grow, _add, _link, _no_index, _cut_index, _other_index])
def test_a_damaged_entry_is_made_again(spoil: Callable[[Path], None], expert_file: Path, cache: Path) -> None:
    first = open_package(expert_file, cache_dir=cache)
    (entry,) = entries(cache)
    spoil(entry)
    assert open_package(expert_file, cache_dir=cache) == first
    assert entries(cache) == [entry]
    assert not (first.root / "extra").exists()
    assert (first.root / "grammar.gbnf").read_text() == first.grammar


def test_threads_that_open_at_once_all_get_the_package(expert_file: Path, cache: Path) -> None:
    barrier = Barrier(8)

    def load(_: int) -> str:
        barrier.wait()
        return open_package(expert_file, cache_dir=cache).digest

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load, range(8)))) == 1
    assert len(entries(cache)) == 1


def test_processes_that_open_at_once_all_get_the_package(expert_file: Path, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pipeline.package import open_package;"
        "sys.stdin.readline(); print(open_package(sys.argv[1], cache_dir=Path(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", script, str(expert_file), str(cache)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {child.communicate("go\n", timeout=120)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert digests == {open_package(expert_file, cache_dir=cache).digest}
    assert len(entries(cache)) == 1


def test_a_cache_that_cannot_be_written_is_named(expert_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match="the package cache cannot be written") as caught:
        open_package(expert_file, cache_dir=tmp_path / "file" / "cache")
    assert "EXPERT_CACHE_DIR" in caught.value.hint


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expert_file: Path) -> None:
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "named"))
    assert open_package(expert_file).root.is_relative_to(tmp_path / "named")
    monkeypatch.delenv("EXPERT_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "expert"


def test_one_that_dies_while_it_unpacks_leaves_nothing_that_stays(expert_file: Path, tmp_path: Path) -> None:
    """At each flush to the disk in turn: what is there is whole or not there, and the next one sweeps."""
    digest = open_package(expert_file, cache_dir=tmp_path / "undisturbed").digest
    for step in count(1):
        cache = tmp_path / str(step)
        code = dying_at(step, lambda cache=cache: open_package(expert_file, cache_dir=cache))
        assert code in (0, 9)
        if code == 0:
            break
        assert all(entry.name.startswith(".fresh-") or read_entry(entry) for entry in entries(cache))
        assert open_package(expert_file, cache_dir=cache).digest == digest
        (entry,) = [entry for entry in entries(cache) if not entry.name.startswith(".fresh-")]
        write_archive(tmp_path / f"{step}.expert", expert_files(adapter_model__safetensors=weights(step)))
        open_package(tmp_path / f"{step}.expert", cache_dir=cache)  # whoever makes an entry sweeps
        assert not [left for left in entries(cache) if left.name.startswith(".fresh-")]
        assert entry in entries(cache)
    assert step > len(expert_files())


def test_a_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    big = write_archive(tmp_path / "big.expert", expert_files() | {"z": os.urandom(300_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="the package cache cannot be written"):
            open_package(big, cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(cache) == []
    assert open_package(big, cache_dir=cache).label == "expert-test@0.1.0"
