"""Where a sequence stands in its grammar, and the tokens that the grammars of a whole batch allow next."""

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import GrammarError

MAX_MATCH_SECONDS = 10.0


class TokenSet:
    """A set of tokens of one vocabulary.

    Args:
        token_ids: Those that are in it; one that is not in the vocabulary is left out.
        vocab_size: The number of the model's logits.

    `bits` is the set as xgrammar's bit mask, [words] in int32.
    """

    def __init__(self, token_ids: Iterable[int], vocab_size: int) -> None:
        self.token_ids = frozenset(token_id for token_id in token_ids if token_id < vocab_size)
        flags = torch.zeros((vocab_size + 31) // 32 * 32, dtype=torch.int64)
        flags[list(self.token_ids)] = 1
        words = (flags.view(-1, 32) << torch.arange(32)).sum(dim=-1)
        self.bits = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@dataclass(frozen=True)
class Endings:
    """What may end a text besides its grammar's own end.

    Args:
        end_tokens: The model's end tokens.
        stop_tokens: The request's stop tokens.
        stop_strings: For each of the request's stop strings, the tokens that begin with it.
        min_tokens: Nothing ends the text before this many tokens, while the grammar allows anything else.
        ignore_eos: Whether an end token is left for when the grammar allows nothing else.
    """

    end_tokens: TokenSet
    stop_tokens: TokenSet
    stop_strings: tuple[TokenSet, ...]
    min_tokens: int
    ignore_eos: bool

    @property
    def are_plain(self) -> bool:
        """Whether the model's end token, at any time, is all there is."""
        has_stops = bool(self.stop_tokens.token_ids) or bool(self.stop_strings)
        return not has_stops and self.min_tokens == 0 and not self.ignore_eos

    def added(self, num_generated: int) -> list[TokenSet]:
        """The tokens that may end a complete text of so many tokens, besides those its grammar allows."""
        added = list(self.stop_strings) if num_generated + 1 >= self.min_tokens else []
        return [*added, self.stop_tokens] if num_generated >= self.min_tokens else added

    def is_barred(self, token_id: int, num_generated: int) -> bool:
        """Whether a token may follow a complete text of so many tokens only where nothing else can."""
        if num_generated < self.min_tokens:
            return token_id in self.end_tokens.token_ids or token_id in self.stop_tokens.token_ids
        is_end = token_id in self.end_tokens.token_ids and token_id not in self.stop_tokens.token_ids
        return self.ignore_eos and is_end

    def apply_(self, allowed: torch.Tensor, num_generated: int) -> None:
        """Let a complete text end, or keep it from ending.

        Args:
            allowed: The tokens that its grammar allows, the end included, [words]; changed in place.
            num_generated: How many tokens there are already.
        """
        for tokens in self.added(num_generated):
            allowed |= tokens.bits
        if num_generated < self.min_tokens:
            barred = self.end_tokens.bits | self.stop_tokens.bits
        elif self.ignore_eos:
            barred = self.end_tokens.bits & ~self.stop_tokens.bits
        else:
            return
        others = allowed & ~barred
        if others.any():
            allowed.copy_(others)


class GrammarMatcher:
    """Where one sequence stands in its grammar.

    Args:
        fresh: Makes a matcher of xgrammar that has read nothing.
        endings: What may end the text where the grammar is complete.
        special_token_ids: The tokens without a text, which no grammar allows.
        is_byte_exact: Whether the text of tokens is always their bytes; else a finished text is checked once more.
        max_seconds: Following the grammar may take this long for the whole text: some grammars can be read in so many
            ways that each token takes longer than the one before.
    """

    def __init__(
        self,
        fresh: Callable[[], Any],
        endings: Endings,
        special_token_ids: frozenset[int] = frozenset(),
        *,
        is_byte_exact: bool = True,
        max_seconds: float = MAX_MATCH_SECONDS,
    ) -> None:
        self._fresh = fresh
        self._matcher = fresh()
        self._endings = endings
        self._is_plain = endings.are_plain
        self._special_token_ids = special_token_ids - endings.end_tokens.token_ids
        self._seconds_left = max_seconds
        self.is_byte_exact = is_byte_exact

    @property
    def raw(self) -> Any:
        """xgrammar's matcher."""
        return self._matcher

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is one of the grammar."""
        return bool(self._matcher.is_completed())

    def accept(self, token_id: int) -> bool:
        """Move on by one generated token; False if the grammar does not allow it.

        Raises:
            GrammarError: Following the grammar has taken too long.
        """
        started = time.monotonic()
        is_accepted = bool(self._matcher.accept_token(token_id))
        self._spend(started)
        return is_accepted

    def accepts(self, text: str) -> bool:
        """Whether a text is one of the grammar, wherever the sequence stands.

        Raises:
            GrammarError: Following the grammar has taken too long.
        """
        started = time.monotonic()
        matcher = self._fresh()
        is_accepted = (not text or bool(matcher.accept_string(text))) and bool(matcher.is_completed())
        self._spend(started)
        return is_accepted

    def first_allowed(self, token_ids: Iterable[int], num_generated: int, count: int = 1) -> list[int] | None:
        """The first `count` of these tokens that may come next; None where there are fewer for sure.

        Looking at a few likely tokens takes microseconds, where the mask of a whole vocabulary takes up to a tenth of
        a second in a state that allows most words. The answer is that of the mask.

        Args:
            token_ids: Best first.
            num_generated: How many tokens there are already.
            count: How many are wanted.
        """
        started = time.monotonic()
        endings = None if self._is_plain or not self.is_complete else self._endings
        added = endings.added(num_generated) if endings is not None else []
        found: list[int] = []
        for token_id in token_ids:
            if endings is not None and endings.is_barred(token_id, num_generated):
                continue
            if any(token_id in tokens.token_ids for tokens in added) or self._is_next(token_id):
                found.append(token_id)
                if len(found) == count:
                    break
        self._seconds_left -= time.monotonic() - started
        return found if len(found) == count else None

    def finish_(self, allowed: torch.Tensor, num_generated: int) -> None:
        """See `Endings.apply_`; called with what the grammar allows."""
        if not self._is_plain and self.is_complete:
            self._endings.apply_(allowed, num_generated)

    def _is_next(self, token_id: int) -> bool:
        if token_id in self._special_token_ids or not self._matcher.accept_token(token_id):
            return False
        self._matcher.rollback(1)
        return True

    def _spend(self, started: float) -> None:
        self._seconds_left -= time.monotonic() - started
        if self._seconds_left < 0:
            raise GrammarError(
                "following the grammar takes too long",
                hint="Give a grammar that reads each text in few ways: no rule like (a*)* or r ::= r r.",
            )


def mask_grammars_(
    logits: torch.Tensor,  # [rows, vocab]
    held: Sequence[tuple[int, GrammarMatcher, int]],
) -> None:
    """Set the score of every token that a row's grammar forbids to minus infinity.

    Args:
        logits: float32, bfloat16 or float16; changed in place.
        held: A row, its matcher and how many tokens the row has already; other rows are left alone.
    """
    if not held:
        return
    import xgrammar

    rows = [row for row, _, _ in held]
    bitmask = xgrammar.allocate_token_bitmask(len(logits), logits.shape[-1])  # [rows, words], on the CPU
    _filler().batch_fill_next_token_bitmask([matcher.raw for _, matcher, _ in held], bitmask, rows)
    for row, matcher, num_generated in held:
        matcher.finish_(bitmask[row], num_generated)
    if logits.device.type == "cpu":
        dense = [row for row in rows if not _mask_sparse_(logits, row, bitmask[row])]
        if dense:
            xgrammar.apply_token_bitmask_inplace(logits, bitmask, indices=dense)
        return
    logits[rows] = logits[rows].masked_fill_(~unpack(bitmask[rows].to(logits.device), logits.shape[-1]), -torch.inf)


def unpack(bits: torch.Tensor, vocab_size: int) -> torch.Tensor:  # [rows, words] -> [rows, vocab]
    """Bit masks as flags, on any device."""
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :vocab_size] == 1


def _mask_sparse_(logits: torch.Tensor, row: int, mask: torch.Tensor) -> bool:
    """Mask a row of which few tokens are allowed, many times faster than xgrammar's kernel; False where many are."""
    octets = mask.numpy().view(np.uint8)
    allowed = np.flatnonzero(np.unpackbits(octets, count=logits.shape[-1], bitorder="little"))
    if len(allowed) * 8 > logits.shape[-1]:
        return False
    token_ids = torch.from_numpy(allowed)
    values = logits[row, token_ids]
    logits[row] = -torch.inf
    logits[row, token_ids] = values
    return True


@functools.cache
def _filler() -> Any:
    import xgrammar

    return xgrammar.BatchGrammarMatcher(max(1, (os.cpu_count() or 2) // 2))
