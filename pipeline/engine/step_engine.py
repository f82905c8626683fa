"""The step loop: schedule, run, choose. One thread at a time; `packed` is its front for many."""

import logging
import time
from collections.abc import Iterable

import torch

from pipeline.engine.adapter_step import REPLAYED_ROWS
from pipeline.engine.adapters import AdapterBank
from pipeline.engine.choose import choose_tokens_
from pipeline.engine.foreign import is_out_of_memory
from pipeline.engine.memory import free_memory
from pipeline.engine.prefixes import Prompt, plan_prefixes
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.sequence import Sequence
from pipeline.engine.stats import EngineStats
from pipeline.engine.steps import Entry, Step
from pipeline.errors import AdapterError, ExpertError, InvalidRequestError, OutOfMemoryError, PromptTooLongError

logger = logging.getLogger(__name__)

# A step that is too long to be replayed takes, on an H200, 36 ms for the 0.6B shape where a replayed one takes 4.
REFILL_SHARE = 0.25


class StepEngine:
    """Answers many sequences together, a token of each at a step.

    Args:
        runner: Computes.
        context_length: Prompt and answer together have at most this many tokens.
        bank: The experts that requests may name; None where one is merged into the model, or none is wanted.
        max_running: At most this many sequences at once.
        max_step_tokens: At most this many tokens a step.
    """

    def __init__(
        self,
        runner: Runner,
        context_length: int,
        *,
        bank: AdapterBank | None = None,
        max_running: int,
        max_step_tokens: int,
    ) -> None:
        runner.bank = bank
        self._runner = runner
        self._bank = bank
        self._context_length = context_length
        self.scheduler = Scheduler(
            runner.cache.num_tokens,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            refill_share=REFILL_SHARE if self.is_recorded else 0.0,
            short_step_tokens=REPLAYED_ROWS if self.is_recorded else 0,
        )
        self.num_tokens_computed = 0  # since the beginning, recomputed ones counted again
        self._num_steps = 0
        self._num_generated = 0
        self._digests: dict[str, str] = {}  # of the experts that have answered
        self._sequences: dict[Entry, Sequence] = {}
        self._entries: dict[Sequence, Entry] = {}

    @property
    def is_recorded(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self._runner.graphs is not None

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished."""
        return bool(self._entries)

    def stats(self) -> EngineStats:
        """What it is doing; may be asked for from any thread."""
        slots = self.scheduler.slots
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_kv_tokens_used=slots.num_used,
            num_kv_tokens=slots.num_tokens,
            num_steps=self._num_steps,
            num_tokens_computed=self.num_tokens_computed,
            num_tokens_generated=self._num_generated,
        )

    def add(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Take sequences that have not begun; those that cannot be answered are returned, failed."""
        refused, taken = [], []
        for sequence in sequences:
            try:
                self._check(sequence)
                taken.append(sequence)
            except ExpertError as error:
                sequence.fail(error)
                refused.append(sequence)
        requests = [sequence.request for sequence in taken]
        planned = plan_prefixes([Prompt(one.expert, one.prompt_token_ids, one.prefix_length) for one in requests])
        for sequence, request, length in zip(taken, requests, planned, strict=True):
            kept = self.scheduler.find_prefix(request.expert, request.prompt_token_ids)
            entry = Entry(
                request.expert,
                request.prompt_token_ids,
                max(length, kept),
                request.params.max_tokens,
                generated=sequence.token_ids,
            )
            self._entries[sequence] = entry
            self._sequences[entry] = sequence
            self.scheduler.add([entry])
        return refused

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence, whatever its state; it is finished with what there is."""
        sequence.cancel()
        self._forget(sequence)

    def step(self) -> list[Sequence]:
        """Compute one step; the sequences that it advanced, some of them finished."""
        step = self.scheduler.schedule()
        self._num_steps += 1
        self._note_begun(step)
        advanced = [self._too_large(entry) for entry in step.too_large]
        scores = self._run(step) if step.chunks else None
        if scores is not None:
            self.num_tokens_computed += sum(chunk.count for chunk in step.chunks)
            sampling = [chunk.owner for chunk in step.chunks if chunk.samples]
            chosen = [self._sequences[entry] for entry in sampling if isinstance(entry, Entry)]
            choices = choose_tokens_(scores, chosen) if chosen else []
            for sequence, choice in zip(chosen, choices, strict=True):
                sequence.append(choice)
            self._num_generated += len(chosen)
            advanced += chosen
        else:
            self._runner.cache.free(step.freed)  # nothing was run, or it failed before it came to this
            advanced += self._lower_limits(step) if step.chunks else []
        for sequence in advanced:
            if sequence.is_finished:
                self._forget(sequence)
        return advanced

    def _note_begun(self, step: Step) -> None:
        now = time.monotonic()
        for chunk in step.chunks:
            if chunk.start == 0 and isinstance(chunk.owner, Entry):
                sequence = self._sequences[chunk.owner]
                sequence.begun_at = sequence.begun_at or now

    def _run(self, step: Step) -> torch.Tensor | None:
        """The scores; None where the device's memory was too small for the step."""
        try:
            return self._runner.run(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside of the handlers, so that nothing holds the failed step's tensors

    def _lower_limits(self, step: Step) -> list[Sequence]:
        """Make steps smaller after one that did not fit; the sequence that does not even fit alone fails."""
        scheduler = self.scheduler
        scheduler.rerun(step.chunks)
        self._runner.clear()
        free_memory()
        if scheduler.max_running > 1 or scheduler.max_step_tokens > 1:
            scheduler.max_running = max(scheduler.max_running // 2, 1)
            scheduler.max_step_tokens = max(scheduler.max_step_tokens // 2, 1)
            logger.warning(
                "the device ran out of memory: at most %d sequences and %d tokens a step from now on",
                scheduler.max_running,
                scheduler.max_step_tokens,
            )
            return []
        owners = [chunk.owner for chunk in step.chunks]
        alone = next((owner for owner in owners if isinstance(owner, Entry)), None)
        entry = alone or min(self._sequences, key=lambda waiting: waiting.arrival)
        return [self._too_large(entry)]

    def _check(self, sequence: Sequence) -> None:
        request = sequence.request
        length, room = len(request.prompt_token_ids), self._context_length
        if length == 0:
            raise InvalidRequestError("the prompt has no tokens", hint="Give at least one token.")
        if length + request.params.max_tokens > room:
            raise PromptTooLongError(
                f"the prompt has {length:,} tokens and the answer may have {request.params.max_tokens:,}; the model's "
                f"context holds {room:,}",
                hint="Shorten the prompt or lower max_tokens.",
            )
        if not self._runner.soft_prompts.is_known(request.prompt_token_ids):
            raise InvalidRequestError(
                "the prompt has an id that is neither a token nor of a soft prompt of this engine",
                hint="Tokenise it with the expert's tokenizer.",
            )
        if request.expert is None:
            return
        if self._bank is None or request.expert not in self._bank:
            names = self._bank.names() if self._bank is not None else ()
            raise AdapterError(
                f"this engine holds no expert {request.expert!r}",
                hint=f"Load it first; loaded are: {', '.join(names) or 'none'}.",
            )
        self._bank.acquire(request.expert)
        digest = self._bank.info(request.expert).digest
        if self._digests.setdefault(request.expert, digest) != digest:
            self.scheduler.forget_prefixes(request.expert)  # they are of another expert that had the name
            self._digests[request.expert] = digest

    def _too_large(self, entry: Entry) -> Sequence:
        sequence = self._sequences[entry]
        tokens = len(entry.prompt) + entry.num_generated
        cache = self._runner.cache
        sequence.fail(
            OutOfMemoryError(
                f"one sequence of {tokens:,} tokens does not fit the memory for keys and values, which holds "
                f"{cache.num_tokens:,} tokens of {cache.num_bytes_per_token:,} bytes each",
                hint="Raise kv_cache_bytes, lower max_tokens, shorten the prompt, or use a device with more memory.",
            )
        )
        return sequence

    def _forget(self, sequence: Sequence) -> None:
        entry = self._entries.pop(sequence, None)
        if entry is None:
            return
        del self._sequences[entry]
        self.scheduler.remove(entry)
        if self._bank is not None and entry.expert is not None:
            self._bank.release(entry.expert)
