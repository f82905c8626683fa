"""Shards as Ray Data blocks: one row a block, so that no block is ever split.

A row holds the shard's description (`shard`, JSON) and its rows as they were read (`rows`, an Arrow IPC stream). So a
shard without rows is a block like any other, every shard keeps its own schema, and Ray Data reads ahead of the workers
under its own back-pressure.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.batch.parts import PartFormat
from pipeline.batch.result import read_part
from pipeline.batch.shards import Shard
from pipeline.batch.source import read_shard
from pipeline.storage import Storage

BLOCK_SCHEMA = pa.schema([("shard", pa.string()), ("rows", pa.large_binary())])


class ShardDatasource(Datasource):
    """The shards of a plan that are still to be answered, one `ReadTask` each.

    Args:
        shards: Those to read.
        storage_options: Passed to the file system.
    """

    def __init__(self, shards: Sequence[Shard], storage_options: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray does not annotate it
        self._shards = tuple(shards)
        self._storage_options = dict(storage_options)

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all shards, about."""
        return sum(shard_bytes(shard) for shard in self._shards)

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One task a shard, whatever parallelism Ray would like: a shard must stay whole."""
        return [self._task(shard) for shard in self._shards]

    def _task(self, shard: Shard) -> ReadTask:
        metadata = BlockMetadata(num_rows=1, size_bytes=shard_bytes(shard), input_files=shard.paths, exec_stats=None)
        return ReadTask(partial(shard_blocks, shard, self._storage_options), metadata, BLOCK_SCHEMA)


def shard_blocks(shard: Shard, storage_options: Mapping[str, Any]) -> list[pa.Table]:
    """Read a shard and wrap it as one block of one row."""
    table = read_shard(shard, storage_options=storage_options)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [pa.table({"shard": [shard.to_json()], "rows": [sink.getvalue().to_pybytes()]}, schema=BLOCK_SCHEMA)]


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
