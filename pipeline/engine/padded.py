"""The reference engine: stock `generate` over length-sorted, left-padded batches.

It is simple and slow, runs whatever transformers runs, and is the oracle for the packed engine. The choice of the next
token and the end of a sequence are ours, plugged into `generate` as a logits processor and a stopping criterion, so
that every row of a batch follows its own rules.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pipeline.engine.grammar import GrammarCompiler, GrammarMatcher, mask_logits_
from pipeline.engine.loader import BaseModel, free_memory
from pipeline.engine.sampling import penalise_repetition, sample
from pipeline.engine.sequence import Sequence as TokenSequence
from pipeline.engine.stopping import StopChecker
from pipeline.engine.types import Completion, Failure, Request
from pipeline.errors import ExpertError, InferenceError, OutOfMemoryError


class PaddedEngine:
    """Answers requests in padded batches.

    Args:
        base: The model, with its adapter merged.
        tokenizer: Decodes what it generates.
        batch_size: At most this many sequences are answered together.
        max_batch_tokens: At most this many tokens a batch, padding and room for the answers included. A single request
            that needs more is answered alone.
    """

    def __init__(self, base: BaseModel, tokenizer: Any, *, batch_size: int = 64, max_batch_tokens: int = 16384) -> None:
        self._base: BaseModel | None = base
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_batch_tokens = max_batch_tokens
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._eos_token_ids = base.eos_token_ids | frozenset(own_eos)
        self._pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._eos_token_ids)
        self._added_tokens: dict[str, int] = tokenizer.get_added_vocab()
        self._compiler: GrammarCompiler | None = None

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, yielding each batch's completions as it finishes; see `pipeline.engine.Engine`."""
        waiting = []
        for request in requests:
            try:
                waiting.append(self._start(request))
            except ExpertError as error:
                yield _failed(request, error)
        waiting.sort(key=lambda sequence: len(sequence.request.prompt_token_ids))
        for batch in self._batches(waiting):
            yield from self._answer(batch)

    def close(self) -> None:
        """Free the device."""
        self._base = self._compiler = None
        free_memory()

    def check_grammar(self, grammar: str) -> None:
        """Compile a grammar ahead of the requests that use it.

        Raises:
            GrammarError: It is not valid.
        """
        self._grammars().matcher(grammar)

    def _start(self, request: Request) -> TokenSequence:
        stop = request.params.stop
        # A stop string that is a control token has no text to be found in; its token ends the sequence.
        control = frozenset(self._added_tokens[text] for text in stop if text in self._added_tokens)
        stopping = StopChecker(self._tokenizer, self._eos_token_ids | control, stop, request.params.max_tokens)
        return TokenSequence(request, stopping, self._matcher(request))

    def _matcher(self, request: Request) -> GrammarMatcher | None:
        if request.grammar is None:
            return None
        return self._grammars().matcher(request.grammar, request.params.stop)

    def _grammars(self) -> GrammarCompiler:
        if self._compiler is None:
            vocab_size = self._model.model.config.vocab_size
            self._compiler = GrammarCompiler(self._tokenizer, vocab_size, self._eos_token_ids)
        return self._compiler

    @property
    def _model(self) -> BaseModel:
        if self._base is None:
            raise InferenceError("the engine is closed", hint="Load the expert again.")
        return self._base

    def _batches(self, waiting: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
        """Cut sequences, sorted by length, into batches within the limits.

        A batch stays within the model's context too: `generate` feeds every row until the last one is finished.
        """
        batch: list[TokenSequence] = []
        room = 0
        for sequence in waiting:
            request = sequence.request
            answer = max(room, request.params.max_tokens)
            length = len(request.prompt_token_ids) + answer
            is_full = len(batch) == self._batch_size or length * (len(batch) + 1) > self._max_batch_tokens
            if batch and (is_full or length > self._model.context_length):
                yield batch
                batch, answer = [], request.params.max_tokens
            batch.append(sequence)
            room = answer
        if batch:
            yield batch

    def _answer(self, batch: list[TokenSequence]) -> Iterator[Completion]:
        what_failed = self._try(batch)
        if what_failed is None:
            yield from (sequence.completion() for sequence in batch)
            return
        free_memory()
        if len(batch) == 1:
            yield _failed(batch[0].request, _out_of_memory(batch[0].request, what_failed))
            return
        # Halve until the row that does not fit stands alone; the others are answered.
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from self._answer([self._start(sequence.request) for sequence in half])

    def _try(self, batch: list[TokenSequence]) -> str | None:
        """Run a batch; what the device said if its memory was too small, without the error that would hold it."""
        try:
            self._run(batch)
        except torch.OutOfMemoryError as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    @torch.inference_mode()
    def _run(self, batch: list[TokenSequence]) -> None:
        device = self._model.device
        prompts = [sequence.request.prompt_token_ids for sequence in batch]
        longest = max(map(len, prompts))
        input_ids = torch.full((len(batch), longest), self._pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, token_ids in enumerate(prompts):
            input_ids[row, longest - len(token_ids) :] = torch.tensor(token_ids)
            attention_mask[row, longest - len(token_ids) :] = 1
        self._model.model.generate(
            input_ids=input_ids.to(device),  # [rows, longest]
            attention_mask=attention_mask.to(device),
            do_sample=False,
            max_new_tokens=max(sequence.request.params.max_tokens for sequence in batch),
            pad_token_id=self._pad_token_id,
            logits_processor=LogitsProcessorList([_ChooseToken(batch)]),
            stopping_criteria=StoppingCriteriaList([_EndOfSequence(batch)]),
        )


class _ChooseToken(LogitsProcessor):
    """Leaves each row one token to choose: the one its grammar, penalties and sampling give."""

    def __init__(self, batch: Sequence[TokenSequence]) -> None:
        self._batch = batch

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        params = [sequence.request.params for sequence in self._batch]
        seen = [
            [] if options.repetition_penalty == 1.0 else [*sequence.request.prompt_token_ids, *sequence.token_ids]
            for sequence, options in zip(self._batch, params, strict=True)
        ]
        scores = penalise_repetition(scores, seen, params)
        mask_logits_(scores, [None if sequence.is_finished else sequence.matcher for sequence in self._batch])
        chosen = sample(scores, params, [sequence.num_generated for sequence in self._batch])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EndOfSequence(StoppingCriteria):
    """Hands each row its newest token and tells `generate` which rows are finished."""

    def __init__(self, batch: Sequence[TokenSequence]) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        for sequence, token_id in zip(self._batch, input_ids[:, -1].tolist(), strict=True):
            if not sequence.is_finished:
                sequence.append(token_id)
        return torch.tensor([sequence.is_finished for sequence in self._batch], device=input_ids.device)


def _failed(request: Request, error: ExpertError) -> Completion:
    failure = Failure(error.code, error.message)
    return Completion(request.id, "", "error", len(request.prompt_token_ids), 0, failure)


def _out_of_memory(request: Request, what_failed: str) -> OutOfMemoryError:
    tokens = len(request.prompt_token_ids) + request.params.max_tokens
    return OutOfMemoryError(
        f"one request of {tokens:,} tokens (prompt and answer) does not fit the device's memory",
        details=(what_failed,),
        hint="Lower max_tokens, shorten the prompt, or use a device with more memory.",
    )
