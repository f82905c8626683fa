"""Shards as Ray Data blocks: one row a block, so that no block is ever split.

A row holds the shard's description (`shard`, JSON), its rows as they were read (`rows`, an Arrow IPC stream) and, where
the task that reads also prepares, what they ask (`prepared`, another one; see `prepared.py`). So a shard without rows
is a block like any other, every shard keeps its own schema, and Ray Data reads ahead of the workers under its
back-pressure and the bound of `read_ahead.py`.

Shards that follow each other are read by one task, a run, which hands on each as soon as it is read: a task costs the
driver milliseconds, and what the shards of a run share is opened and decoded once. `ONE_ROW_A_BLOCK` must be set in the
context of a dataset that is made of them, or Ray Data would put the small blocks of a task together.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.batch.parts import PartFormat
from pipeline.batch.preparing import PrepareJob, prepare_shard
from pipeline.batch.result import read_part
from pipeline.batch.shards import Shard
from pipeline.batch.source import read_shards
from pipeline.storage import Storage

BLOCK_SCHEMA = pa.schema([("shard", pa.string()), ("rows", pa.large_binary()), ("prepared", pa.large_binary())])
ONE_ROW_A_BLOCK = {"target_max_block_size": 1}  # bytes: no two rows fit
RUN_SHARDS = 64  # at most, in a run
RUNS_PER_READER = 8  # at least, so that the last runs end together


def plan_runs(shards: Sequence[Shard], num_readers: int) -> list[tuple[Shard, ...]]:
    """Which shards are read by one task.

    Args:
        shards: Those to read.
        num_readers: Tasks that read at a time.
    """
    size = max(1, min(RUN_SHARDS, len(shards) // (RUNS_PER_READER * num_readers)))
    return [tuple(shards[start : start + size]) for start in range(0, len(shards), size)]


class ShardDatasource(Datasource):
    """The shards of a plan that are still to be answered, one `ReadTask` a run.

    Args:
        runs: Those to read, from `plan_runs`.
        storage_options: Passed to the file system.
        columns: Those to read; None for all.
        prepare: What to prepare the rows with; None where workers do that.
    """

    def __init__(
        self,
        runs: Sequence[Sequence[Shard]],
        storage_options: Mapping[str, Any],
        columns: Sequence[str] | None = None,
        prepare: PrepareJob | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray does not annotate it
        self._runs = tuple(runs)
        self._storage_options = dict(storage_options)
        self._columns = columns
        self._prepare = prepare

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all shards, about."""
        return sum(shard_bytes(shard) for run in self._runs for shard in run)

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One task a run, whatever parallelism Ray would like: a shard must stay whole."""
        return [self._task(run) for run in self._runs]

    def _task(self, run: Sequence[Shard]) -> ReadTask:
        metadata = BlockMetadata(
            num_rows=len(run), size_bytes=sum(map(shard_bytes, run)), input_files=None, exec_stats=None
        )
        read = partial(run_blocks, run, self._storage_options, self._columns, self._prepare)
        return ReadTask(read, metadata, BLOCK_SCHEMA)


def run_blocks(
    run: Sequence[Shard],
    storage_options: Mapping[str, Any],
    columns: Sequence[str] | None = None,
    prepare: PrepareJob | None = None,
) -> Iterator[pa.Table]:
    """Read shards, or some of their columns, prepare their rows if told to, and wrap each as one block of one row.

    Raises:
        DatasetError: A file cannot be read.
        LoadError: What prepares cannot be loaded on this machine.
    """
    for shard, table in zip(run, read_shards(run, columns, storage_options), strict=True):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        block = {
            "shard": [shard.to_json()],
            "rows": [sink.getvalue().to_pybytes()],
            "prepared": [None if prepare is None else prepare_shard(prepare, shard, table)],
        }
        yield pa.table(block, schema=BLOCK_SCHEMA)


def shard_bytes(shard: Shard) -> int:
    """About how many bytes a shard's rows have, from the plan alone."""
    size = sum(item.stop - item.start for item in shard.slices)
    return size if shard.num_rows is None else size * 1024


class PartsDatasource(Datasource):
    """The committed parts of a job, one `ReadTask` each, in order.

    Args:
        storage: The output folder.
        names: The parts' names in it.
        form: How they are written.
    """

    def __init__(self, storage: Storage, names: Sequence[str], form: PartFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray does not annotate it
        self._storage = storage
        self._names = tuple(names)
        self._form = form

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before reading."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One task a part."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        schema = self._form.schema.remove_metadata()
        return [
            ReadTask(partial(_part_blocks, self._storage, name, self._form), metadata, schema) for name in self._names
        ]


def _part_blocks(storage: Storage, name: str, form: PartFormat) -> list[pa.Table]:
    return [read_part(storage, name, form)]
