"""Compiling what an answer is held to (a GBNF grammar, a JSON schema, a regular expression), with xgrammar."""

import bisect
import functools
import itertools
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

from pipeline.engine.grammar import INSTALL_HINT, NAMES, check_grammar, is_available, not_valid
from pipeline.engine.grammar_matcher import Endings, GrammarMatcher, TokenSet
from pipeline.engine.stopping import StopRules
from pipeline.engine.types import Grammar, SamplingParams
from pipeline.errors import ExpertError, GrammarError, MissingDependencyError

MAX_WHITESPACE = 20  # in a row between the parts of JSON: a model that knows nothing to say would write it for ever
MAX_COMPILE_SECONDS = 10.0
MAX_COMPILED_BYTES = 256 << 20  # of one grammar
MAX_CACHED_BYTES = 512 << 20  # of all that no sequence uses
MAX_CACHED = 256
MAX_COMPILING = 2  # threads at a time


class GrammarCompiler:
    """Compiles grammars for one tokenizer, each once, and starts the matchers of sequences. Any thread may call it.

    A grammar is bounded in bytes, in nesting, and in the memory of its compiled form. Compiling is given up after
    `max_seconds`; xgrammar cannot be interrupted, so the thread runs on, at most `MAX_COMPILING` of them.

    Args:
        tokenizer: The Hugging Face tokenizer.
        vocab_size: The number of the model's logits, which may exceed the tokenizer's vocabulary.
        rules: What ends a text.
        max_seconds: How long one grammar may take.
        max_cached: How many are kept, of at most `MAX_CACHED_BYTES` together.

    Raises:
        MissingDependencyError: xgrammar is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        rules: StopRules,
        *,
        max_seconds: float = MAX_COMPILE_SECONDS,
        max_cached: int = MAX_CACHED,
    ) -> None:
        if not is_available():
            raise MissingDependencyError("a grammar is asked for, and xgrammar is not installed", hint=INSTALL_HINT)
        import xgrammar

        self._rules = rules
        self._max_seconds = max_seconds
        self._max_cached = max_cached
        self._vocabulary = _Vocabulary(_tokenizer_info(tokenizer, vocab_size, rules.eos_token_ids))
        self._compiler = xgrammar.GrammarCompiler(self._vocabulary.info, max_threads=2, cache_enabled=False)
        self._cache: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.BoundedSemaphore(MAX_COMPILING)

    def compile(self, grammar: Grammar) -> Any:
        """Compile a grammar, if it is not yet; waits for it.

        Returns:
            xgrammar's compiled grammar.

        Raises:
            GrammarError: It is empty, too large, too deep, not valid, or takes too long.
        """
        with self._lock:
            entry = self._cache.get(grammar)
            is_new = entry is None
            if entry is None:
                entry = self._cache[grammar] = Future()
                self._evict()
            self._cache.move_to_end(grammar)
        if is_new:
            self._start(grammar, entry)
        try:
            return entry.result(self._max_seconds)
        except TimeoutError:
            # The next one who asks gets the same answer without waiting.
            failed: Future[Any] = Future()
            failed.set_exception(_too_slow(grammar, self._max_seconds))
            with self._lock:
                if self._cache.get(grammar) is entry:
                    self._cache[grammar] = failed
            return failed.result()

    def matcher(self, grammar: Grammar, params: SamplingParams) -> GrammarMatcher:
        """A fresh matcher for one sequence.

        Args:
            grammar: What its text is held to.
            params: The request's; where the grammar is complete, its stop strings and stop tokens may end the text.

        Raises:
            GrammarError: As `compile`.
        """
        import xgrammar

        compiled = self.compile(grammar)
        vocabulary = self._vocabulary
        endings = Endings(
            end_tokens=vocabulary.tokens(self._rules.eos_token_ids),
            stop_tokens=vocabulary.tokens(self._rules.stop_token_ids(params)),
            stop_strings=tuple(map(vocabulary.beginning_with, params.stop)),
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
        )
        return GrammarMatcher(
            lambda: xgrammar.GrammarMatcher(compiled),
            endings,
            vocabulary.special_token_ids,
            is_byte_exact=not self._rules.decoder.needs_context,
        )

    def _start(self, grammar: Grammar, entry: "Future[Any]") -> None:
        if not self._compiling.acquire(timeout=self._max_seconds):
            with self._lock:
                self._cache.pop(grammar, None)
            entry.set_exception(_too_slow(grammar, self._max_seconds))
            return
        # Not a pool: its threads would be waited for when the process ends.
        threading.Thread(target=self._run, args=(grammar, entry), name="compile-grammar", daemon=True).start()

    def _run(self, grammar: Grammar, entry: "Future[Any]") -> None:
        try:
            compiled = self._compile(grammar)
        except ExpertError as error:
            entry.set_exception(error)
        except Exception as error:  # noqa: BLE001  # a foreign compiler: whatever it raises belongs to who waits
            entry.set_exception(not_valid(grammar, error))
        else:
            entry.set_result(compiled)
        finally:
            self._compiling.release()

    def _compile(self, grammar: Grammar) -> Any:
        check_grammar(grammar)
        if grammar.kind == "json_schema":
            compiled = self._compiler.compile_json_schema(grammar.text, max_whitespace_cnt=MAX_WHITESPACE)
        elif grammar.kind == "regex":
            compiled = self._compiler.compile_regex(grammar.text)
        else:
            compiled = self._compiler.compile_grammar(grammar.text)
        if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
            raise GrammarError(
                f"the {NAMES[grammar.kind]} takes {compiled.memory_size_bytes >> 20:,} MiB when compiled",
                hint=f"Give a smaller one; at most {MAX_COMPILED_BYTES >> 20} MiB are allowed.",
            )
        return compiled

    def _evict(self) -> None:
        """Forget the grammars that were not asked for for longest."""
        done = [(grammar, entry) for grammar, entry in self._cache.items() if entry.done()]
        sizes = [0 if entry.exception() else int(entry.result().memory_size_bytes) for _, entry in done]
        total = sum(sizes)
        for (grammar, _), size in zip(done, sizes, strict=True):
            if total <= MAX_CACHED_BYTES and len(self._cache) <= self._max_cached:
                break
            del self._cache[grammar]
            total -= size


class _Vocabulary:
    """The tokens that the compiler knows, and sets of them."""

    def __init__(self, info: Any) -> None:
        self.info = info
        self.special_token_ids = frozenset(info.special_token_ids)
        self.tokens = functools.lru_cache(maxsize=64)(lambda token_ids: TokenSet(token_ids, info.vocab_size))
        self.beginning_with = functools.lru_cache(maxsize=64)(self._beginning_with)

    def _beginning_with(self, text: str) -> TokenSet:
        wanted = text.encode()
        first = bisect.bisect_left(self._sorted, wanted, key=lambda pair: pair[0])
        pairs = itertools.takewhile(
            lambda pair: pair[0].startswith(wanted), itertools.islice(self._sorted, first, None)
        )
        return TokenSet((token_id for _, token_id in pairs), self.info.vocab_size)

    @functools.cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        return sorted((token, token_id) for token_id, token in enumerate(self.info.decoded_vocab))


def _tokenizer_info(tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> Any:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(eos_token_ids)
    )
    # Special tokens have no text in an answer, and may not stand in for it in a grammar.
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    vocabulary = [b"" if token_id in special else token for token_id, token in enumerate(info.decoded_vocab)]
    return xgrammar.TokenizerInfo(
        vocabulary,
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=sorted(eos_token_ids),
        add_prefix_space=info.add_prefix_space,
    )


def _too_slow(grammar: Grammar, seconds: float) -> GrammarError:
    return GrammarError(
        f"the {NAMES[grammar.kind]} takes more than {seconds:g} seconds to compile", hint="Give a smaller one."
    )
