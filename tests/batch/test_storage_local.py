"""Create-only files on a disk: one winner, whole or absent, whatever dies and whoever races."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import MissingDependencyError, OutputError
from pipeline.storage import open_storage
from pipeline.storage.local import LocalStorage


@pytest.fixture(params=[True, False], ids=["links", "claims"])
def storage(request, tmp_path):
    return LocalStorage(str(tmp_path / "out"), hard_links=request.param)


def test_the_first_writer_wins(storage):
    assert storage.list() == {}
    assert not storage.exists("a/b.txt")
    assert storage.create("a/b.txt", b"first")
    assert not storage.create("a/b.txt", b"second")
    assert storage.create("c.txt", b"")
    assert storage.read("a/b.txt") == b"first"
    assert storage.exists("a/b.txt")
    assert not storage.exists("a")
    assert {name: size for name, size in storage.list().items() if "claims" not in name} == {"a/b.txt": 5, "c.txt": 0}
    assert storage.list("a") == storage.list("a/") == {"a/b.txt": 5}
    assert storage.list("nothing") == {}
    storage.remove_tree("a")
    storage.remove_tree("a")
    assert not storage.exists("a/b.txt")


def test_content_may_come_from_a_file(storage, tmp_path):
    (tmp_path / "source").write_bytes(b"a" * 3_000_000)
    assert storage.create_from_file("a", str(tmp_path / "source"))
    assert storage.read("a") == b"a" * 3_000_000
    assert not storage.create_from_file("a", str(tmp_path / "source"))


def test_nothing_of_an_attempt_stays(tmp_path):
    storage = LocalStorage(str(tmp_path))
    storage.create("a", b"1")
    storage.create("a", b"2")
    assert storage.list() == {"a": 1}


def test_urls_and_pickles(storage):
    storage.create("a", b"1")
    assert storage.url("a") == f"{storage.root}/a"
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"  # noqa: S301 - Ray carries it that way
    for url in (storage.root, f"file://{storage.root}"):
        assert open_storage(url).read("a") == b"1"


def test_racing_threads_have_one_winner(storage):
    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda writer, n=number: storage.create(f"{n}", bytes([writer]) * 5000), range(8)))
        assert sum(won) == 1
        assert storage.read(f"{number}") == bytes([won.index(True)]) * 5000


WRITER = """
import sys
from pipeline.storage.local import LocalStorage
root, links, writer = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
storage = LocalStorage(root, hard_links=links)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    if storage.create(f"{number:03d}", bytes([writer]) * 4096):
        print(number, flush=True)
"""


def test_racing_processes_have_one_winner(storage):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, storage.root, str(storage.hard_links), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    won = [[int(line) for line in process.communicate()[0].split()] for process in processes]
    assert sorted(number for numbers in won for number in numbers) == list(range(100))
    for writer, numbers in enumerate(won):
        for number in numbers:
            assert storage.read(f"{number:03d}") == bytes([writer]) * 4096


ENDLESS = """
import itertools, sys
from pipeline.storage.local import LocalStorage
storage = LocalStorage(sys.argv[1], hard_links=sys.argv[2] == "True")
print("ready", flush=True)
for number in itertools.count():
    storage.create(f"parts/{number:05d}", b"x" * 3_000_000)
"""


def test_a_killed_writer_leaves_whole_files_only(storage):
    draw = random.Random(1)
    seen = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, storage.root, str(storage.hard_links)], stdout=subprocess.PIPE, text=True
        )
        with process:
            process.stdout.readline()
            time.sleep(0.02 + draw.random() * 0.2)
            process.send_signal(signal.SIGKILL)
        sizes = storage.list("parts")
        assert set(sizes.values()) <= {3_000_000}
        seen += len(sizes)
        storage.remove_tree("parts")
        storage.remove_tree("_attempts")
    assert seen > 0, "killed too early to tell anything"


def test_a_claim_of_the_dead_is_named_and_never_overruled(tmp_path):
    storage = LocalStorage(str(tmp_path), hard_links=False, claim_seconds=0.2)
    claim = tmp_path / "_attempts/claims/part"
    claim.parent.mkdir(parents=True)
    claim.touch()
    with pytest.raises(OutputError, match="claimed by an attempt that did not finish") as caught:
        storage.create("part", b"1")
    assert caught.value.details == (f"claim  {claim}",)
    assert not storage.exists("part")
    claim.unlink()
    assert storage.create("part", b"1")


def test_a_late_attempt_after_the_sweep_changes_nothing(storage):
    storage.create("part", b"1")
    storage.remove_tree("_attempts")
    assert not storage.create("part", b"2")
    assert storage.read("part") == b"1"


FULL = """
import resource, sys
from pipeline.storage.local import LocalStorage
from pipeline.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
storage = LocalStorage(sys.argv[1], hard_links=sys.argv[2] == "True")
try:
    storage.create("big", b"x" * 1_000_000)
except OutputError as error:
    print(error)
assert storage.create("small", b"x")
"""


def test_no_room_for_the_whole_file_means_no_file(storage):
    done = subprocess.run(
        [sys.executable, "-c", FULL, storage.root, str(storage.hard_links)], capture_output=True, text=True, check=True
    )
    assert "big cannot be written: File too large" in done.stdout
    assert "Free some space" in done.stdout
    assert {name for name in storage.list() if "claims" not in name} == {"small"}


def test_what_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        LocalStorage(str(tmp_path / "file")).create("a", b"1")
    with pytest.raises(OutputError, match=r"missing cannot be read: No such file"):
        LocalStorage(str(tmp_path)).read("missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        LocalStorage(str(tmp_path)).create("a", b"1")


@pytest.mark.parametrize("url", ["memory://out", "http://example.com/out", "hf://datasets/a/b", "nosuch://x"])
def test_other_protocols_are_refused(url):
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        open_storage(url)
    assert "s3, s3a, gs, gcs" in caught.value.hint


@pytest.mark.usefixtures("without_gcsfs")
def test_a_missing_package_is_named():
    with pytest.raises(MissingDependencyError, match="gs://bucket/out") as caught:
        open_storage("gs://bucket/out")
    assert "gcsfs" in caught.value.hint
