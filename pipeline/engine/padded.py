"""The reference engine: stock `generate` over length-sorted, left-padded batches.

It is simple and slow, runs whatever transformers runs, and is the oracle for the packed engine. The choice of the next
token and the end of a sequence are ours, plugged into `generate` as a logits processor and a stopping criterion, so
that every row of a batch follows its own rules.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pipeline.engine.choose import choose_tokens_
from pipeline.engine.foreign import is_out_of_memory
from pipeline.engine.grammar_compiler import GrammarCompiler
from pipeline.engine.handle import Handle
from pipeline.engine.loader import BaseModel
from pipeline.engine.memory import free_memory
from pipeline.engine.sequence import Sequence, failed, start
from pipeline.engine.stats import EngineStats
from pipeline.engine.stopping import StopRules
from pipeline.engine.together import default_batch_size
from pipeline.engine.types import Completion, Failure, Grammar, Request
from pipeline.errors import ExpertError, InferenceError, InvalidRequestError, OutOfMemoryError


class PaddedEngine:
    """Answers requests in padded batches.

    Args:
        base: The model, with its adapter merged.
        tokenizer: Decodes what it generates.
        batch_size: At most this many sequences are answered together; None for what suits the device.
        max_batch_tokens: At most this many tokens a batch, padding and room for the answers included. A single request
            that needs more is answered alone.
    """

    def __init__(
        self, base: BaseModel, tokenizer: Any, *, batch_size: int | None = None, max_batch_tokens: int = 16384
    ) -> None:
        self._base: BaseModel | None = base
        self._tokenizer = tokenizer
        self._batch_size = default_batch_size(base.device.type) if batch_size is None else batch_size
        self._max_batch_tokens = max_batch_tokens
        self._rules = StopRules(tokenizer, base.eos_token_ids)
        is_padded = tokenizer.pad_token_id is not None
        self._pad_token_id = tokenizer.pad_token_id if is_padded else min(self._rules.eos_token_ids, default=0)
        self._vocab_size = int(base.model.config.vocab_size)
        self._compiler: GrammarCompiler | None = None
        self._turn = threading.Lock()  # one batch at a time
        self._stats = EngineStats()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, yielding each batch's completions as it finishes; see `pipeline.engine.Engine`."""
        waiting: list[Sequence] = []
        for request in requests:
            try:
                waiting += self._start(request)
            except ExpertError as error:
                failure = Failure(error.code, error.message)
                yield from (failed(request, failure, index) for index in range(request.params.n))
        waiting.sort(key=lambda sequence: len(sequence.request.prompt_token_ids))
        for batch in self._batches(waiting):
            with self._turn:
                answers = list(self._answer(batch))
                self._stats = replace(self._stats, num_running=0)
            yield from answers

    def submit_all(self, requests: Iterable[Request]) -> list[Handle]:
        """Answer requests together, and give the finished handle of each, in order; none can be cancelled.

        Args:
            requests: No two have the same id.
        """
        handles = {request.id: Handle(request, lambda _: None) for request in requests}
        for completion in self.generate([handle.request for handle in handles.values()]):
            handles[completion.request_id].finish(completion)
        return list(handles.values())

    def stats(self) -> EngineStats:
        """What the engine is doing now: the rows of its batch, and the steps and tokens since the beginning."""
        return self._stats

    def close(self) -> None:
        """Free the device."""
        self._base = self._compiler = None
        free_memory()

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar ahead of the requests that use it.

        Raises:
            GrammarError: It is not valid.
        """
        self._grammars().compile(grammar)

    def _start(self, request: Request) -> list[Sequence]:
        if request.expert is not None:
            raise InvalidRequestError(
                f"expert {request.expert!r} is asked for, and this engine holds one merged expert",
                hint="Use the packed engine for several experts, or leave the expert out.",
            )
        if max(request.prompt_token_ids, default=0) >= self._vocab_size:
            raise InvalidRequestError(
                "the prompt has soft-prompt positions, which the padded engine does not apply",
                hint="Use the packed engine.",
            )
        sequences = start(request, self._rules)
        for sequence in sequences:
            self._hold(sequence)
        return sequences

    def _hold(self, sequence: Sequence) -> None:
        """Hold a sequence to its request's grammar, from the beginning."""
        request = sequence.request
        if request.grammar is not None:
            sequence.matcher = self._grammars().matcher(request.grammar, request.params)

    def _again(self, sequence: Sequence) -> Sequence:
        """The same answer, from the beginning."""
        fresh = Sequence(sequence.request, self._rules.checker(sequence.request.params), sequence.index)
        self._hold(fresh)
        return fresh

    def _grammars(self) -> GrammarCompiler:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._rules)
        return self._compiler

    @property
    def _model(self) -> BaseModel:
        if self._base is None:
            raise InferenceError("the engine is closed", hint="Load the expert again.")
        return self._base

    def _batches(self, waiting: Rows[Sequence]) -> Iterator[list[Sequence]]:
        """Cut sequences, sorted by length, into batches within the limits.

        A batch stays within the model's context too: `generate` feeds every row until the last one is finished.
        """
        batch: list[Sequence] = []
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

    def _answer(self, batch: list[Sequence]) -> Iterator[Completion]:
        what_failed = self._try(batch)
        if what_failed is None:
            yield from (sequence.completion() for sequence in batch)
            return
        free_memory()
        if len(batch) == 1:
            batch[0].fail(_out_of_memory(batch[0].request, what_failed))
            yield batch[0].completion()
            return
        # Halve until the row that does not fit stands alone; the others are answered.
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from self._answer([self._again(sequence) for sequence in half])

    def _try(self, batch: list[Sequence]) -> str | None:
        """Run a batch; what the device said if its memory was too small, without the error that would hold it."""
        try:
            self._run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    def _count(self, num_tokens: int) -> None:
        stats = self._stats
        self._stats = replace(
            stats,
            num_running=num_tokens,
            num_steps=stats.num_steps + 1,
            num_tokens_generated=stats.num_tokens_generated + num_tokens,
        )

    @torch.inference_mode()
    def _run(self, batch: list[Sequence]) -> None:
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
            logits_processor=LogitsProcessorList([_ChooseToken(batch, self._count)]),
            stopping_criteria=StoppingCriteriaList([_EndOfSequence(batch)]),
        )


class _ChooseToken(LogitsProcessor):
    """Leaves each row one token to choose, and hands it to its sequence."""

    def __init__(self, batch: Rows[Sequence], count: Callable[[int], None]) -> None:
        self._batch = batch
        self._count = count

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        choices = choose_tokens_(scores.clone(), self._batch)
        for sequence, choice in zip(self._batch, choices, strict=True):
            sequence.append(choice)
        self._count(len(choices))
        chosen = torch.tensor([choice.token_id for choice in choices], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EndOfSequence(StoppingCriteria):
    """Tells `generate` which rows are finished."""

    def __init__(self, batch: Rows[Sequence]) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([sequence.is_finished for sequence in self._batch], device=input_ids.device)


def _out_of_memory(request: Request, what_failed: str) -> OutOfMemoryError:
    tokens = len(request.prompt_token_ids) + request.params.max_tokens
    return OutOfMemoryError(
        f"one request of {tokens:,} tokens (prompt and answer) does not fit the device's memory",
        details=(what_failed,),
        hint="Lower max_tokens, shorten the prompt, or use a device with more memory.",
    )
