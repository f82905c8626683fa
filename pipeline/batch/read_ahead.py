"""How many shards are read ahead of the workers of a job.

Ray Data bounds what waits by bytes, as a share of the object store. But a small block is in the driver's own memory,
and a job may have a hundred thousand of them: so what waits is bounded by number, too. The bound is one more policy of
back-pressure beside Ray Data's own, which hold as ever. Where it is reached, tasks that read stop in the middle of
their runs, and no further one is begun, until workers have taken something.

Ray Data keeps a way out of every policy, so that no job stands still: of tasks that have handed on nothing for ten
seconds it takes one shard all the same. So where shards take longer than that, what waits may grow by the rest of the
runs that are being read, and by six shards a minute while no worker is up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator
    from ray.data._internal.execution.resource_manager import ResourceManager
    from ray.data._internal.execution.streaming_executor_state import Topology

WAITING_PER_WORKER = 8  # Ray Data looks ten times a second, and the fastest worker takes one or two shards meanwhile
LEAST_WAITING = 32  # some seconds of it: a file is opened, or a large row group decoded, before the next shard is there


def most_waiting(num_workers: int) -> int:
    """How many shards may wait, beside those that workers were sent.

    Args:
        num_workers: Workers at most.
    """
    return max(LEAST_WAITING, WAITING_PER_WORKER * num_workers)


class WaitingShards(BackpressurePolicy):
    """Bounds the blocks that wait for a pool of actors, whatever their size.

    Args:
        data_context: See `BackpressurePolicy`.
        topology: See `BackpressurePolicy`.
        resource_manager: See `BackpressurePolicy`.
        most: Blocks that may wait for the pool.
    """

    def __init__(
        self, data_context: DataContext, topology: "Topology", resource_manager: "ResourceManager", *, most: int
    ) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._most = most

    def can_add_input(self, op: "PhysicalOperator") -> bool:
        """Whether another task may begin to read."""
        room = self._room(op)
        return room is None or room > 0

    def max_task_output_bytes_to_read(self, op: "PhysicalOperator") -> int | None:
        """How many bytes may be taken from the tasks that read: as many blocks as there is room for, by their mean."""
        room = self._room(op)
        if room is None:
            return None
        # Of the first block nobody knows the size: one byte is one block.
        return max(1, int(room * (op.metrics.average_bytes_per_output or 0))) if room > 0 else 0

    def _room(self, op: "PhysicalOperator") -> int | None:
        """Blocks that may be added to those that wait; None for what does not feed a pool."""
        pools = [taker for taker in op.output_dependencies if taker.get_autoscaling_actor_pools()]
        if not pools:
            return None
        return self._most - sum(self._topology[pool].total_enqueued_input_blocks() for pool in pools)


@contextmanager
def read_at_most(num_shards: int) -> Iterator[None]:
    """Of datasets made in here, at most so many blocks wait for a pool of actors.

    Args:
        num_shards: Blocks that may wait.
    """
    context, key = DataContext.get_current(), ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    before = context.get_config(key)
    policies = ENABLED_BACKPRESSURE_POLICIES if before is None else before
    context.set_config(key, [*policies, partial(WaitingShards, most=num_shards)])
    try:
        yield
    finally:
        if before is None:
            context.remove_config(key)
        else:
            context.set_config(key, before)
