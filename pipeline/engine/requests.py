"""From what a caller gives to a `Request`: defaults from the manifest, limits, and the error of a row.

The long part, preparing, any process can do; the rest takes what only the engine knows, the ids of soft prompts.

Batch and online both come through here, so that a limit or a default mended on one path is mended on the other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engine import grammar as grammars
from pipeline.engine.chat import ChatEncoder, build_messages, default_dialect
from pipeline.engine.truncation import SIDES, shorten
from pipeline.engine.types import Grammar, GrammarKind, Request, SamplingParams
from pipeline.errors import GrammarError, InvalidRequestError, MissingDependencyError, PromptTooLongError
from pipeline.package import ExpertPackage

GRAMMAR_KINDS: dict[str, GrammarKind] = {"grammar": "gbnf", "json_schema": "json_schema", "regex": "regex"}
CONSTRAINTS = ("use_grammar", *GRAMMAR_KINDS)  # options of which one is given
OPTION_NAMES = (*SamplingParams.option_names(), *CONSTRAINTS, "truncate", "soft_prompt")


@dataclass(frozen=True)
class PreparedPrompt:
    """One prompt, checked, templated and tokenised: what of a `Request` any process can make, without an engine.

    Args:
        token_ids: The prompt, without its soft prompt.
        params, grammar: As of the request.
        prefix_length: How many of the first tokens other prompts are likely to share.
        soft_prompt: The name of the soft prompt before it; None for none.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    grammar: Grammar | None = None
    prefix_length: int = 0
    soft_prompt: str | None = None


class PromptPreparer:
    """Prepares the prompts of one expert, in any process: it needs the tokenizer and the manifest, and no weights.

    Args:
        package: The expert; its manifest gives the defaults.
        tokenizer: Its tokenizer, with a chat template.
        context_length: At most this many tokens, prompt and answer together.
        options: Options that go before the manifest's, for every prompt: any of `OPTION_NAMES`; None leaves a default.

    Raises:
        InvalidRequestError: An option is unknown or has a wrong value.
        GrammarError: `use_grammar` is asked for and the package has no grammar; or one that is given is too large.
        MissingDependencyError: A grammar is asked for, and xgrammar is not installed.

    `grammar` is what prompts are held to that do not choose themselves.
    """

    def __init__(
        self,
        package: ExpertPackage,
        tokenizer: Any,
        context_length: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._package = package
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._soft_lengths = {prompt.name: prompt.tokens for prompt in package.manifest.soft_prompts}
        self._soft_prompt = (options or {}).get("soft_prompt")
        self._dialect = default_dialect(package.manifest.capabilities)
        self._encoder = ChatEncoder(tokenizer)
        self._params, self.grammar = request_defaults(package, options or {})
        self._truncate = _side((options or {}).get("truncate"))

    @property
    def tokenizer(self) -> Any:
        """The expert's tokenizer."""
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Tokens that the model's context holds, prompt and answer together."""
        return self._context_length

    def prepare(
        self,
        *,
        prompt: Any = None,
        messages: Any = None,
        schema: Any = None,
        dialect: str | None = None,
        system: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """Check, template and tokenise one row.

        Args:
            prompt, messages, schema, dialect, system: See `pipeline.engine.chat.build_messages`.
            options: Overrides of this row: any of `OPTION_NAMES`; None leaves the default. With `truncate`, `"left"` or
                `"right"`, a prompt that is too long loses the oldest or the newest tokens of its longest text, so that
                the answer keeps its `max_tokens`, or half of the context where that is less.

        Raises:
            InvalidRequestError: The row or an option cannot be used.
            GrammarError: The row's grammar is too large or is none.
            PromptTooLongError: The prompt leaves no room for an answer in the model's context.
        """
        options = options or {}
        texts = {"prompt": prompt, "messages": messages, "schema": schema, "system": system}
        dialect = self._dialect if dialect is None else dialect
        conversation = build_messages(**texts, dialect=dialect)
        params = override_params(self._params, options) if options else self._params
        chosen = choose_grammar(self._package, options) if _chooses(options) else self.grammar
        side = _side(options.get("truncate")) or self._truncate
        soft_prompt = self._choose_soft_prompt(options.get("soft_prompt") or self._soft_prompt)
        context_length = self._context_length - (0 if soft_prompt is None else self._soft_lengths[soft_prompt])
        token_ids, prefix_length = self._encoder.encode(conversation)
        if side is not None:
            room = context_length - min(params.max_tokens, context_length // 2)
            while len(token_ids) > room:
                texts = shorten(texts, self._tokenizer, len(token_ids) - room, side)
                token_ids, prefix_length = self._encoder.encode(build_messages(**texts, dialect=dialect))
        room = context_length - len(token_ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids):,} tokens, and the model's context holds {context_length:,}",
                hint="Shorten the prompt or the schema, or set truncate; one token at least is left for the answer.",
            )
        if params.max_tokens > room:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        return PreparedPrompt(token_ids, params, chosen, prefix_length, soft_prompt)

    def _choose_soft_prompt(self, name: Any) -> str | None:
        """The soft prompt that stands before a prompt: the one named, or the only one."""
        if name is None:
            if len(self._soft_lengths) > 1:
                raise InvalidRequestError(
                    f"{self._package.label} has {len(self._soft_lengths)} soft prompts, and none is chosen",
                    hint=f"Set soft_prompt to one of {', '.join(sorted(self._soft_lengths))}.",
                )
            return next(iter(self._soft_lengths), None)
        if name not in self._soft_lengths:
            raise InvalidRequestError(
                f"{self._package.label} has no soft prompt {name!r}",
                hint=f"It has: {', '.join(sorted(self._soft_lengths)) or 'none'}.",
            )
        return str(name)


class RequestBuilder(PromptPreparer):
    """Builds the requests of one expert on an engine.

    Args:
        package, tokenizer, context_length, options: As for `PromptPreparer`, and what it raises.
        expert_name: The name under which the engine holds the expert's adapter; None where it is merged.
        soft_prompts: The ids that the engine has given to the positions of each soft prompt of the package, by its
            name.
    """

    def __init__(
        self,
        package: ExpertPackage,
        tokenizer: Any,
        context_length: int,
        options: Mapping[str, Any] | None = None,
        *,
        expert_name: str | None = None,
        soft_prompts: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(package, tokenizer, context_length, options)
        self._expert_name = expert_name
        self._soft_prompts = dict(soft_prompts or {})

    def request(self, request_id: str, prepared: PreparedPrompt) -> Request:
        """The request of a prompt that this expert's `PromptPreparer` has prepared, here or in another process.

        Args:
            request_id: Unique among the requests answered together.
            prepared: The prompt.
        """
        soft = () if prepared.soft_prompt is None else self._soft_prompts[prepared.soft_prompt]
        return Request(
            request_id,
            soft + prepared.token_ids,
            prepared.params,
            prepared.grammar,
            self._expert_name,
            len(soft) + prepared.prefix_length,
        )

    def build(self, request_id: str, **asked: Any) -> Request:
        """Check, template and tokenise one row, as `prepare` does, for the engine.

        Args:
            request_id: Unique among the requests answered together.
            asked: See `PromptPreparer.prepare`.

        Raises:
            As `PromptPreparer.prepare`.
        """
        return self.request(request_id, self.prepare(**asked))


def request_defaults(package: ExpertPackage, options: Mapping[str, Any]) -> tuple[SamplingParams, Grammar | None]:
    """The parameters and the grammar of requests that do not choose themselves, without loading anything.

    Args:
        package: Its manifest gives the defaults.
        options: Options that go before them; see `PromptPreparer`.

    Raises:
        As `PromptPreparer`.
    """
    params = override_params(manifest_params(package), options)
    _side(options.get("truncate"))
    return params, choose_grammar(package, options)


def override_params(params: SamplingParams, options: Mapping[str, Any]) -> SamplingParams:
    """The parameters with options put before them; an option that is None changes nothing.

    Raises:
        InvalidRequestError: An option is unknown or has a wrong value.
    """
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise InvalidRequestError(
            f"unknown option {', '.join(unknown)}", hint=f"The options are {', '.join(OPTION_NAMES)}."
        )
    names = SamplingParams.option_names()
    return replace(params, **{name: value for name, value in options.items() if value is not None and name in names})


def override_options(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others put before them; an own grammar of any kind takes the place of the shared one."""
    dropped = CONSTRAINTS if _chooses(own) else ()
    kept = {name: value for name, value in shared.items() if name not in dropped}
    return kept | {name: value for name, value in own.items() if value is not None}


def require_one_answer(params: SamplingParams) -> None:
    """Refuse a request for several answers, where a row or a call has place for one.

    Raises:
        InvalidRequestError: `n` is more than 1.
    """
    if params.n > 1:
        raise InvalidRequestError(
            f"n is {params.n}, and one answer is given to each prompt",
            hint="Leave n out, and repeat the prompt with other seeds.",
        )


def choose_grammar(package: ExpertPackage, options: Mapping[str, Any]) -> Grammar | None:
    """What answers are held to, or None.

    Args:
        package: Its manifest decides where the options do not. A grammar that only the manifest asks for is left out,
            with one warning, when xgrammar is not installed.
        options: One of `use_grammar` (the package's own, or none), `grammar` (GBNF), `json_schema` (an object, or JSON
            text) and `regex`, if any.

    Raises:
        InvalidRequestError: An option has a wrong type, or there is more than one.
        GrammarError: The package's is asked for, and it has none; or the one given is empty, too large or too deep.
        MissingDependencyError: One is asked for, and xgrammar is not installed.
    """
    use_grammar = options.get("use_grammar")
    if use_grammar not in (None, True, False):
        raise InvalidRequestError(f"use_grammar is {use_grammar!r}", hint="Give true or false.")
    given = [name for name in GRAMMAR_KINDS if options.get(name) is not None]
    named = [*given, *(["use_grammar"] if use_grammar else [])]
    if len(named) > 1:
        raise InvalidRequestError(f"{' and '.join(named)} are given", hint="Give one of them.")
    if given:
        return _callers_grammar(given[0], options[given[0]])
    return _package_grammar(package, use_grammar)


def _callers_grammar(name: str, value: Any) -> Grammar:
    if name == "json_schema" and isinstance(value, Mapping):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                "json_schema holds a value that is not JSON", hint=f"Give a plain object: {error}."
            ) from error
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} is {type(value).__name__}", hint=f"Give {name} as text.")
    grammar = Grammar(GRAMMAR_KINDS[name], value)
    grammars.check_grammar(grammar)
    if not grammars.is_available():
        raise MissingDependencyError(f"{name} is given, and xgrammar is not installed", hint=grammars.INSTALL_HINT)
    return grammar


def _package_grammar(package: ExpertPackage, use_grammar: bool | None) -> Grammar | None:
    wanted = package.manifest.decoding.use_grammar if use_grammar is None else use_grammar
    if not wanted:
        return None
    if package.grammar is None:
        if use_grammar:
            raise GrammarError(f"{package.label} has no grammar", hint="Leave use_grammar out, or pack a grammar.gbnf.")
        grammars.warn_not_applied(package.label, "and the package has none")
        return None
    if not grammars.is_available():
        if use_grammar:
            raise MissingDependencyError(
                f"use_grammar is asked for {package.label}, and xgrammar is not installed", hint=grammars.INSTALL_HINT
            )
        grammars.warn_not_applied(package.label, f"and xgrammar is not installed. {grammars.INSTALL_HINT}")
        return None
    return Grammar("gbnf", package.grammar)


def manifest_params(package: ExpertPackage) -> SamplingParams:
    """The decoding defaults of a package; what its manifest does not say is greedy and unlimited by taste.

    Raises:
        InvalidRequestError: The manifest's decoding holds a value out of range.
    """
    decoding = package.manifest.decoding
    given: dict[str, Any] = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "max_tokens": decoding.max_new_tokens,
        "stop": decoding.stop_sequences or None,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _chooses(options: Mapping[str, Any]) -> bool:
    return any(options.get(name) is not None for name in CONSTRAINTS)


def _side(value: Any) -> str | None:
    if value is not None and value not in SIDES:
        raise InvalidRequestError(f"truncate is {value!r}", hint=f"Give {' or '.join(SIDES)}, or leave it out.")
    return str(value) if value is not None else None
