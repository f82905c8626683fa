"""`Expert`: one package and its engine, for a person in a REPL."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.asking import Answerer, Ask, Asker, GenerateOptions, Item, Running, begin, read_ask, spelled_out
from pipeline.engine.devices import check_device
from pipeline.errors import InferenceError
from pipeline.metrics import AnswerMetrics, Metrics
from pipeline.package import ExpertPackage, TrustPolicy, fitting_base_model, open_package
from pipeline.results import InferenceResult, Timings
from pipeline.text_streams import AsyncTextStream, TextStream
from pipeline.tracing import span

if TYPE_CHECKING:
    from gradio import ChatInterface

    from pipeline.engine.runtime import EngineName, LoadedExpert
    from pipeline.engine.stats import EngineStats

__all__ = ["AsyncTextStream", "Expert", "GenerateOptions", "InferenceResult", "TextStream", "Timings"]

WARM_UP = "Hello."


class Expert(Asker):
    """One expert package, ready to answer.

    The model is loaded at the first call that needs it, or by `warm_up`. Calls from any number of threads and tasks are
    answered together, in one running batch.

    Examples:
        >>> from pipeline import Expert, demo
        >>> with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL) as expert:
        ...     expert.generate("List the name of all users.", schema="CREATE TABLE users (id INT, name TEXT);").text
        'SELECT name FROM users'
    """

    def __init__(
        self,
        package: ExpertPackage,
        base_path: Path,
        *,
        device: str | None,
        dtype: str | None,
        quantization: str | None = None,
        engine: "EngineName" = "packed",
        metrics: Metrics | None = None,
    ) -> None:
        self.package = package
        self._base_path = base_path
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._engine: EngineName = engine
        self._metrics = None if metrics is None else AnswerMetrics(metrics)
        self._loaded: LoadedExpert | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._building = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | ExpertPackage,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        engine: "EngineName" = "packed",
        cache_dir: str | os.PathLike[str] | None = None,
        base_model: str | os.PathLike[str] | None = None,
        models: Mapping[str, str] | None = None,
        trust: TrustPolicy = "any",
        allow_rollback: bool = False,
        metrics: Metrics | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> "Expert":
        """Open and verify a package and find its base model; the model itself is loaded when first needed.

        Args:
            path: A `.expert` file, an unpacked directory, any fsspec URL of a file (`s3://`, `gs://`, `https://`, `hf://`),
                what `expert stage` printed, or what `open_package` returned.
            device: `"cpu"`, `"cuda"` (the first GPU), `"cuda:1"`, `"mps"`; `"auto"` or None for the best there is. One
                that is named is used or refused, here and now.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None to choose by device and checkpoint.
            quantization: `"int8"` or `"int4"` for weights of 8 or 4 bits, or None; see `pipeline.engine.quantization`.
            engine: `"packed"`; or `"padded"`, slower, for a base model that the packed engine refuses.
            cache_dir: Where packages are unpacked; `$EXPERT_CACHE_DIR` or `~/.cache/expert` if None.
            base_model: The base model's directory or Hugging Face id; looked for here by the manifest's name if None.
            models: Base model names of manifests, and where each is found.
            trust: `"any"`, `"signed"` or `"trusted"`: what is asked of the package's signature; see `open_package`.
            allow_rollback: With `trust="trusted"`, take an older version than was opened before.
            metrics: Where answers are counted and measured; see `pipeline.metrics`. None for nowhere.
            storage_options: Passed to the file system (fsspec) of a package or base model that is named by a URL, such
                as `{"client_kwargs": {"endpoint_url": "http://localhost:9000"}}`.

        Raises:
            LoadError: The package is missing, damaged or not valid, or its base model cannot be found.
            ConfigError: `path` or `trust` is not one of these, or the device is unknown or not there.
        """
        check_device(device)
        cache = None if cache_dir is None else Path(cache_dir)
        package = open_package(
            path, cache_dir=cache, trust=trust, allow_rollback=allow_rollback, storage_options=storage_options
        )
        base = fitting_base_model(
            package, base_model=base_model, models=models, cache_dir=cache, storage_options=storage_options
        )
        return cls(
            package,
            base.path,
            device=device,
            dtype=dtype,
            quantization=quantization,
            engine=engine,
            metrics=metrics,
        )

    @spelled_out
    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> InferenceResult:
        """Answer one prompt.

        Args:
            prompt: The question; or give `messages`.
            options: See `GenerateOptions`: `schema`, `temperature`, `max_tokens`, `stop`, `seed`, `json_schema`, ...

        Raises:
            InvalidRequestError: The prompt or an option is wrong.
            PromptTooLongError: The prompt does not fit the model's context.
            GrammarError: `use_grammar` is asked for and the package has none, or the grammar given is not valid.
        """
        return self._answer([read_ask(prompt, options)], raise_on_error=True)[0]

    @spelled_out
    def generate_batch(
        self, prompts: Sequence[Item], *, raise_on_error: bool = False, **options: Unpack[GenerateOptions]
    ) -> list[InferenceResult]:
        """Answer several prompts together, in the order given.

        Args:
            prompts: Questions, or mappings with any of `prompt` and the options, which override those given here.
            raise_on_error: Raise the first prompt's error, instead of returning it in that prompt's result.
            options: See `GenerateOptions`; for all prompts.

        Returns:
            One result a prompt. A prompt that cannot be answered has an `error` and does not hinder the others.

        Raises:
            ExpertError: The expert cannot be loaded; or, with `raise_on_error`, a prompt cannot be answered.

        Examples:
            >>> schema = "CREATE TABLE users (id INT, name TEXT);"
            >>> results = expert.generate_batch(["List the name of all users.", ""], schema=schema)
            >>> results[0].text, results[1].error.code
            ('SELECT name FROM users', 'invalid_request')
        """
        return self._answer(_asks(prompts, options), raise_on_error=raise_on_error)

    @spelled_out
    def generate_stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """Answer one prompt, giving its text as it comes.

        Args:
            prompt, options: As for `generate`; `n` is 1.

        Returns:
            A generator of pieces of text. Its return value, and its `result` when it has ended, is what `generate`
            would have returned; `close` cancels the request and leaves a partial result.

        Raises:
            As `generate`, at once or from the iteration; ConfigError with `engine="padded"`.

        Examples:
            >>> schema = "CREATE TABLE users (id INT, name TEXT);"
            >>> stream = expert.generate_stream("List the name of all users.", schema=schema)
            >>> "".join(stream)
            'SELECT name FROM users'
            >>> stream.result.finish_reason
            'stop'
        """
        (running,) = self._begin([read_ask(prompt, options)], is_streamed=True, is_strict=True)
        return TextStream(running)

    @spelled_out
    async def agenerate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> InferenceResult:
        """As `generate`, for asyncio: tasks that wait at the same time are answered together.

        A task that is cancelled cancels its request.
        """
        return (await self._aanswer([read_ask(prompt, options)], raise_on_error=True))[0]

    @spelled_out
    async def agenerate_batch(
        self, prompts: Sequence[Item], *, raise_on_error: bool = False, **options: Unpack[GenerateOptions]
    ) -> list[InferenceResult]:
        """As `generate_batch`, for asyncio."""
        return await self._aanswer(_asks(prompts, options), raise_on_error=raise_on_error)

    @spelled_out
    def agenerate_stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncTextStream:
        """As `generate_stream`, for `async for`; it is asked when its first piece is asked for."""
        ask = read_ask(prompt, options)
        return AsyncTextStream(lambda: self._begin([ask], is_streamed=True, is_strict=True))

    def warm_up(self) -> "Expert":
        """Load the model and answer a word, so that no prompt waits for what is made once.

        Returns:
            The expert itself.

        Raises:
            LoadError: The expert cannot be loaded.
        """
        self.generate(WARM_UP, max_tokens=2, min_tokens=0)
        return self

    def stats(self) -> "EngineStats":
        """What the engine is doing now, and what it has done; it is loaded for that where it is not."""
        return self._load().engine.stats()

    @property
    def context_length(self) -> int:
        """Tokens that the model's context holds, prompt and answer together; it is loaded for that where it is not."""
        return self._load().requests.context_length

    def to_gradio(self, **options: Unpack[GenerateOptions]) -> "ChatInterface":
        """A page to talk with the expert in a browser: `expert.to_gradio().launch()` shows it.

        Args:
            options: As for `generate`, for every prompt; `schema` is what its field holds at first.

        Raises:
            MissingDependencyError: Gradio is not installed.
        """
        from pipeline.integrations.asked import Asked
        from pipeline.integrations.gradio import chat_page

        return chat_page(Asked(self), title=self.package.label, **options)

    def close(self) -> None:
        """Free the device. Calling it again does nothing; the expert cannot be used afterwards."""
        with self._lock:
            self._is_closed = True
            loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.engine.close()

    def __enter__(self) -> "Expert":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "loaded" if self._loaded is not None else "not loaded yet"
        return f"Expert({self.package.label}, base={self._base_path.name}, {state})"

    def _begin(self, asks: Sequence[Ask], *, is_streamed: bool = False, is_strict: bool = False) -> list[Running]:
        loaded = self._load()
        answerer = Answerer(self.package, loaded.engine, loaded.requests, self._building, self._metrics)
        return begin(answerer, asks, is_streamed=is_streamed, is_strict=is_strict)

    def _load(self) -> "LoadedExpert":
        with self._lock:
            if self._is_closed:
                raise InferenceError(f"{self.package.label} is closed", hint="Load it again with Expert.load.")
            if self._loaded is None:
                from pipeline.engine.runtime import load_expert

                with span("expert.load", {"expert": self.package.label}):
                    self._loaded = load_expert(
                        self.package,
                        self._base_path,
                        engine=self._engine,
                        device=self._device,
                        dtype=self._dtype,
                        quantization=self._quantization,
                    )
                if self._metrics is not None:
                    self._metrics.note_loads(self.package.manifest.name)
            return self._loaded


def _asks(prompts: Sequence[Item], options: Mapping[str, Any]) -> list[Ask]:
    return [read_ask(item, options, where=f"prompts[{position}]") for position, item in enumerate(prompts)]
