"""`ExpertManager`: many experts, their base models shared."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from pipeline.asking import Answerer, Ask, Asker, GenerateOptions, Item, Running, begin, read_ask, spelled_out
from pipeline.engine.devices import check_device
from pipeline.errors import ConfigError, ExpertError, InvalidRequestError
from pipeline.metrics import AnswerMetrics, Metrics
from pipeline.package import ExpertPackage, TrustPolicy
from pipeline.results import InferenceResult
from pipeline.roster import BaseInfo, ExpertInfo, Roster
from pipeline.routing import AUTO, Route
from pipeline.shelf import Shelf
from pipeline.text_streams import AsyncTextStream, TextStream

__all__ = ["BaseInfo", "ExpertInfo", "ExpertManager"]


class ExpertManager(Asker):
    """Many experts, each over its base model; those over the same one answer in one running batch.

    A base model is loaded once for each (digest, dtype, device) and goes with its last expert. Any thread or task may
    ask, load and unload. An expert that was let go, because `max_loaded_experts` others were used later, is loaded
    again when it is asked.

    Args:
        max_loaded_experts: At most this many experts are loaded, over all base models; None for any number.
        device, dtype, quantization: For every expert that is not loaded with others; see `Expert.load`.
        base_model, models, cache_dir, metrics, storage_options: See `Expert.load`; for every expert.

    Raises:
        ConfigError: `max_loaded_experts` is below 1, or the device is unknown or not there.

    Examples:
        >>> from pipeline import ExpertManager, demo
        >>> with ExpertManager(base_model=demo.BASE_MODEL) as manager:
        ...     _ = manager.load_experts({name: demo.package(name) for name in ("sql", "json")})
        ...     schema, fields = "CREATE TABLE users (id INT, name TEXT);", '{"city": "string", "age": "integer"}'
        ...     results = manager.generate_batch(
        ...         [
        ...             ("sql", {"prompt": "List the name of all users.", "schema": schema}),
        ...             ("json", {"prompt": "Maria lives in Lima and is 30 years old.", "schema": fields}),
        ...         ]
        ...     )
        >>> [result.text for result in results]
        ['SELECT name FROM users', '{"city": "Lima", "age": 30}']
    """

    def __init__(
        self,
        *,
        max_loaded_experts: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        base_model: str | os.PathLike[str] | None = None,
        models: Mapping[str, str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        metrics: Metrics | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_loaded_experts is not None and max_loaded_experts < 1:
            raise ConfigError(f"max_loaded_experts is {max_loaded_experts}", hint="Give 1 or more, or None.")
        check_device(device)
        self._metrics = None if metrics is None else AnswerMetrics(metrics)
        self._shelf = Shelf(max_loaded_experts, metrics=self._metrics)
        self._roster = Roster(
            self._shelf,
            placing={"device": device, "dtype": dtype, "quantization": quantization},
            base_model=base_model,
            models=models,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            storage_options=storage_options,
        )

    @property
    def experts(self) -> tuple[str, ...]:
        """The names that prompts may give, whether the experts are loaded at the moment or not."""
        return self._roster.names

    def load_expert(
        self,
        name: str,
        path: str | os.PathLike[str] | ExpertPackage,
        *,
        pin: bool = False,
        base_model: str | os.PathLike[str] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        trust: TrustPolicy = "any",
        allow_rollback: bool = False,
    ) -> ExpertInfo:
        """Open a package and load it over its base model, under a name.

        Where the name is taken, the new package takes its place: prompts that are being answered are finished by the
        old one, and the base model stays where it is.

        Args:
            name: What prompts call it; not `"auto"`.
            path: As for `Expert.load`.
            pin: Never let it go for others.
            base_model, device, dtype, quantization: Where they differ from the manager's.
            trust, allow_rollback: What is asked of the package's signature; see `Expert.load`.

        Raises:
            LoadError: The package or its base model cannot be used.
            ConfigError: The experts do not go together, by their `constraints`; or an option is wrong.
            OverloadedError: There is no room, and none comes.
        """
        placing = {"device": device, "dtype": dtype, "quantization": quantization}
        opened = self._roster.open(
            name,
            path,
            base_model=base_model,
            placing=placing,
            pin=pin,
            trust=trust,
            allow_rollback=allow_rollback,
        )
        return self._roster.add({name: opened})[0]

    def load_experts(
        self,
        paths: Mapping[str, str | os.PathLike[str] | ExpertPackage],
        *,
        pin: bool = False,
        trust: TrustPolicy = "any",
        allow_rollback: bool = False,
    ) -> list[ExpertInfo]:
        """Load several experts, in the order that `constraints.load_order` in their manifests asks for.

        Args:
            paths: As for `load_expert`, by name.
            pin, trust, allow_rollback: As for `load_expert`.

        Raises:
            As `load_expert`. Nothing is loaded where one cannot be opened, or they do not go together.
        """
        opened = {
            name: self._roster.open(
                name, path, base_model=None, placing={}, pin=pin, trust=trust, allow_rollback=allow_rollback
            )
            for name, path in paths.items()
        }
        return self._roster.add(opened)

    def unload_expert(self, name: str) -> None:
        """Forget an expert: what is being answered is finished first. Its base model goes with the last of its experts.

        Raises:
            ConfigError: Another expert requires it.
            UnknownModelError: There is none of that name.
        """
        self._roster.remove(name)

    def list_loaded_experts(self) -> list[ExpertInfo]:
        """The experts that are loaded now."""
        return self._roster.infos()

    def list_base_models(self) -> list[BaseInfo]:
        """The base models that are loaded now."""
        return self._roster.base_infos()

    def route(self, prompt: Any, *, facts: Mapping[str, str] | None = None) -> Route:
        """Choose the expert for a prompt, by what the manifests say; see `pipeline.routing`.

        Args:
            prompt: The question, or a conversation of messages.
            facts: What is known besides, such as `{"database": "sql"}`, for the manifests' router hints.

        Returns:
            The expert's name and the reason.

        Raises:
            RoutingError: No expert fits.
            ManifestError: An expert's router_hint is not one.
        """
        return self._roster.router().route(prompt, facts=facts)

    @spelled_out
    def generate(self, expert: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> InferenceResult:
        """Answer one prompt.

        Args:
            expert: The expert's name, or `"auto"` for the one that `route` chooses.
            prompt, options: As for `Expert.generate`.

        Raises:
            UnknownModelError: There is no expert of that name.
            RoutingError: With `"auto"`, no expert fits.
            ExpertError: As `Expert.generate`.
        """
        return self._answer([read_ask(prompt, options, expert=expert)], raise_on_error=True)[0]

    @spelled_out
    def generate_batch(
        self,
        prompts: Sequence[tuple[str, Item] | Item],
        *,
        expert: str | None = None,
        raise_on_error: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[InferenceResult]:
        """Answer several prompts of any experts together, in the order given; over one base model they are one batch.

        Args:
            prompts: `(expert, prompt)` pairs; or prompts alone, for `expert`; see `Expert.generate_batch`.
            expert: The expert of the prompts that name none; it may be `"auto"`.
            raise_on_error, options: As for `Expert.generate_batch`.
        """
        return self._answer(_asks(prompts, expert, options), raise_on_error=raise_on_error)

    @spelled_out
    def generate_stream(self, expert: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """As `Expert.generate_stream`, by the expert of a name."""
        ask = read_ask(prompt, options, expert=expert)
        (running,) = self._begin([ask], is_streamed=True, is_strict=True)
        return TextStream(running)

    @spelled_out
    async def agenerate(
        self, expert: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> InferenceResult:
        """As `generate`, for asyncio."""
        return (await self._aanswer([read_ask(prompt, options, expert=expert)], raise_on_error=True))[0]

    @spelled_out
    async def agenerate_batch(
        self,
        prompts: Sequence[tuple[str, Item] | Item],
        *,
        expert: str | None = None,
        raise_on_error: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> list[InferenceResult]:
        """As `generate_batch`, for asyncio."""
        return await self._aanswer(_asks(prompts, expert, options), raise_on_error=raise_on_error)

    @spelled_out
    def agenerate_stream(
        self, expert: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """As `generate_stream`, for `async for`."""
        ask = read_ask(prompt, options, expert=expert)
        return AsyncTextStream(lambda: self._begin([ask], is_streamed=True, is_strict=True))

    def close(self) -> None:
        """Free all devices. Again does nothing; the manager cannot be used afterwards."""
        self._roster.close()

    def __enter__(self) -> "ExpertManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        loaded = ", ".join(info.name for info in self.list_loaded_experts()) or "nothing"
        return f"ExpertManager({len(self.experts)} experts, loaded: {loaded})"

    # What follows is how: prompts by expert, then experts by name.

    def _begin(self, asks: Sequence[Ask], *, is_streamed: bool = False, is_strict: bool = False) -> list[Running]:
        chosen = [self._chosen(ask) for ask in asks]
        places: dict[str, list[int]] = {}
        for position, ask in enumerate(chosen):
            places.setdefault(ask.expert or "", []).append(position)
        begun: dict[int, Running] = {}
        try:
            for name, positions in places.items():
                group = [chosen[position] for position in positions]
                running = self._begin_group(name, group, is_streamed=is_streamed, is_strict=is_strict)
                begun |= dict(zip(positions, running, strict=True))
        except BaseException:  # Ctrl-C too; it is raised again
            for one in begun.values():
                one.cancel()
            raise
        return [begun[position] for position in range(len(asks))]

    def _begin_group(self, name: str, asks: list[Ask], *, is_streamed: bool, is_strict: bool) -> list[Running]:
        """Begin what one expert is asked; it is kept until the last of it is finished."""
        error = next((ask.error for ask in asks if ask.error is not None), None)
        if error is not None and (is_strict or name == ""):
            if is_strict:
                raise error
            return [Running(ask, None, error=ask.error) for ask in asks]
        try:
            known = self._roster.find(name)
            base, builder = self._shelf.acquire(known.shelved)
        except ExpertError as problem:
            if is_strict or self._roster.is_closed:
                raise
            return [Running(ask, None, error=ask.error or problem) for ask in asks]
        self._roster.note_use(name)
        hold = _Hold(lambda: self._shelf.release(base, known.shelved))
        try:
            answerer = Answerer(known.shelved.package, base.residents.engine, builder, base.building, self._metrics)
            running = begin(answerer, asks, is_streamed=is_streamed, is_strict=is_strict)
            hold.until_done(running)
        finally:
            hold.let_go()
        return running

    def _chosen(self, ask: Ask) -> Ask:
        """The ask with the expert that its prompt decides for, where it says auto."""
        if ask.error is not None or ask.expert != AUTO:
            return ask
        try:
            prompt = ask.fields.get("prompt", ask.fields.get("messages"))
            return replace(ask, expert=self.route(prompt).expert)
        except ExpertError as error:
            return replace(ask, expert="", error=error)


class _Hold:
    """Keeps something until the last of several requests is finished, and its maker has let go."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._num_users = 1

    def until_done(self, running: Sequence[Running]) -> None:
        """Count the requests as users until each is finished."""
        handles = {id(handle): handle for one in running if (handle := one.submitted) is not None}
        with self._lock:
            self._num_users += len(handles)
        for handle in handles.values():
            handle.add_done_callback(lambda _: self.let_go())

    def let_go(self) -> None:
        """One user less."""
        with self._lock:
            self._num_users -= 1
            is_last = self._num_users == 0
        if is_last:
            self._release()


def _asks(prompts: Sequence[tuple[str, Item] | Item], expert: str | None, options: Mapping[str, Any]) -> list[Ask]:
    return [_ask(item, expert, options, f"prompts[{position}]") for position, item in enumerate(prompts)]


def _ask(item: Any, expert: str | None, options: Mapping[str, Any], where: str) -> Ask:
    name = expert
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):  # a name and a prompt
        name, item = item
    if name is None:
        error = InvalidRequestError(f"{where} names no expert", hint="Give (expert, prompt), or expert=.")
        return Ask(error=error, expert="")
    return read_ask(item, options, where=where, expert=name)
