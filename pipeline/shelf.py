"""Base models on devices and the experts over them, of which a number are loaded at a time: what a manager manages."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import AdapterError, ConfigError, OverloadedError
from pipeline.metrics import AnswerMetrics
from pipeline.package import ExpertPackage
from pipeline.tracing import span

if TYPE_CHECKING:
    from pipeline.engine.requests import RequestBuilder
    from pipeline.engine.residents import ResidentExperts

ROOM_SECONDS = 60.0
_LOOK_SECONDS = 0.05  # sequences give an adapter back without a word to us


class BaseKey(NamedTuple):
    """What makes two loaded base models the same one."""

    digest: str
    dtype: str
    device: str
    quantization: str | None


@dataclass(frozen=True)
class Shelved:
    """An expert that can be put on its base model.

    Args:
        package: The expert; the engine calls it by its digest.
        base_path: Its base model's directory.
        key: Which loaded base model it belongs to.
    """

    package: ExpertPackage
    base_path: Path
    key: BaseKey


@dataclass(frozen=True)
class Base:
    """A base model on its device.

    `building` is held while a request is made, as its experts may share a tokenizer.
    """

    key: BaseKey
    path: Path
    residents: "ResidentExperts"
    building: threading.Lock = field(default_factory=threading.Lock)


class Shelf:
    """Loads base models once and experts when they are needed, and lets go what was used the longest ago.

    Any thread may call it. One thing is loaded at a time; meanwhile what is loaded answers.

    Args:
        max_loaded: At most this many experts are loaded, over all base models; None for any number.
        room_seconds: So long an expert waits for room that others have in use.
        metrics: Takes note of loads; None for nobody.

    `pinned` holds the experts that are not to be let go.
    """

    def __init__(
        self,
        max_loaded: int | None = None,
        *,
        room_seconds: float = ROOM_SECONDS,
        metrics: AnswerMetrics | None = None,
    ) -> None:
        self.pinned: set[tuple[BaseKey, str]] = set()
        self.changed = threading.Condition()
        self._max_loaded = max_loaded
        self._room_seconds = room_seconds
        self._metrics = metrics
        self._loading = threading.RLock()
        self._bases: dict[BaseKey, Base] = {}
        self._used: dict[tuple[BaseKey, str], int] = {}
        self._clock = itertools.count(1)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Have nothing loaded or let go by others meanwhile."""
        with self._loading:
            yield

    def bases(self) -> list[Base]:
        """The base models that are loaded, in the order they were."""
        with self.changed:
            return list(self._bases.values())

    def is_loaded(self, shelved: Shelved) -> bool:
        """Whether an expert is on its device."""
        base = self._base(shelved.key)
        return base is not None and shelved.package.digest in base.residents.resident()

    def try_acquire(self, shelved: Shelved) -> "tuple[Base, RequestBuilder] | None":
        """As `acquire`, where the expert is loaded; None, at once, where it is not."""
        base = self._base(shelved.key)
        if base is None or not base.residents.engine.is_alive:
            return None
        builder = base.residents.try_acquire(shelved.package.digest)
        if builder is None:
            return None
        self._touch(shelved)
        return base, builder

    def acquire(self, shelved: Shelved) -> "tuple[Base, RequestBuilder]":
        """Load an expert where it is not, and keep it until `release`.

        Raises:
            LoadError: The base model or the expert cannot be used.
            ConfigError: There is room for pinned experts only.
            OverloadedError: All that are loaded are in use, and stay so.
        """
        ready = self.try_acquire(shelved)
        if ready is not None:
            return ready
        with self._loading:
            ready = self.try_acquire(shelved)
            if ready is not None:
                return ready
            with span("expert.load", {"expert": shelved.package.label}):
                loaded = self._load(shelved)
        if self._metrics is not None:
            self._metrics.note_loads(shelved.package.manifest.name)
        return loaded

    def release(self, base: Base, shelved: Shelved) -> None:
        """Let an expert go again."""
        base.residents.release(shelved.package.digest)
        with self.changed:
            self.changed.notify_all()

    def remove(self, shelved: Shelved) -> None:
        """Wait until nobody uses an expert, and take it off; its base model goes with the last one."""
        with self._loading:
            while (base := self._base(shelved.key)) is not None and not self._try_remove(base, shelved.package.digest):
                self._wait()

    def close(self) -> None:
        """Free all devices. What is unfinished ends with an error."""
        with self._loading:
            for base in self.bases():
                self._drop(base)

    def _load(self, shelved: Shelved) -> "tuple[Base, RequestBuilder]":
        self._make_room(shelved.key)
        base = self._base(shelved.key)
        if base is not None and not base.residents.engine.is_alive:
            self._drop(base)
            base = None
        base = base or self._open(shelved)
        digest = shelved.package.digest
        try:
            base.residents.add(digest, shelved.package)
            builder = base.residents.acquire(digest)
        except BaseException:  # Ctrl-C too; it is raised again
            self._try_remove(base, digest)
            raise
        self._touch(shelved)
        return base, builder

    def _open(self, shelved: Shelved) -> Base:
        from pipeline.engine.runtime import open_experts

        key = shelved.key
        residents = open_experts(
            {}, shelved.base_path, device=key.device, dtype=key.dtype, quantization=key.quantization
        )
        base = Base(key, shelved.base_path, residents)
        with self.changed:
            self._bases[key] = base
        return base

    def _make_room(self, kept: BaseKey) -> None:
        """Let experts go until there is room for one more; the base model that it needs stays."""
        until = time.monotonic() + self._room_seconds
        while self._max_loaded is not None and (loaded := self._loaded()) and len(loaded) >= self._max_loaded:
            free = [one for one in loaded if one not in self.pinned]
            if not free:
                raise ConfigError(
                    f"all {len(loaded)} experts that may be loaded are pinned",
                    hint="Raise max_loaded_experts, or unload one.",
                )
            if any(self._try_remove(base, one[1], kept=kept) for one in free if (base := self._base(one[0]))):
                continue
            if time.monotonic() > until:
                raise OverloadedError(
                    f"there is no room for another expert: {len(loaded)} are in use",
                    hint="Ask again later, or raise max_loaded_experts.",
                )
            self._wait()

    def _loaded(self) -> list[tuple[BaseKey, str]]:
        """The experts on the devices, the one that was used the longest ago first."""
        loaded = [(base.key, digest) for base in self.bases() for digest in base.residents.resident()]
        return sorted(loaded, key=lambda one: self._used.get(one, 0))

    def _try_remove(self, base: Base, digest: str, *, kept: BaseKey | None = None) -> bool:
        """Take an expert off, and its base model with the last one; False, and nothing, where it is in use."""
        if base.residents.engine.is_alive:
            try:
                base.residents.remove(digest)
            except AdapterError:
                return False
        with self.changed:
            self._used.pop((base.key, digest), None)
        if base.key != kept and not base.residents.resident():
            self._drop(base)
        return True

    def _drop(self, base: Base) -> None:
        with self.changed:
            self._bases.pop(base.key, None)
        base.residents.engine.close()

    def _base(self, key: BaseKey) -> Base | None:
        with self.changed:
            return self._bases.get(key)

    def _touch(self, shelved: Shelved) -> None:
        with self.changed:
            self._used[shelved.key, shelved.package.digest] = next(self._clock)

    def _wait(self) -> None:
        with self.changed:
            self.changed.wait(_LOOK_SECONDS)
