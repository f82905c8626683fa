"""Experts over one running engine: the tokenizer of each, and its adapter while it is needed."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.engine.adapters import AdapterBank, AdapterInfo
from pipeline.engine.loader import load_tokenizer, tokenizer_key
from pipeline.engine.packed import PackedEngine
from pipeline.engine.requests import RequestBuilder
from pipeline.engine.soft_prompts import load_soft_prompts
from pipeline.errors import AdapterError, InferenceError, OverloadedError, TokenizerError, UnknownModelError
from pipeline.package import ExpertPackage

ROOM_SECONDS = 60.0
_LOOK_SECONDS = 0.05  # sequences give an adapter back without a word to us


class ResidentExperts:
    """The experts that requests may name, of which some are on the device at a time.

    Any thread may call it. An expert is loaded when it is first needed; where the device is full, the one that was used
    the longest ago goes, unless it is pinned or in use.

    Args:
        engine: Answers; it has an adapter bank, and only this object loads adapters into it.
        packages: The experts, by the names they shall have.
        max_resident: At most this many adapters are on the device; None for all. The bank's own bound is the same.
        options: Options for every request of an expert, by its name; see `RequestBuilder`.
        room_seconds: So long an expert waits for room that others have in use.

    Raises:
        AdapterError: The engine holds one merged expert, and no others.
    """

    def __init__(
        self,
        engine: PackedEngine,
        packages: Mapping[str, ExpertPackage],
        *,
        max_resident: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        room_seconds: float = ROOM_SECONDS,
    ) -> None:
        if engine.bank is None:
            raise AdapterError("the engine holds one merged expert", hint="Load it with load_experts.")
        self.engine = engine
        self.packages = dict(packages)
        self.loads: dict[str, int] = dict.fromkeys(self.packages, 0)  # how often each adapter was put on the device
        self._bank: AdapterBank = engine.bank
        self._max_resident = max_resident
        self._options = dict(options or {})
        self._room_seconds = room_seconds
        self._loading = threading.Lock()
        self._builders: dict[str, RequestBuilder] = {}
        self._tokenizers: dict[tuple[str, ...], Any] = {(): engine.tokenizer}

    def add(self, name: str, package: ExpertPackage) -> None:
        """Let requests name one more expert; it is loaded when it is first needed."""
        self.packages[name] = package
        self.loads.setdefault(name, 0)

    def remove(self, name: str) -> None:
        """Take an expert off the device, and forget it.

        Raises:
            AdapterError: It is in use; nothing has changed.
        """
        with self._loading:
            if name in self._bank:
                self._bank.unload(name)
            self._builders.pop(name, None)
            self.packages.pop(name, None)

    def load(self, name: str, *, pin: bool = False) -> RequestBuilder:
        """Make an expert ready to answer, and the builder of its requests.

        Args:
            name: The expert's.
            pin: Keep its adapter on the device for ever.

        Raises:
            LoadError: The tokenizer, the adapter or a soft prompt cannot be used.
            OverloadedError: The device is full of experts in use, and stays so.
            UnknownModelError: There is no expert of that name.
        """
        builder = self.acquire(name)
        try:
            if pin:
                self._bank.pin(name)
        finally:
            self.release(name)
        return builder

    def acquire(self, name: str) -> RequestBuilder:
        """Load an expert where it is not, and keep it on the device until `release`; raises as `load`."""
        self._check_alive()
        ready = self.try_acquire(name)
        if ready is not None:
            return ready
        with self._loading:
            builder = self._builder(name)
            until = time.monotonic() + self._room_seconds
            while not self._try_load(name):
                self._check_alive()
                if time.monotonic() > until:
                    raise OverloadedError(
                        f"there is no room for the expert {name}: {self._max_resident} others are in use",
                        hint="Ask again later, or raise max_resident_experts.",
                    )
                time.sleep(_LOOK_SECONDS)
            self._bank.acquire(name)  # nobody else loads, so that nothing has evicted it meanwhile
            return builder

    def try_acquire(self, name: str) -> RequestBuilder | None:
        """As `acquire`, where the expert is on the device; None, at once, where it is not."""
        builder = self._builders.get(name)
        if builder is None or name not in self._bank:
            return None
        try:
            self._bank.acquire(name)
        except AdapterError:
            return None  # it was evicted in this moment
        return builder

    def release(self, name: str) -> None:
        """Let an expert go again."""
        try:
            self._bank.release(name)
        except AdapterError:
            if self.engine.is_alive:  # else everything has been let go
                raise

    @contextmanager
    def held(self, name: str) -> Iterator[RequestBuilder]:
        """`acquire`, and `release` at the end."""
        builder = self.acquire(name)
        try:
            yield builder
        finally:
            self.release(name)

    def info(self, name: str) -> AdapterInfo | None:
        """What is known of an expert on the device; None where it is not there."""
        try:
            return self._bank.info(name)
        except AdapterError:
            return None

    def resident(self) -> tuple[str, ...]:
        """The experts on the device."""
        return self._bank.names()

    def _check_alive(self) -> None:
        if not self.engine.is_alive:
            raise InferenceError("the engine is closed", hint="Load the experts again.")

    def _try_load(self, name: str) -> bool:
        """Load an adapter; False where others have all the room in use."""
        is_new = name not in self._bank
        if is_new and not self._has_room():
            return False
        try:
            self._bank.load(name, self.packages[name])
        except AdapterError:
            if self._has_room():
                raise
            return False  # what could have gone was asked for meanwhile
        self.loads[name] += is_new
        return True

    def _has_room(self) -> bool:
        names = self._bank.names()
        if self._max_resident is None or len(names) < self._max_resident:
            return True
        infos = (self._bank.info(name) for name in names)
        return any(not (info.is_pinned or info.is_in_use) for info in infos)

    def _builder(self, name: str) -> RequestBuilder:
        builder = self._builders.get(name)
        if builder is None:
            if name not in self.packages:
                raise UnknownModelError(
                    f"there is no expert {name!r}", hint=f"There are: {', '.join(self.packages) or 'none'}."
                )
            package = self.packages[name]
            soft_prompts = load_soft_prompts(package)
            builder = self._builders[name] = RequestBuilder(
                package,
                self._tokenizer(package),
                self.engine.context_length,
                self._options.get(name),
                expert_name=name,
                soft_prompts={label: self.engine.add_soft_prompt(prompt) for label, prompt in soft_prompts.items()},
            )
        return builder

    def _tokenizer(self, package: ExpertPackage) -> Any:
        """The package's tokenizer; packages with the same files share one."""
        key = tokenizer_key(package)
        if package.tokenizer_dir is not None and key not in self._tokenizers:
            tokenizer = load_tokenizer(package, package.tokenizer_dir)
            if tokenizer.get_vocab() != self.engine.tokenizer.get_vocab():
                raise TokenizerError(
                    f"the tokenizer of {package.label} has another vocabulary than the base model's",
                    hint="Pack the tokenizer of the base model, or load the expert alone.",
                )
            self._tokenizers[key] = tokenizer
        return self._tokenizers[key]
