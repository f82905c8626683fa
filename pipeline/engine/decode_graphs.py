"""Steps of one shape recorded once and replayed with other numbers: on CUDA as CUDA graphs.

A decode step of a small model is a few thousand kernels of a few microseconds each; launching them one by one takes
longer than computing them. A recorded step is launched as one. It runs no Python, so what it computes may depend on
the numbers in its inputs alone.
"""

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from pipeline.engine.foreign import is_out_of_memory
from pipeline.engine.paged_plan import Int64s
from pipeline.engine.transfer import Shapes, packed, unpacked

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64  # kept; each takes a few megabytes

_CAPTURING = threading.Lock()  # torch captures one graph at a time in a process

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
Compute = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass
class _Graph:
    """A shape of steps.

    Args:
        inputs: The numbers of the step, at an address that stays.
        replay: Computes the step from them; None before it is recorded.
    """

    inputs: torch.Tensor
    replay: Callable[[], None] | None = None


class DecodeGraphs:
    """Computes steps: the first of a shape eagerly, which also warms it up, the others by a record of the second.

    Args:
        compute: From the step's numbers, in the shapes they were given in, to its scores, [num_scored, vocab_size].
        record: Records the work of a function, which it may run or not, and returns what does that work again.
        device: Of the model.
    """

    def __init__(self, compute: Compute, record: Recorder, device: torch.device) -> None:
        self._compute = compute
        self._record: Recorder | None = record
        self._device = device
        self._graphs: dict[Hashable, _Graph] = {}  # those used last at the end
        self._scores: dict[int, torch.Tensor] = {}  # by their number; shared, so that graphs share memory

    @property
    def num_recorded(self) -> int:
        """How many shapes are recorded."""
        return sum(graph.replay is not None for graph in self._graphs.values())

    def run(self, arrays: Sequence[Int64s], key: Hashable) -> torch.Tensor:
        """Compute one step.

        Args:
            arrays: Its numbers; as many scores are wanted as the first one has.
            key: All else that decides which operations it takes.

        Returns:
            The scores, [num_scored, vocab_size]; the next call overwrites them.
        """
        shapes = tuple(array.shape for array in arrays)
        numbers = packed(arrays, self._device)
        graph = self._graphs.pop((key, shapes), None)
        is_new = graph is None
        if graph is None:
            graph = _Graph(torch.empty_like(numbers, device=self._device))
        self._graphs[key, shapes] = graph
        while len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph.inputs.copy_(numbers, non_blocking=True)
        if not is_new and graph.replay is None:
            graph.replay = self._recorded(graph, shapes)
        if graph.replay is None:
            self._run(graph, shapes)
        else:
            graph.replay()
        return self._scores[shapes[0][0]]

    def clear(self) -> None:
        """Forget all records and the memory that they hold."""
        self._graphs.clear()
        self._scores.clear()

    def _run(self, graph: _Graph, shapes: Shapes) -> None:
        scores = self._compute(unpacked(graph.inputs, shapes))
        if len(scores) not in self._scores:
            self._scores[len(scores)] = torch.empty_like(scores)
        self._scores[len(scores)].copy_(scores)

    def _recorded(self, graph: _Graph, shapes: Shapes) -> Callable[[], None] | None:
        if self._record is None:
            return None
        try:
            return self._record(lambda: self._run(graph, shapes))
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.clear()
                raise
            self._record = None
            logger.warning(
                "steps of this model cannot be recorded, and run eagerly, which is slower: %s",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            return None


class CudaRecorder:
    """Records work as CUDA graphs, which share their memory: one is replayed at a time.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._last: torch.cuda.CUDAGraph | None = None  # kept, so that the memory it shares stays theirs

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work, which is not run, and return what runs it."""
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        with (
            _CAPTURING,
            torch.cuda.device(self._stream.device),
            torch.cuda.stream(torch.cuda.current_stream(self._stream.device)),  # comes back when a capture fails
            # Other threads may load adapters meanwhile; they must not spoil the capture.
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        self._last = graph
        return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records steps on a device; None where nothing is gained by it."""
    return CudaRecorder(device) if device.type == "cuda" else None
