"""`Expert`: one package and its engine, for a person in a REPL."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.engine.types import Completion, Failure, FinishReason, Request, TokenLogprob
from pipeline.errors import (
    ExpertError,
    GrammarError,
    InferenceError,
    InvalidRequestError,
    MissingDependencyError,
    OutOfMemoryError,
    PromptTooLongError,
    TokenizerError,
)
from pipeline.package import ExpertPackage, TrustPolicy, fitting_base_model, open_package

if TYPE_CHECKING:
    from pipeline.engine.runtime import EngineName, LoadedExpert

PROMPT_FIELDS = ("prompt", "messages", "schema", "dialect", "system")
ROW_ERRORS: dict[str, type[ExpertError]] = {
    kind.code: kind
    for kind in (
        GrammarError,
        InvalidRequestError,
        MissingDependencyError,
        OutOfMemoryError,
        PromptTooLongError,
        TokenizerError,
    )
}


@dataclass(frozen=True)
class InferenceResult:
    """The answer to one prompt.

    Args:
        text: The answer, without stop string or end token; empty when there was an error.
        finish_reason: `"stop"`, `"length"` (cut at `max_tokens` or the context) or `"error"`.
        prompt_tokens: Tokens of the templated prompt.
        completion_tokens: Tokens generated, the end token included.
        expert: The expert that answered, `name@version`.
        expert_sha256: The digest of its package.
        error: Why there is no answer, or None.
        logprobs: The log probability of each generated token, if asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    expert: str
    expert_sha256: str
    error: Failure | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON or a DataFrame."""
        return asdict(self)


class Expert:
    """One expert package, ready to answer.

    The model is loaded at the first call that needs it. Calls from several threads are answered together.

    Example:
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
    ) -> None:
        self.package = package
        self._base_path = base_path
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._engine: EngineName = engine
        self._loaded: LoadedExpert | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
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
    ) -> "Expert":
        """Open and verify a package and find its base model; the model itself is loaded when first needed.

        Args:
            path: A `.expert` file, an unpacked directory, any fsspec URL of a file (`s3://`, `gs://`, `https://`), or
                what `expert stage` printed.
            device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or None for the best there is.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None to choose by device and checkpoint.
            quantization: `"int8"` or `"int4"` for weights of 8 or 4 bits, or None; see `pipeline.engine.quantization`.
            engine: `"packed"`; or `"padded"`, slower, for a base model that the packed engine refuses.
            cache_dir: Where packages are unpacked; `$EXPERT_CACHE_DIR` or `~/.cache/expert` if None.
            base_model: The base model's directory or Hugging Face id; found by the manifest's name if None.
            models: Base model names of manifests, and where each is found.
            trust: `"any"`, `"signed"` or `"trusted"`: what is asked of the package's signature; see `open_package`.
            allow_rollback: With `trust="trusted"`, take an older version than was opened before.

        Raises:
            LoadError: The package is missing, damaged or not valid, or its base model cannot be found.
        """
        cache = None if cache_dir is None else Path(cache_dir)
        package = open_package(path, cache_dir=cache, trust=trust, allow_rollback=allow_rollback)
        base = fitting_base_model(package, base_model=base_model, models=models, cache_dir=cache)
        return cls(package, base.path, device=device, dtype=dtype, quantization=quantization, engine=engine)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        schema: str | None = None,
        dialect: str | None = None,
        system: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        use_grammar: bool | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        truncate: str | None = None,
    ) -> InferenceResult:
        """Answer one prompt.

        Args:
            prompt: The question; or give `messages`.
            messages: A conversation, `{"role": ..., "content": ...}` each, the user's last.
            schema: The schema the question is about, as text.
            dialect: The query dialect named with the schema; the expert's own if None.
            system: A system message, put before the schema.
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, max_tokens,
                min_tokens, stop, stop_token_ids, ignore_eos, seed, logprobs: See `pipeline.engine.SamplingParams`;
                what is None follows the package's manifest.
            use_grammar: Hold the answer to the package's grammar, or not; None follows the manifest.
            grammar, json_schema, regex: Hold it to this GBNF grammar, JSON schema (a mapping, or JSON) or regular
                expression instead.
            truncate: `"left"` or `"right"`: cut the oldest or the newest tokens of a prompt that is too long, instead
                of raising.

        Raises:
            InvalidRequestError: The prompt or an option is wrong.
            PromptTooLongError: The prompt does not fit the model's context.
            GrammarError: `use_grammar` is asked for and the package has none, or the grammar given is not valid.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "stop": stop,
            "stop_token_ids": stop_token_ids,
            "ignore_eos": ignore_eos,
            "seed": seed,
            "logprobs": logprobs,
            "use_grammar": use_grammar,
            "grammar": grammar,
            "json_schema": json_schema,
            "regex": regex,
            "truncate": truncate,
        }
        item = {"prompt": prompt, "messages": messages, "schema": schema, "dialect": dialect, "system": system}
        return self.generate_batch([item], raise_on_error=True, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        *,
        schema: str | None = None,
        dialect: str | None = None,
        system: str | None = None,
        raise_on_error: bool = False,
        **options: Any,
    ) -> list[InferenceResult]:
        """Answer several prompts together, in the order given.

        Args:
            prompts: Questions, or mappings with any of `prompt`, `messages`, `schema`, `dialect`, `system` and the
                options of `generate`, which override those given here.
            schema, dialect, system: For every prompt that does not bring its own.
            raise_on_error: Raise the first prompt's error, instead of returning it in that prompt's result.
            options: The options of `generate`, for all prompts.

        Returns:
            One result a prompt. A prompt that cannot be answered has an `error` and does not hinder the others.

        Raises:
            ExpertError: The expert cannot be loaded; or, with `raise_on_error`, a prompt cannot be answered.
        """
        shared = {"schema": schema, "dialect": dialect, "system": system}
        with self._lock:
            loaded = self._load()
            results: dict[str, InferenceResult] = {}
            requests: list[Request] = []
            for position, item in enumerate(prompts):
                try:
                    requests.append(self._request(loaded, str(position), item, shared, options))
                except ExpertError as error:
                    if raise_on_error:
                        raise
                    failure = Failure(error.code, error.message)
                    results[str(position)] = self._result(Completion(str(position), "", "error", 0, 0, failure))
        for completion in loaded.engine.generate(requests):
            if completion.failure is not None and raise_on_error:
                kind = ROW_ERRORS.get(completion.failure.code, InferenceError)
                raise kind(completion.failure.message, hint="See the message; the other prompts are not affected.")
            results[completion.request_id] = self._result(completion)
        return [results[str(position)] for position in range(len(prompts))]

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

    def _load(self) -> "LoadedExpert":
        if self._is_closed:
            raise InferenceError(f"{self.package.label} is closed", hint="Load it again with Expert.load.")
        if self._loaded is None:
            from pipeline.engine.runtime import load_expert

            self._loaded = load_expert(
                self.package,
                self._base_path,
                engine=self._engine,
                device=self._device,
                dtype=self._dtype,
                quantization=self._quantization,
            )
        return self._loaded

    def _request(
        self,
        loaded: "LoadedExpert",
        request_id: str,
        item: str | Mapping[str, Any],
        shared: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Request:
        from pipeline.engine.requests import override_options, require_one_answer

        own: Mapping[str, Any] = {"prompt": item} if isinstance(item, str) or item is None else item
        if not isinstance(own, Mapping):
            raise InvalidRequestError(
                f"prompts[{request_id}] is {type(item).__name__}", hint="Give each prompt as a string or a mapping."
            )
        own = {name: value for name, value in own.items() if value is not None}
        fields = {name: value for name, value in {**shared, **own}.items() if name in PROMPT_FIELDS}
        overrides = {name: value for name, value in own.items() if name not in PROMPT_FIELDS}
        request = loaded.requests.build(request_id, **fields, options=override_options(options, overrides))
        require_one_answer(request.params)
        return request

    def _result(self, completion: Completion) -> InferenceResult:
        return InferenceResult(
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            expert=self.package.label,
            expert_sha256=self.package.digest,
            error=completion.failure,
            logprobs=completion.logprobs,
        )
