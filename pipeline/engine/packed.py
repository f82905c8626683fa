"""The packed engine: continuous batching behind a front that any number of threads may call."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipeline.engine.adapter_step import REPLAYED_ROWS
from pipeline.engine.adapters import AdapterBank
from pipeline.engine.grammar_compiler import GrammarCompiler
from pipeline.engine.handle import Handle, Piece
from pipeline.engine.loader import BaseModel
from pipeline.engine.memory import free_memory
from pipeline.engine.paged_plan import SCORED_ROWS, rounded_up
from pipeline.engine.passing_thread import in_passing_thread
from pipeline.engine.runner import Runner
from pipeline.engine.sequence import Sequence, failed, start
from pipeline.engine.stats import EngineStats
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.stopping import StopRules
from pipeline.engine.together import default_batch_size, default_step_tokens
from pipeline.engine.types import Completion, Failure, Grammar, Request, SamplingParams
from pipeline.errors import ExpertError, InferenceError

__all__ = ["Handle", "PackedEngine", "Piece"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0


@dataclass(eq=False)
class _Job:
    """A submitted request and its sequences."""

    handle: Handle
    sequences: list[Sequence]
    is_streamed: bool
    num_told: Counter[int] = field(default_factory=Counter)  # tokens of each answer that its pieces have


class PackedEngine:
    """Answers requests from any thread, all of them in one running batch.

    Args:
        base: The model; it is changed in place.
        tokenizer: Decodes what it generates.
        bank: The experts that requests may name. None where one expert is merged into the model.
        batch_size: At most this many sequences run at once; None for what suits the device.
        max_batch_tokens: At most this many tokens are computed in a step; None for what suits the device.
        kv_cache_bytes: The memory for keys and values; None for what the device has to spare.
        use_triton: On a GPU, whether to compute by kernels of Triton; None for where they work.

    Raises:
        BaseModelError: The model cannot be run packed; the message names the other engine.
    """

    def __init__(
        self,
        base: BaseModel,
        tokenizer: Any,
        *,
        bank: AdapterBank | None = None,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        use_triton: bool | None = None,
    ) -> None:
        kind = base.device.type
        self.tokenizer = tokenizer
        self._rules = StopRules(tokenizer, base.eos_token_ids)
        self._batch_size = default_batch_size(kind) if batch_size is None else batch_size
        self._vocab_size = int(base.model.config.get_text_config().vocab_size)
        self.bank = bank
        self.context_length = base.context_length
        runner = Runner(base, kv_cache_bytes=kv_cache_bytes, num_rows=self._batch_size, use_triton=use_triton)
        self._soft_prompts = runner.soft_prompts
        self._loop: StepEngine | None = StepEngine(
            runner,
            base.context_length,
            bank=bank,
            max_running=self._batch_size,
            max_step_tokens=default_step_tokens(kind) if max_batch_tokens is None else max_batch_tokens,
        )
        self._compiler: GrammarCompiler | None = None
        self._changed = threading.Condition()
        self._inbox: list[_Job] = []
        self._cancelled: list[Handle] = []
        self._jobs: dict[Handle, _Job] = {}
        self._owners: dict[Sequence, _Job] = {}  # of unfinished sequences; the engine thread's own
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._death: ExpertError | None = None

    @property
    def is_alive(self) -> bool:
        """Whether requests are still answered."""
        return not self._is_closed and self._death is None

    def submit(self, request: Request, *, stream: bool = False) -> Handle:
        """Have a request answered; returns at once, but for the compilation of a grammar that is new.

        Args:
            request: What is asked.
            stream: Whether the handle gives the text as it comes.

        Raises:
            InferenceError: The engine is closed or has died.
        """
        return self._submit([request], is_streamed=stream)[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Handle]:
        """Have requests answered together; the handle of each, in order.

        Greedy requests that are the same are computed once, and share a handle.

        Raises:
            InferenceError: The engine is closed or has died.
        """
        computed = [_what_is_computed(request) for request in requests]
        distinct = dict.fromkeys(computed)
        handles = dict(zip(distinct, self._submit(list(distinct), is_streamed=False), strict=True))
        return [handles[request] for request in computed]

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, yielding completions as they finish; see `pipeline.engine.Engine`.

        Greedy requests that are the same are computed once. What is not finished when the iteration is given up is
        cancelled.
        """
        twins: dict[Request, list[Request]] = {}
        for request in requests:
            twins.setdefault(_what_is_computed(request), []).append(request)
        done: queue.SimpleQueue[Handle] = queue.SimpleQueue()
        handles = self._submit([same[0] for same in twins.values()], is_streamed=False)
        askers = dict(zip(handles, twins.values(), strict=True))
        try:
            for handle in handles:
                handle.add_done_callback(done.put)
            for _ in handles:
                finished = done.get()
                for completion in finished.result():
                    for asker in askers[finished]:
                        yield replace(completion, request_id=asker.id)
        finally:
            for handle in handles:
                handle.cancel()

    def stats(self) -> EngineStats:
        """What the engine is doing now; for a gauge, as the engine goes on meanwhile."""
        with self._changed:
            num_new = sum(len(job.sequences) for job in self._inbox)
        loop, bank = self._loop, self.bank
        if loop is None:
            return EngineStats()
        stats = loop.stats()
        num_resident = len(bank.names()) if bank is not None else 0
        return replace(stats, num_waiting=stats.num_waiting + num_new, num_resident=num_resident)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar ahead of the requests that use it.

        Raises:
            GrammarError: It is not valid.
        """
        self._grammars().compile(grammar)

    def warm_up(self, expert: str | None = None) -> None:
        """Have steps of every number of tokens recorded, so that no request waits for it: seconds on a GPU.

        Nothing where steps are not recorded, as on a CPU, or not those of this expert. What is recorded is forgotten
        when the bank changes. Longer contexts than some hundred tokens are met when they come.

        Args:
            expert: One that is loaded; None for the model alone.

        Raises:
            AdapterError: The expert is not loaded.
            InferenceError: The engine is closed, or something could not be computed.
        """
        self._check_open()
        loop, bank = self._loop, self.bank
        if loop is None or not loop.is_recorded or (bank is not None and not bank.is_replayable({expert})):
            return
        sizes = sorted({rounded_up(number) for number in range(1, REPLAYED_ROWS + 1)})
        for size in sizes:
            for number in sorted({min(self._batch_size, size, most) for most in (SCORED_ROWS, size)}):
                for _ in range(2):  # a step is recorded when its size comes again
                    self._compute(number, size, expert)

    def _compute(self, num_sequences: int, num_tokens: int, expert: str | None) -> None:
        """Answer prompts of so many tokens together with a token each."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        least, num_longer = divmod(num_tokens, num_sequences)
        asked = [
            Request(f"warm-up-{at}", (at % self._vocab_size,) * (least + (at < num_longer)), params, expert=expert)
            for at in range(num_sequences)
        ]
        for completion in self.generate(asked):
            if completion.failure is not None:
                raise InferenceError(
                    f"the warm-up failed: {completion.failure.message}", hint="Lower batch_size or kv_cache_bytes."
                )

    @in_passing_thread
    def add_soft_prompt(self, embeddings: torch.Tensor) -> tuple[int, ...]:
        """Make a soft prompt known; its ids go before a prompt's. Call it before requests are submitted.

        Args:
            embeddings: [num_positions, hidden_size]

        Raises:
            AdapterError: The shape is another, or a value is not finite.
        """
        return self._soft_prompts.add(embeddings)

    def close(self) -> None:
        """Cancel what is unfinished and free the device. Again does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)
        self._fail_all(_closed())
        if self.bank is not None:
            self.bank.close()
        self._loop = self._compiler = self.bank = None
        free_memory()

    def _check_open(self) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closed:
            raise _closed()

    def _submit(self, requests: list[Request], *, is_streamed: bool) -> list[Handle]:
        jobs = [self._job(request, is_streamed) for request in requests]
        with self._changed:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="expert-engine", daemon=True)
                self._thread.start()
            begun = [job for job in jobs if not job.handle.is_done]
            self._inbox += begun
            self._jobs |= {job.handle: job for job in begun}
            self._changed.notify_all()
        return [job.handle for job in jobs]

    def _job(self, request: Request, is_streamed: bool) -> _Job:
        handle = Handle(request, self._ask_to_cancel)
        sequences: list[Sequence] = []
        try:
            sequences = start(request, self._rules)
            if request.grammar is not None:
                compiler = self._grammars()
                for sequence in sequences:
                    sequence.matcher = compiler.matcher(request.grammar, request.params)
        except ExpertError as error:
            failure = Failure(error.code, error.message)
            for index in range(request.params.n):
                handle.finish(failed(request, failure, index))
        return _Job(handle, sequences, is_streamed)

    def _grammars(self) -> GrammarCompiler:
        with self._changed:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self.tokenizer, self._vocab_size, self._rules)
            return self._compiler

    def _ask_to_cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify_all()

    def _serve(self) -> None:
        """The engine's thread: step while there is work, sleep while there is none."""
        try:
            while self._take_orders():
                self._step()
        except Exception as error:  # whatever broke the step, nobody may wait for an answer that never comes
            logger.exception("the engine stopped")
            with self._changed:
                self._death = InferenceError(
                    f"the engine stopped: {type(error).__name__}: {error}",
                    hint="Start the process again; report this with the log if it happens again.",
                )
            self._fail_all(self._death)

    def _take_orders(self) -> bool:
        """Wait for work and take it; whether to go on."""
        loop = self._loop
        if loop is None:
            return False
        with self._changed:
            while not (self._inbox or self._cancelled or loop.has_work or self._is_closed):
                self._changed.wait()
            if self._is_closed:
                return False
            new, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
        owners = {sequence: job for job in new for sequence in job.sequences}
        self._owners |= owners
        for sequence in loop.add(owners):
            self._report(owners[sequence], sequence)
        for handle in cancelled:
            job = self._jobs.get(handle)
            for sequence in job.sequences if job is not None else ():
                if job is not None and not sequence.is_finished:
                    loop.cancel(sequence)
                    self._report(job, sequence)
        return True

    def _step(self) -> None:
        loop = self._loop
        if loop is None:
            return
        for sequence in loop.step():
            self._report(self._owners[sequence], sequence)

    def _report(self, job: _Job, sequence: Sequence) -> None:
        """Tell a handle what has become of one of its sequences."""
        if job.handle.first_at is None and sequence.num_generated:
            job.handle.begun_at, job.handle.first_at = sequence.begun_at, time.monotonic()
        if job.is_streamed and (text := sequence.new_text()):
            told = job.num_told[sequence.index]
            job.num_told[sequence.index] = sequence.num_generated
            is_asked = sequence.request.params.logprobs is not None
            logprobs = tuple(sequence.logprobs[told:]) if is_asked else None
            job.handle.tell(Piece(text, tuple(sequence.token_ids[told:]), sequence.index, logprobs))
        if sequence.is_finished:
            self._owners.pop(sequence, None)
            job.handle.finish(sequence.completion())
            if job.handle.is_done:
                with self._changed:
                    self._jobs.pop(job.handle, None)

    def _fail_all(self, error: ExpertError) -> None:
        with self._changed:
            jobs, self._jobs, self._inbox = list(self._jobs.values()), {}, []
        for job in jobs:
            job.handle.die(error)


def _closed() -> InferenceError:
    return InferenceError("the engine is closed", hint="Load the expert again.")


def _what_is_computed(request: Request) -> Request:
    """The request without its name; greedy ones also without their seed, which they do not use."""
    params = request.params
    if params.temperature > 0 or params.n > 1:
        return request
    return replace(request, id="", params=replace(params, seed=0))
