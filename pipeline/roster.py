"""The experts that a manager knows: opened packages by name, on the shelf of what is loaded."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, InferenceError, UnknownModelError
from pipeline.package import ExpertPackage, TrustPolicy, check_together, fitting_base_model, model_digest, open_package
from pipeline.routing import AUTO, Router
from pipeline.shelf import BaseKey, Shelf, Shelved

if TYPE_CHECKING:
    from pipeline.engine.stats import EngineStats


@dataclass(frozen=True)
class ExpertInfo:
    """An expert that is loaded.

    Args:
        name: What the manager calls it.
        expert: `name@version`.
        digest: Its package's sha256.
        base: Its base model's name.
        kind: The method: lora, dora, ia3, lokr or adalora.
        rank: The largest rank of its matrices; None when it has none.
        num_bytes: What its tensors take on the device.
        last_used: When it was last asked; None for not yet.
        is_pinned: Whether it is never let go for others.
    """

    name: str
    expert: str
    digest: str
    base: str
    kind: str
    rank: int | None
    num_bytes: int
    last_used: datetime | None
    is_pinned: bool


@dataclass(frozen=True)
class BaseInfo:
    """A base model that is loaded.

    Args:
        name: Its directory's.
        digest: Its sha256.
        device, dtype, quantization: Where and how it is loaded.
        experts: The experts on it, by the manager's names.
        stats: What its engine is doing, and has done.
    """

    name: str
    digest: str
    device: str
    dtype: str
    quantization: str | None
    experts: tuple[str, ...]
    stats: "EngineStats"


@dataclass(frozen=True)
class Known:
    """An expert that prompts may name."""

    shelved: Shelved
    is_pinned: bool
    last_used: datetime | None = None

    @property
    def place(self) -> tuple[BaseKey, str]:
        """What its adapter is found by."""
        return self.shelved.key, self.shelved.package.digest


class Roster:
    """Knows experts by name, and sees that they go together. Any thread may call it.

    Args:
        shelf: Loads them.
        placing: `device`, `dtype` and `quantization` of those that are not opened with others.
        base_model, models, cache_dir, storage_options: See `Expert.load`.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        placing: Mapping[str, str | None],
        base_model: str | os.PathLike[str] | None = None,
        models: Mapping[str, str] | None = None,
        cache_dir: Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._shelf = shelf
        self._placing = dict(placing)
        self._base_model = base_model
        self._models = models
        self._cache_dir = cache_dir
        self._storage_options = storage_options
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._router: Router | None = None
        self._digests: dict[Path, str] = {}
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that are known, loaded or not."""
        return tuple(self._all())

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._is_closed

    def open(
        self,
        name: str,
        path: str | os.PathLike[str] | ExpertPackage,
        *,
        base_model: str | os.PathLike[str] | None,
        placing: Mapping[str, str | None],
        pin: bool,
        trust: TrustPolicy,
        allow_rollback: bool = False,
    ) -> Known:
        """Open a package and find its base model; nothing is loaded. See `ExpertManager.load_expert`."""
        from pipeline.engine.loader import placement
        from pipeline.engine.quantization import check_quantization

        if not name or name == AUTO:
            raise ConfigError(f"an expert cannot be called {name!r}", hint="Give it another name.")
        options, cache_dir = self._storage_options, self._cache_dir
        package = open_package(
            path, cache_dir=cache_dir, trust=trust, allow_rollback=allow_rollback, storage_options=options
        )
        found = fitting_base_model(
            package,
            base_model=base_model or self._base_model,
            models=self._models,
            cache_dir=cache_dir,
            storage_options=options,
        )
        chosen = {**self._placing, **{key: value for key, value in placing.items() if value is not None}}
        device, dtype = placement(found.path, device=chosen["device"], dtype=chosen["dtype"])
        digest = self._digest(found.path)
        key = BaseKey(digest, dtype, device, check_quantization(chosen["quantization"]))
        return Known(Shelved(package, found.path, key), pin)

    def add(self, opened: Mapping[str, Known]) -> list[ExpertInfo]:
        with self._shelf.quiet():
            self._check_open()
            before = self._all()
            everything = {**before, **opened}
            check_together([known.shelved.package.manifest for known in everything.values()])
            ordered = sorted(opened.items(), key=lambda item: _load_order(item[1].shelved.package))
            for name, known in ordered:
                if known.is_pinned:
                    self._shelf.pinned.add(known.place)
                base, _ = self._shelf.acquire(known.shelved)
                self._replace({**self._all(), name: known})
                self._shelf.release(base, known.shelved)
                if name in before:
                    self._let_go(before[name])
            return [info for name, known in ordered if (info := self._info(name, known)) is not None]

    def remove(self, name: str) -> None:
        """Forget an expert; see `ExpertManager.unload_expert`."""
        with self._shelf.quiet():
            gone = self.find(name)
            rest = {other: known for other, known in self._all().items() if other != name}
            check_together([known.shelved.package.manifest for known in rest.values()])
            self._replace(rest)
            self._let_go(gone)

    def close(self) -> None:
        """Forget all, and free all devices."""
        self._is_closed = True
        with self._shelf.quiet():
            self._replace({})
            self._shelf.close()

    def find(self, name: str) -> Known:
        """An expert by its name.

        Raises:
            UnknownModelError: There is none.
            InferenceError: All is closed.
        """
        self._check_open()
        with self._lock:
            known = self._known.get(name)
            if known is None:
                there = ", ".join(self._known) or "none"
                raise UnknownModelError(f"there is no expert {name!r}", hint=f"There are: {there}.")
            return known

    def note_use(self, name: str) -> None:
        """Say that an expert is asked."""
        with self._lock:
            if name in self._known:
                self._known[name] = replace(self._known[name], last_used=datetime.now(UTC))

    def router(self) -> Router:
        """Chooses among the experts.

        Raises:
            ManifestError: A router_hint is not one.
        """
        with self._lock:
            if self._router is None:
                self._router = Router({name: one.shelved.package.manifest.routing for name, one in self._known.items()})
            return self._router

    def infos(self) -> list[ExpertInfo]:
        """The experts that are loaded."""
        found = (self._info(name, known) for name, known in self._all().items())
        return [info for info in found if info is not None]

    def base_infos(self) -> list[BaseInfo]:
        """The base models that are loaded."""
        known = self._all()
        return [
            BaseInfo(
                name=base.path.name,
                digest=base.key.digest,
                device=base.key.device,
                dtype=base.key.dtype,
                quantization=base.key.quantization,
                experts=tuple(
                    name
                    for name, one in known.items()
                    if one.shelved.key == base.key and self._shelf.is_loaded(one.shelved)
                ),
                stats=base.residents.engine.stats(),
            )
            for base in self._shelf.bases()
        ]

    def _all(self) -> dict[str, Known]:
        with self._lock:
            return dict(self._known)

    def _digest(self, path: Path) -> str:
        place = path.resolve()
        if place not in self._digests:
            self._digests[place] = model_digest(place)
        return self._digests[place]

    def _replace(self, known: dict[str, Known]) -> None:
        with self._lock:
            self._known = known
            self._router = None
            self._shelf.pinned = {one.place for one in known.values() if one.is_pinned}

    def _let_go(self, gone: Known) -> None:
        """Take an expert off its device that no name leads to any more."""
        with self._lock:
            is_named = any(known.place == gone.place for known in self._known.values())
        if not is_named:
            self._shelf.remove(gone.shelved)

    def _info(self, name: str, known: Known) -> ExpertInfo | None:
        base = next((base for base in self._shelf.bases() if base.key == known.shelved.key), None)
        info = None if base is None else base.residents.info(known.shelved.package.digest)
        if base is None or info is None:
            return None
        package = known.shelved.package
        return ExpertInfo(
            name=name,
            expert=package.label,
            digest=package.digest,
            base=base.path.name,
            kind=info.kind,
            rank=info.rank,
            num_bytes=info.num_bytes,
            last_used=known.last_used,
            is_pinned=known.is_pinned,
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise InferenceError("the manager is closed", hint="Make another ExpertManager.")


def _load_order(package: ExpertPackage) -> float:
    order = package.manifest.constraints.load_order
    return float("inf") if order is None else order
