"""Whatever files there are: every row is in one shard, in order, and the shards read in runs give the same rows."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.blocks import RUN_SHARDS, RUNS_PER_READER, plan_runs
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import Shard
from pipeline.batch.source import plan_shards, read_shard, read_shards
from tests.batch.outputs import memory_folder

FORMATS = st.sampled_from(["parquet", "arrow", "csv", "jsonl"])


def write(path: Path, kind: str, numbers: list[int], group_rows: int) -> None:
    table = pa.table({"n": pa.array(numbers, pa.int64()), "q": [f"question {number}" for number in numbers]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=group_rows)
    elif kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=group_rows)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([table.column_names, *zip(*table.to_pydict().values(), strict=True)])
    else:
        path.write_text("".join(f'{{"n": {number}, "q": "question {number}"}}\n' for number in numbers))


@settings(max_examples=40, deadline=None)
@given(
    kind=FORMATS,
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    group_rows=st.integers(1, 50),
    shard_rows=st.integers(1, 30),
    dropped=st.sets(st.integers(0, 60)),
)
def test_every_row_is_in_one_shard_and_in_order(
    kind: str, sizes: list[int], group_rows: int, shard_rows: int, dropped: set[int]
) -> None:
    with memory_folder() as folder:
        first = 0
        for number, size in enumerate(sizes):
            write(folder / f"{number}.{kind}", kind, list(range(first, first + size)), group_rows)
            first += size
        plan = plan_shards(folder, shard_rows=shard_rows)
        assert plan == plan_shards(str(folder), shard_rows=shard_rows), "the same every time"
        assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
        tables = list(read_shards(plan.shards))
        rows = [row for shard, table in zip(plan.shards, tables, strict=True) for row in iter_rows(shard, table)]
        assert [int(row.values["n"]) for row in rows] == list(range(first))
        assert len({row.identity for row in rows}) == first
        if kind != "jsonl":
            assert all(0 < table.num_rows <= shard_rows for table in tables)
        # a job that is continued reads what is left of them
        left = [shard for shard in plan.shards if shard.index not in dropped]
        for shard, table in zip(left, read_shards(left), strict=True):
            assert table.equals(tables[shard.index])
            assert table.equals(read_shard(shard))


@given(st.integers(0, 3000), st.integers(1, 40))
def test_runs_hold_every_shard_once_and_leave_no_reader_idle(num_shards: int, num_readers: int) -> None:
    shards = [Shard(index, "parquet", ()) for index in range(num_shards)]
    runs = plan_runs(shards, num_readers)
    assert [shard for run in runs for shard in run] == shards
    assert all(0 < len(run) <= RUN_SHARDS for run in runs)
    assert len(runs) >= min(num_shards, RUNS_PER_READER * num_readers)
