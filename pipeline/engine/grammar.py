"""Keeping the text of a request inside its grammar, with xgrammar."""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import GrammarError, MissingDependencyError
from pipeline.package.package import MAX_GRAMMAR_BYTES

logger = logging.getLogger(__name__)

INSTALL_HINT = 'Install it: pip install "expert-pipeline[grammar]"'


def is_available() -> bool:
    """Whether xgrammar is installed."""
    return importlib.util.find_spec("xgrammar") is not None


@functools.cache
def warn_not_applied(label: str, why: str) -> None:
    """Say once that a package's manifest asks for a grammar which cannot be applied."""
    logger.warning("the manifest of %s asks for a grammar, %s; its answers are not constrained", label, why)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, each once.

    Args:
        tokenizer: The Hugging Face tokenizer.
        vocab_size: The number of the model's logits, which may exceed the tokenizer's vocabulary.
        eos_token_ids: The tokens that end a text which the grammar accepts.

    Raises:
        MissingDependencyError: xgrammar is not installed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        if not is_available():
            raise MissingDependencyError("a grammar is asked for, and xgrammar is not installed", hint=INSTALL_HINT)
        import xgrammar

        self._tokenizer = tokenizer
        self._info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(eos_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=2, cache_enabled=False)
        self._compiled: dict[str, Any] = {}
        self._starts: dict[str, torch.Tensor] = {}

    def matcher(self, grammar: str, stop: Sequence[str] = ()) -> "GrammarMatcher":
        """A fresh matcher for one sequence.

        Args:
            grammar: The grammar in GBNF.
            stop: Stop strings; where the grammar could end, a token that begins with one of them may end it too.

        Raises:
            GrammarError: The grammar is empty, too large or not valid.
        """
        import xgrammar

        if grammar not in self._compiled:
            self._compiled[grammar] = self._compile(grammar)
        return GrammarMatcher(xgrammar.GrammarMatcher(self._compiled[grammar]), self._enders(stop))

    def _compile(self, grammar: str) -> Any:
        size = len(grammar.encode())
        if not grammar.strip() or size > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"the grammar has {size:,} bytes", hint=f"Give a GBNF grammar of 1 to {MAX_GRAMMAR_BYTES:,} bytes."
            )
        try:
            return self._compiler.compile_grammar(grammar)
        except RuntimeError as error:
            raise GrammarError(
                "the grammar is not valid GBNF",
                details=str(error).splitlines()[:5],
                hint="Correct the rule named above.",
            ) from error

    def _enders(self, stop: Sequence[str]) -> torch.Tensor | None:
        """The tokens that begin with a stop string, as a bit mask."""
        unknown = [text for text in stop if text not in self._starts]
        if unknown:
            vocabulary = self._info.decoded_vocab
            for text in unknown:
                wanted = text.encode()
                ids = [at for at, token in enumerate(vocabulary) if token.startswith(wanted)]
                self._starts[text] = _bitmask(ids, self._info.vocab_size)
        return functools.reduce(torch.bitwise_or, (self._starts[text] for text in stop)) if stop else None


class GrammarMatcher:
    """Where one sequence stands in its grammar.

    Args:
        matcher: xgrammar's matcher.
        enders: Tokens that may stand where the grammar could end, as a bit mask [words], or None.
    """

    def __init__(self, matcher: Any, enders: torch.Tensor | None) -> None:
        self._matcher = matcher
        self._enders = enders

    def accept(self, token_id: int) -> None:
        """Move on by one generated token."""
        if not self._matcher.accept_token(token_id):
            raise GrammarError(
                f"token {token_id} does not continue the grammar",
                hint="Report this: the mask should have prevented it.",
            )

    def fill_(self, bitmask: torch.Tensor, row: int) -> None:
        """Set the bits of the tokens that may come next in `bitmask[row]`."""
        self._matcher.fill_next_token_bitmask(bitmask, row)
        if self._enders is not None and self._matcher.is_completed():
            bitmask[row] |= self._enders


def mask_logits_(
    logits: torch.Tensor,  # [rows, vocab]
    matchers: Sequence[GrammarMatcher | None],
) -> None:
    """Set the score of every token that a row's grammar forbids to minus infinity; rows without one are left alone."""
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return
    import xgrammar

    bitmask = xgrammar.allocate_token_bitmask(len(matchers), logits.shape[-1])  # [rows, words], on the CPU
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.fill_(bitmask, row)
    xgrammar.apply_token_bitmask_inplace(logits, bitmask.to(logits.device), indices=rows)


def _bitmask(token_ids: Sequence[int], vocab_size: int) -> torch.Tensor:  # [words], int32
    allowed = torch.zeros((vocab_size + 31) // 32 * 32, dtype=torch.int64)
    allowed[list(token_ids)] = 1
    words = (allowed.view(-1, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
