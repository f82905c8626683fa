"""From what a caller gives to a `Request`: defaults from the manifest, limits, and the error of a row.

Batch and online both come through here, so that a limit or a default mended on one path is mended on the other.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.engine import grammar as grammars
from pipeline.engine.chat import build_messages, default_dialect, encode_chat
from pipeline.engine.types import Request, SamplingParams
from pipeline.errors import GrammarError, InvalidRequestError, MissingDependencyError, PromptTooLongError
from pipeline.package import ExpertPackage

OPTION_NAMES = (*SamplingParams.option_names(), "use_grammar")


class RequestBuilder:
    """Builds the requests of one expert.

    Args:
        package: The expert; its manifest gives the defaults.
        tokenizer: Its tokenizer, with a chat template.
        context_length: At most this many tokens, prompt and answer together.
        options: Options that go before the manifest's, for every request: any of `OPTION_NAMES`; None leaves a default.

    Raises:
        InvalidRequestError: An option is unknown or has a wrong value.
        GrammarError: `use_grammar` is asked for, and the package has no grammar.
        MissingDependencyError: `use_grammar` is asked for, and xgrammar is not installed.

    `grammar` is the grammar that requests are held to which do not choose themselves.
    """

    def __init__(
        self, package: ExpertPackage, tokenizer: Any, context_length: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self._package = package
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._dialect = default_dialect(package.manifest.capabilities)
        self._params, self.grammar = request_defaults(package, options or {})

    def build(
        self,
        request_id: str,
        *,
        prompt: Any = None,
        messages: Any = None,
        schema: Any = None,
        dialect: str | None = None,
        system: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> Request:
        """Check, template and tokenise one row.

        Args:
            request_id: Unique among the requests answered together.
            prompt, messages, schema, dialect, system: See `pipeline.engine.chat.build_messages`.
            options: Overrides of this row: any of `OPTION_NAMES`; None leaves the default.

        Raises:
            InvalidRequestError: The row or an option cannot be used.
            PromptTooLongError: The prompt leaves no room for an answer in the model's context.
        """
        options = options or {}
        use_grammar = options.get("use_grammar")
        conversation = build_messages(
            prompt=prompt,
            messages=messages,
            schema=schema,
            dialect=self._dialect if dialect is None else dialect,
            system=system,
        )
        params = override_params(self._params, options) if options else self._params
        token_ids = encode_chat(self._tokenizer, conversation)
        room = self._context_length - len(token_ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids):,} tokens, and the model's context holds {self._context_length:,}",
                hint="Shorten the prompt or the schema; one token at least must be left for the answer.",
            )
        if params.max_tokens > room:
            params = replace(params, max_tokens=room)
        chosen = self.grammar if use_grammar is None else choose_grammar(self._package, use_grammar)
        return Request(request_id, token_ids, params, chosen)


def request_defaults(package: ExpertPackage, options: Mapping[str, Any]) -> tuple[SamplingParams, str | None]:
    """The parameters and the grammar of requests that do not choose themselves, without loading anything.

    Args:
        package: Its manifest gives the defaults.
        options: Options that go before them; see `RequestBuilder`.

    Raises:
        As `RequestBuilder`.
    """
    return override_params(manifest_params(package), options), choose_grammar(package, options.get("use_grammar"))


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
    given = {name: value for name, value in options.items() if value is not None and name != "use_grammar"}
    return replace(params, **given)


def choose_grammar(package: ExpertPackage, use_grammar: bool | None) -> str | None:
    """The grammar to hold answers to, or None.

    Args:
        package: Its manifest decides where `use_grammar` is None. A grammar that only the manifest asks for is left
            out, with one warning, when xgrammar is not installed.
        use_grammar: What the caller asks for.

    Raises:
        InvalidRequestError: `use_grammar` is neither true, false nor None.
        GrammarError: It is asked for, and the package has none.
        MissingDependencyError: It is asked for, and xgrammar is not installed.
    """
    if use_grammar not in (None, True, False):
        raise InvalidRequestError(f"use_grammar is {use_grammar!r}", hint="Give true or false.")
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
    return package.grammar


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
