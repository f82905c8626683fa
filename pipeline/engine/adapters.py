"""Many experts over one base model in one batch.

The bank owns the adapters on the device. It puts modules that know them into the base model, tells these before each
forward which rows are whose, and keeps the adapters within a budget.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.engine.adapted_modules import AdaptedModule, adapted_module, is_replayable, num_bytes_held
from pipeline.engine.adapter_step import Buffers, CurrentStep, Form, Slice, StepRows
from pipeline.engine.deltas import AdapterReader, Delta, EmbeddingDelta, LinearDelta
from pipeline.engine.foreign import memory_told
from pipeline.engine.loader import BaseModel
from pipeline.engine.passing_thread import in_passing_thread
from pipeline.errors import AdapterError
from pipeline.package import ExpertPackage

__all__ = ["AdapterBank", "AdapterInfo", "Slice"]


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a resident adapter.

    Args:
        name: What the caller calls it.
        digest: The package's.
        kind: The method: lora, dora, ia3, lokr or adalora.
        rank: The largest rank of its pairs of matrices; None when it has none.
        num_bytes: What its tensors take, their low-rank pairs filled up to a power of two.
        is_pinned: Whether it is never evicted.
        is_in_use: Whether a sequence is running with it.
        last_used: Counts uses of any adapter; the smallest was used the longest ago.
    """

    name: str
    digest: str
    kind: str
    rank: int | None
    num_bytes: int
    is_pinned: bool
    is_in_use: bool
    last_used: int


@dataclass
class _Resident:
    """An adapter in the bank."""

    digest: str
    kind: str
    rank: int | None
    num_bytes: int
    paths: tuple[str, ...]
    is_replayable: bool
    is_pinned: bool = False
    num_users: int = 0
    last_used: int = 0


class AdapterBank:
    """The adapters that share one base model.

    Load, unload and ask from any thread; `begin` and the forward belong to the engine's thread.

    Args:
        base: The model, whose touched modules are exchanged in place until `close`.
        max_adapters: How many adapters may be resident; None for any number.
        max_bytes: What their tensors may take together; None for any amount.
    """

    def __init__(self, base: BaseModel, *, max_adapters: int | None = None, max_bytes: int | None = None) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._loading = threading.Lock()  # one adapter is read at a time, outside of the other lock
        self._reader = AdapterReader(base, self._plain_module)
        self._current = CurrentStep(base.device)
        self._token_buffers: Buffers = {}
        self._row_buffers: Buffers = {}
        self._modules: dict[str, AdaptedModule] = {}
        self._residents: dict[str, _Resident] = {}
        self._clock = itertools.count(1)
        self._version = 0

    @contextmanager
    def unchanged(self) -> Iterator[int]:
        """Keep loads and unloads waiting; gives the number of those so far.

        A CUDA graph that was captured under another number must not be replayed: it reads tensors that are gone.
        """
        with self._lock:
            yield self._version

    def is_replayable(self, experts: Iterable[str | None]) -> bool:
        """Whether the rows of these experts may be part of a step that is recorded once and replayed.

        Raises:
            AdapterError: One is not resident.
        """
        with self._lock:
            return all(self._resident(name).is_replayable for name in experts if name is not None)

    def load(self, name: str, package: ExpertPackage, *, pin: bool = False) -> AdapterInfo:
        """Make an adapter resident; where it is already, it only counts as used.

        Args:
            name: What the slices of a step call it.
            package: Whose adapter it is.
            pin: Never evict it.

        Raises:
            AdapterError: It does not fit the base model or cannot be applied per row, the bank is full of adapters
                that may not go, or another package has the name.
            OutOfMemoryError: The device has no memory for it.
        """
        with self._lock:
            if self._touch(name, package, pin=pin):
                return self.info(name)
        return self._load(name, package, pin)

    @in_passing_thread
    @memory_told(
        "there is too little memory on the device for one more adapter",
        hint="Hold fewer at a time (max_loaded_experts, max_resident_experts), or lower kv_cache_bytes.",
    )
    def _load(self, name: str, package: ExpertPackage, pin: bool) -> AdapterInfo:
        with self._loading, torch.inference_mode(False), torch.no_grad():
            with self._lock:
                if self._touch(name, package, pin=pin):
                    return self.info(name)
            deltas = self._reader.read(package)
            num_bytes = sum(num_bytes_held(delta) for delta in deltas.values())
            with self._lock:
                self._make_room(name, num_bytes)
                resident = _Resident(
                    package.digest,
                    package.adapter.kind,
                    _rank(deltas),
                    num_bytes,
                    tuple(deltas),
                    all(is_replayable(delta) for delta in deltas.values()),
                )
                self._install(name, deltas)
                self._residents[name] = resident
                self._touch(name, package, pin=pin)
                return self.info(name)

    def unload(self, name: str) -> None:
        """Take an adapter out, pinned or not.

        Raises:
            AdapterError: It is not resident, or in use.
        """
        with self._lock:
            resident = self._resident(name)
            if resident.num_users:
                raise AdapterError(
                    f"the adapter {name} is in use by {resident.num_users} sequences",
                    hint="Wait until they are finished, or cancel them.",
                )
            self._remove(name)

    def pin(self, name: str) -> None:
        """Never evict an adapter.

        Raises:
            AdapterError: It is not resident.
        """
        with self._lock:
            self._resident(name).is_pinned = True

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            AdapterError: It is not resident.
        """
        with self._lock:
            self._resident(name).is_pinned = False

    def acquire(self, name: str) -> None:
        """Count one more sequence that runs with an adapter: it is neither evicted nor unloaded until `release`.

        Raises:
            AdapterError: It is not resident.
        """
        with self._lock:
            resident = self._resident(name)
            resident.num_users += 1
            resident.last_used = next(self._clock)

    def release(self, name: str) -> None:
        """Count one sequence less.

        Raises:
            AdapterError: It is not resident, or no sequence runs with it.
        """
        with self._lock:
            resident = self._resident(name)
            if not resident.num_users:
                raise AdapterError(
                    f"the adapter {name} was released more often than acquired",
                    hint="Release once for each acquire.",
                )
            resident.num_users -= 1

    def names(self) -> tuple[str, ...]:
        """The resident adapters, in the order they were loaded."""
        with self._lock:
            return tuple(self._residents)

    def info(self, name: str) -> AdapterInfo:
        """What is known of a resident adapter.

        Raises:
            AdapterError: It is not resident.
        """
        with self._lock:
            resident = self._resident(name)
            return AdapterInfo(
                name=name,
                digest=resident.digest,
                kind=resident.kind,
                rank=resident.rank,
                num_bytes=resident.num_bytes,
                is_pinned=resident.is_pinned,
                is_in_use=resident.num_users > 0,
                last_used=resident.last_used,
            )

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._residents

    def begin(
        self,
        tokens: Sequence[Slice],
        rows: Sequence[Slice],
        *,
        form: Form | None = None,
        is_replayed: bool = False,
    ) -> None:
        """Say which rows of the next forward are whose.

        Args:
            tokens: A partition of the packed tokens, in order. An empty one lets the base model alone answer any
                number of tokens.
            rows: A partition of the rows that reach the head: one for each sequence that draws a token.
            form: How to compute, for tests and benchmarks; None chooses by cost.
            is_replayed: The forward is recorded or replayed; see `StepRows`.

        Raises:
            AdapterError: An adapter is not resident, or the slices are no partition.
        """
        device = self._base.device
        with self._lock:
            step_tokens = StepRows(tokens, device, form=form, buffers=self._token_buffers, is_replayed=is_replayed)
            step_rows = StepRows(rows, device, form=form, buffers=self._row_buffers, is_replayed=is_replayed)
            for name in step_tokens.experts | step_rows.experts:
                self._resident(name).last_used = next(self._clock)
            self._current.tokens, self._current.rows = step_tokens, step_rows

    def close(self) -> None:
        """Put the base model's own modules back, and forget all adapters."""
        with self._lock:
            for path, module in self._modules.items():
                self._put(path, module.plain)
            self._modules.clear()
            self._residents.clear()
            self._current.reset()
            self._forget_layout()

    def _touch(self, name: str, package: ExpertPackage, *, pin: bool) -> bool:
        """Count a use of an adapter that is resident already."""
        resident = self._residents.get(name)
        if resident is None:
            return False
        if resident.digest != package.digest:
            raise AdapterError(
                f"the name {name} is taken by another package",
                details=(f"resident: sha256 {resident.digest}", f"to load: sha256 {package.digest}"),
                hint="Unload it first, or give this one another name.",
            )
        resident.is_pinned = resident.is_pinned or pin
        resident.last_used = next(self._clock)
        return True

    def _resident(self, name: str) -> _Resident:
        resident = self._residents.get(name)
        if resident is None:
            known = ", ".join(self._residents) or "none"
            raise AdapterError(
                f"the adapter {name} is not loaded", details=(f"loaded: {known}",), hint="Load it first."
            )
        return resident

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Evict what was used the longest ago until an adapter fits, or nothing at all when it cannot fit."""
        free = sorted(
            (resident.last_used, other)
            for other, resident in self._residents.items()
            if not resident.is_pinned and not resident.num_users
        )
        evicted: list[str] = []
        while not self._fits(num_bytes, evicted):
            if not free:
                raise self._full(name, num_bytes)
            evicted.append(free.pop(0)[1])
        for other in evicted:
            self._remove(other)

    def _fits(self, num_bytes: int, evicted: list[str]) -> bool:
        kept = [resident.num_bytes for name, resident in self._residents.items() if name not in evicted]
        is_number_ok = self._max_adapters is None or len(kept) < self._max_adapters
        return is_number_ok and (self._max_bytes is None or sum(kept) + num_bytes <= self._max_bytes)

    def _full(self, name: str, num_bytes: int) -> AdapterError:
        held = sum(resident.num_bytes for resident in self._residents.values())
        users = {True: "in use", False: "pinned"}
        return AdapterError(
            f"there is no room for the adapter {name}, and none that may be evicted",
            details=(
                f"it takes {num_bytes:,} bytes; {len(self._residents)} adapters take {held:,}",
                f"max_adapters {self._max_adapters}, max_bytes {self._max_bytes}",
                *(f"{other}: {users[resident.num_users > 0]}" for other, resident in list(self._residents.items())[:8]),
            ),
            hint="Raise max_adapters or max_bytes, unpin an adapter, or wait until sequences are finished.",
        )

    def _install(self, name: str, deltas: dict[str, Delta]) -> None:
        touched: list[AdaptedModule] = []
        try:
            for path, delta in deltas.items():
                module = self._module(path, delta)
                touched.append(module)
                module.install(name, delta)
        except BaseException:  # whatever stops it, Ctrl-C too, no half of an adapter stays; it is raised again
            for module in touched:
                module.remove(name)
            raise
        self._forget_layout()

    def _remove(self, name: str) -> None:
        for path in self._residents.pop(name).paths:
            self._modules[path].remove(name)
        for step in (self._current.tokens, self._current.rows):
            step.has_lost_an_expert = step.has_lost_an_expert or name in step.experts
        self._forget_layout()

    def _forget_layout(self) -> None:
        self._token_buffers.clear()
        self._row_buffers.clear()
        self._version += 1

    def _module(self, path: str, delta: Delta) -> AdaptedModule:
        """The module that applies adapters at a path, put there when the first one needs it."""
        module = self._modules.get(path)
        if module is None:
            plain = self._base.model.get_submodule(path)
            is_head = plain is self._base.model.get_output_embeddings()
            module = self._modules[path] = adapted_module(plain, delta, self._current, is_head=is_head)
            self._put(path, module)
        return module

    def _plain_module(self, path: str) -> nn.Module:
        module: nn.Module = self._base.model.get_submodule(path)
        return module.plain if isinstance(module, AdaptedModule) else module

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._base.model.get_submodule(parent), name, module)


def _rank(deltas: dict[str, Delta]) -> int | None:
    """The largest rank of the low-rank pairs."""
    ranks = [
        delta.low_rank[1].shape[0]
        for delta in deltas.values()
        if isinstance(delta, LinearDelta | EmbeddingDelta) and delta.low_rank is not None
    ]
    return max(ranks, default=None)
