"""Inputs and outputs of jobs of any size, made in seconds: files with real footers, commits with real receipts."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.commit import JobOutput
from pipeline.batch.layout import JOB, part_name, receipt_name
from pipeline.batch.parts import AnsweredRow, PartFormat, encode_part
from pipeline.batch.receipts import PACK_RECEIPTS, Receipt, write_pack
from pipeline.batch.rows import Row
from pipeline.engine.types import Completion
from pipeline.storage.local import LocalStorage

PART_ROWS = 4


def make_files(folder: Path, num_files: int, rows: int) -> Path:
    """Parquet files of the same rows, each with its own name and footer; their content is on the disk once.

    Args:
        folder: Where to; what is there already is kept.
        num_files: How many there are to be.
        rows: Rows in each.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "questions-00000.parquet"
    if not first.exists():
        table = pa.table(
            {
                "id": [f"row {number}" for number in range(rows)],
                "prompt": [f"How many users in city {number} are older than {number % 90}?" for number in range(rows)],
            }
        )
        pq.write_table(table, first, compression="zstd")
    for number in range(1, num_files):
        path = folder / f"questions-{number:05d}.parquet"
        if not path.exists():
            os.link(first, path)
    return folder


def output_of(folder: Path, num_shards: int) -> JobOutput:
    """The output of a job of so many shards."""
    return JobOutput(LocalStorage(str(folder)), {"seed": 0, "columns": {"prompt": "prompt"}}, "parquet", num_shards)


def make_commits(folder: Path, num_shards: int, *, packed: bool) -> Path:
    """The output of a job whose shards are all committed, and which was killed before it was finished.

    The files are those that workers and driver write, but nothing waits for the disk.

    Args:
        folder: Where to; left as it is when it is there.
        num_shards: Shards of the job.
        packed: Whether the driver had packed the receipts, as it does while it runs.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    output = output_of(folder, num_shards)
    data = _part()
    receipt = output.receipt_of(0, data)
    for name in (part_name(0, "parquet"), receipt_name(0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    receipts: list[Receipt] = []
    for shard in range(num_shards):
        one = replace(receipt, shard=shard, path=part_name(shard, "parquet"))
        (folder / one.path).write_bytes(data)
        (folder / receipt_name(shard)).write_text(one.to_json())
        receipts.append(one)
    for chunk in _chunks(receipts) if packed else ():
        write_pack(output.storage, chunk)
    (folder / JOB).write_bytes(output.job())
    return folder


def _chunks(receipts: list[Receipt]) -> Iterator[list[Receipt]]:
    for start in range(0, len(receipts), PACK_RECEIPTS):
        yield receipts[start : start + PACK_RECEIPTS]


def _part() -> bytes:
    rows = [
        AnsweredRow(Row(f"x#{number}", {"prompt": f"{number}"}, None), Completion(f"{number}", "answer", "stop", 9, 5))
        for number in range(PART_ROWS)
    ]
    return encode_part(rows, PartFormat(kind="parquet", inputs=pa.schema([("prompt", pa.string())]), is_loose=False))
