"""A job whose disk is full: an error that says so, and when there is room again the same command goes on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.verify import verify
from pipeline.errors import OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.deaths import drive_here

NUM_ROWS = 400


def mount(*arguments: str) -> None:
    subprocess.run([shutil.which("mount") or "", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a few parts."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root, and not every container, may mount a disk")
    yield place
    subprocess.run([shutil.which("umount") or "", str(place)], check=True, timeout=30)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_job_on_a_full_disk_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    prompts = [f"question {number} {os.urandom(40).hex()}" for number in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": range(NUM_ROWS), "prompt": prompts}), tmp_path / "in.parquet")
    config = BatchConfig.from_options(
        dataset=tmp_path / "in.parquet",
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=small_disk / "out",
        shard_rows=20,
        lease_seconds=1,  # the first driver cannot give it back on a full disk, and its process is this one
    )
    job = prepare(config, open_experts(config))
    with pytest.raises(OutputError, match="No space left on device") as caught:
        drive_here(job, mended=True)
    assert "Free some space" in (caught.value.hint or "")
    there = {path.name: path.read_bytes() for path in (small_disk / "out").glob("part-*")}
    assert 0 < len(there) < NUM_ROWS // 20
    mount("-o", "remount,size=4m", str(small_disk))
    drive_here(job, mended=True)
    found = verify(LocalStorage(str(small_disk / "out")))
    assert (found.problems, found.rows, found.errors) == ((), NUM_ROWS, 0)
    assert all((small_disk / "out" / name).read_bytes() == data for name, data in there.items())
    assert not (small_disk / "out" / "_attempts").exists()
