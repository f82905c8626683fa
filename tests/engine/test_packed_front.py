"""The front of the packed engine: many threads, handles, streams, cancelling, closing, and the engine's death."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.engine import Request, SamplingParams
from pipeline.engine.packed import Handle, PackedEngine, Piece
from pipeline.engine.runtime import load_engine
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.types import Completion, Grammar
from pipeline.errors import GrammarError, InferenceError
from tests import tiny

TOKENIZER = tiny.tokenizer()
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SECONDS = 30.0  # nothing here takes so long; a test that would wait for ever fails


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(TOKENIZER))


def load(base: Path, **options: int) -> PackedEngine:
    engine = load_engine(base, device="cpu", dtype="float32", **options)
    assert isinstance(engine, PackedEngine)
    return engine


@pytest.fixture(scope="module")
def shared(base: Path) -> Iterator[PackedEngine]:
    """An engine for tests that leave it as they find it."""
    engine = load(base)
    yield engine
    engine.close()


@pytest.fixture
def own(base: Path) -> Iterator[Callable[..., PackedEngine]]:
    """Loads engines for one test."""
    loaded: list[PackedEngine] = []

    def load_own(**options: int) -> PackedEngine:
        loaded.append(load(base, **options))
        return loaded[-1]

    yield load_own
    for engine in loaded:
        engine.close()


def request(number: int, **options: object) -> Request:
    params = SamplingParams(**({"max_tokens": 12, "temperature": 1.5, "seed": number} | options))  # type: ignore[arg-type]
    return Request(str(number), tuple(range(5, 30 + number)), params)


def stepper(engine: PackedEngine) -> StepEngine:
    assert engine._loop is not None
    return engine._loop


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.002)


def is_empty(engine: PackedEngine) -> bool:
    """Whether no sequence is left in the engine, and no memory used but that of kept prefixes."""
    loop = stepper(engine)
    kept = sum(prefix.slot.size for prefix in loop.scheduler.prefixes if prefix.slot is not None)
    nothing = not (engine._jobs or engine._owners or engine._inbox or loop.has_work or loop.scheduler.has_work)
    return nothing and loop.scheduler.slots.num_used == kept


# --- handles ---------------------------------------------------------------------------------------------------------


def test_many_threads_submit_at_once(shared: PackedEngine) -> None:
    wanted = {one.request_id: one.text for one in shared.generate(request(at) for at in range(32))}
    barrier = threading.Barrier(16)

    def ask(thread: int) -> list[Handle]:
        barrier.wait(SECONDS)
        return [shared.submit(request(thread)), shared.submit(request(thread + 16))]

    with ThreadPoolExecutor(16) as pool:
        handles = [handle for pair in pool.map(ask, range(16)) for handle in pair]
        found = {one.request_id: one.text for handle in handles for one in handle.result(SECONDS)}
    assert found == wanted
    assert len(set(wanted.values())) > 20
    wait_until(lambda: is_empty(shared))


def test_several_generate_calls_share_one_batch(shared: PackedEngine) -> None:
    asked = [request(at) for at in range(8)]
    wanted = {one.request_id: one.text for one in shared.generate(asked)}
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: {one.request_id: one.text for one in shared.generate(asked)}, range(4)):
            assert found == wanted


def test_generate_yields_what_finishes_first_first(shared: PackedEngine) -> None:
    asked = [request(0, max_tokens=60, ignore_eos=True), request(1, max_tokens=2, ignore_eos=True)]
    assert [one.request_id for one in shared.generate(asked)] == ["1", "0"]


def test_a_result_that_is_not_there_in_time_says_so(shared: PackedEngine) -> None:
    handle = shared.submit(replace(request(0), params=LONG))
    with pytest.raises(TimeoutError):
        handle.result(0.001)
    handle.cancel()
    assert handle.result(SECONDS)[0].finish_reason == "cancelled"


def test_a_handle_gives_all_answers_of_its_request(shared: PackedEngine) -> None:
    handle = shared.submit(request(3, n=4))
    completions = handle.result(SECONDS)
    assert handle.is_done
    assert [one.index for one in completions] == [0, 1, 2, 3]
    assert len({one.text for one in completions}) > 1


def test_done_callbacks_are_called_before_and_after(shared: PackedEngine) -> None:
    called: list[Handle] = []
    handle = shared.submit(request(4))
    handle.add_done_callback(called.append)
    handle.result(SECONDS)
    wait_until(lambda: len(called) == 1)
    handle.add_done_callback(called.append)
    assert called == [handle, handle]


def test_a_callback_that_raises_does_not_stop_the_engine(shared: PackedEngine) -> None:
    handle = shared.submit(request(4, max_tokens=40, ignore_eos=True))

    def broken(_: Handle) -> None:
        raise ValueError("a caller's own error")

    handle.add_done_callback(broken)
    assert handle.result(SECONDS)
    assert shared.submit(request(5)).result(SECONDS)
    assert shared.is_alive


def test_a_grammar_that_is_wrong_fails_its_request_alone(shared: PackedEngine) -> None:
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    bad = replace(request(1, n=2), grammar=Grammar("gbnf", "root ::= ("))
    handles = [shared.submit(bad), shared.submit(request(2))]
    assert [one.failure and one.failure.code for one in handles[0].result(SECONDS)] == [GrammarError.code] * 2
    assert list(handles[0]) == []
    assert handles[1].result(SECONDS)[0].failure is None
    with pytest.raises(GrammarError):
        shared.check_grammar(Grammar("gbnf", "root ::= ("))


# --- streams ---------------------------------------------------------------------------------------------------------


def joined(pieces: list[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


@pytest.mark.parametrize("options", [{}, {"stop": ["e", " the"]}, {"n": 3}, {"temperature": 0.0, "ignore_eos": True}])
def test_pieces_together_are_the_text(shared: PackedEngine, options: dict[str, object]) -> None:
    handle = shared.submit(request(6, **({"max_tokens": 40} | options)), stream=True)
    pieces = list(handle)
    completions = handle.result(0)  # whoever has seen the end has the result
    assert len(pieces) > 2
    for one in completions:
        told = tuple(token for piece in pieces if piece.index == one.index for token in piece.token_ids)
        assert joined(pieces, one.index) == one.text
        assert told == one.token_ids[: len(told)], "each token is told once and in order"
    assert list(handle) == pieces, "a handle can be iterated again"


def test_text_comes_while_it_is_generated(shared: PackedEngine) -> None:
    handle = shared.submit(replace(request(7), params=LONG), stream=True)
    first = next(iter(handle))
    assert first.text
    assert not handle.is_done
    handle.cancel()
    assert handle.result(SECONDS)[0].text.startswith(first.text)


def test_a_request_that_is_not_streamed_has_no_pieces(shared: PackedEngine) -> None:
    assert list(shared.submit(request(8))) == []


def test_handles_are_awaited_and_iterated_by_coroutines(shared: PackedEngine) -> None:
    asked = [request(at, max_tokens=20) for at in range(6)]
    wanted = {one.request_id: one.text for one in shared.generate(asked)}

    async def ask(one: Request) -> tuple[str, str]:
        handle = shared.submit(one, stream=True)
        pieces = [piece async for piece in handle]
        (completion,) = await handle
        again = [piece async for piece in handle]
        assert joined(again) == joined(pieces) == completion.text
        return one.id, completion.text

    async def ask_all() -> dict[str, str]:
        return dict(await asyncio.gather(*map(ask, asked)))

    assert asyncio.run(ask_all()) == wanted


def test_a_paced_stream_gathers_what_comes_between_and_ends_at_once() -> None:
    """The pace is an hour: the first piece and the last are not kept for it, or this would not end."""
    handle = Handle(Request("a", (7,), SamplingParams(max_tokens=4)), lambda _: None)
    words = [Piece(word, (at,)) for at, word in enumerate(["each", "of", "these", "words"])]

    async def read() -> list[list[Piece]]:
        found: list[list[Piece]] = []
        handle.tell(words[0])
        async for pieces in handle.gathered(lambda: 3600.0):
            found.append(pieces)
            if len(found) == 1:
                asyncio.get_running_loop().call_later(0.02, handle.tell, words[1])
                asyncio.get_running_loop().call_later(0.04, finish)
        return found

    def finish() -> None:
        for word in words[2:]:
            handle.tell(word)
        handle.finish(Completion("a", "each of these words", "stop", 1, 4))

    assert asyncio.run(read()) == [words[:1], words[1:]]


def test_who_gives_up_awaiting_harms_nobody(shared: PackedEngine) -> None:
    handle = shared.submit(replace(request(9), params=LONG))

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle_result(), 0.01)

    async def handle_result() -> None:
        await handle

    asyncio.run(give_up())
    assert not handle.is_done
    handle.cancel()
    assert handle.result(SECONDS)[0].finish_reason == "cancelled"
    assert shared.submit(request(1)).result(SECONDS)
    assert shared.is_alive


def test_a_stream_left_open_when_its_loop_closes_harms_nobody(shared: PackedEngine) -> None:
    handle = shared.submit(replace(request(9), params=LONG), stream=True)
    loop = asyncio.new_event_loop()
    pieces = handle.__aiter__()
    loop.run_until_complete(anext(pieces))
    loop.close()  # with the listener still there
    assert handle.result(SECONDS)[0].finish_reason == "length"
    assert shared.submit(request(1)).result(SECONDS)
    del pieces
    gc.collect()


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancelling_a_running_request_gives_what_there_is(shared: PackedEngine) -> None:
    whole = shared.submit(replace(request(10), params=LONG)).result(SECONDS)[0]
    handle = shared.submit(replace(request(10), params=LONG), stream=True)
    pieces = iter(handle)
    begun = [next(pieces) for _ in range(5)]
    handle.cancel()
    handle.cancel()
    (completion,) = handle.result(SECONDS)
    assert completion.finish_reason == "cancelled"
    assert completion.failure is None
    assert 5 <= completion.completion_tokens < 400
    assert completion.token_ids == whole.token_ids[: completion.completion_tokens]
    assert joined(begun + list(pieces)) == completion.text
    wait_until(lambda: is_empty(shared))


def test_cancelling_frees_the_memory_within_a_step(own: Callable[..., PackedEngine]) -> None:
    """Seen through what waits for it: there is room for one sequence, and the next one runs at once."""
    engine = own(batch_size=1)
    first = engine.submit(replace(request(11), params=LONG), stream=True)
    next(iter(first))
    waiting = engine.submit(replace(request(12), params=LONG))
    third = engine.submit(request(13, max_tokens=1, ignore_eos=True))
    waiting.cancel()
    (never_begun,) = waiting.result(SECONDS)
    assert (never_begun.finish_reason, never_begun.text, never_begun.completion_tokens) == ("cancelled", "", 0)
    assert not first.is_done
    before = stepper(engine).num_tokens_computed
    first.cancel()
    assert third.result(SECONDS)[0].finish_reason == "length"
    assert stepper(engine).num_tokens_computed - before < 60 + len(request(13).prompt_token_ids)
    wait_until(lambda: is_empty(engine))


def test_cancelling_a_finished_request_does_nothing(shared: PackedEngine) -> None:
    handle = shared.submit(request(14))
    before = handle.result(SECONDS)
    handle.cancel()
    assert handle.result(0) is before
    assert shared.submit(request(15)).result(SECONDS)[0].finish_reason != "cancelled"


def test_cancelling_a_request_of_several_answers_keeps_those_that_are_finished(shared: PackedEngine) -> None:
    params = SamplingParams(n=3, temperature=2.0, seed=1, max_tokens=300, stop=("e",))
    handle = shared.submit(replace(request(16), params=params), stream=True)
    next(iter(handle))
    handle.cancel()
    completions = handle.result(SECONDS)
    assert [one.index for one in completions] == [0, 1, 2]
    assert {one.finish_reason for one in completions} <= {"cancelled", "stop"}


def test_giving_up_generate_cancels_what_is_unfinished(own: Callable[..., PackedEngine]) -> None:
    engine = own()
    asked = [request(0, max_tokens=1), *(replace(request(at), params=LONG) for at in range(1, 9))]
    found = engine.generate(asked)
    assert next(found).request_id == "0"
    found.close()  # type: ignore[attr-defined]
    wait_until(lambda: is_empty(engine))
    assert stepper(engine).num_tokens_computed < 8 * 200


# --- closing and dying -----------------------------------------------------------------------------------------------


def outcome(handle: Handle) -> str:
    try:
        handle.result(SECONDS)
    except InferenceError as error:
        return error.message
    return "answered"


def test_closing_with_unfinished_work_fails_who_waits(own: Callable[..., PackedEngine]) -> None:
    engine = own(batch_size=2)
    handles = [engine.submit(replace(request(at), params=LONG), stream=True) for at in range(6)]
    next(iter(handles[0]))
    with ThreadPoolExecutor(7) as pool:
        waiters = [pool.submit(outcome, handle) for handle in handles]
        streamer = pool.submit(list, handles[1])
        engine.close()
        assert {waiter.result(SECONDS) for waiter in waiters} == {"the engine is closed"}
        with pytest.raises(InferenceError, match="closed"):
            streamer.result(SECONDS)
    assert not engine.is_alive
    assert "expert-engine" not in {thread.name for thread in threading.enumerate() if thread is engine._thread}
    with pytest.raises(InferenceError, match="closed"):
        engine.submit(request(0))
    with pytest.raises(InferenceError, match="closed"):
        list(engine.generate([request(0)]))
    engine.close()
    handles[0].cancel()


def test_an_engine_that_was_never_used_can_be_closed(own: Callable[..., PackedEngine]) -> None:
    engine = own()
    engine.close()
    assert not engine.is_alive


def test_closing_ends_the_thread_and_frees_the_model(base: Path) -> None:
    import weakref

    engine = load(base)
    engine.submit(request(0)).result(SECONDS)
    model = weakref.ref(stepper(engine)._runner._model)
    thread = engine._thread
    assert thread is not None
    engine.close()
    assert not thread.is_alive()
    gc.collect()
    assert model() is None


def test_a_step_that_raises_kills_the_engine_and_everybody_hears_of_it(own: Callable[..., PackedEngine]) -> None:
    engine = own()
    calls = 0

    def broken(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise ZeroDivisionError("a model's own error")

    stepper(engine)._runner._model.register_forward_pre_hook(broken)
    handles = [engine.submit(replace(request(at), params=LONG), stream=True) for at in range(4)]
    with ThreadPoolExecutor(5) as pool:
        waiters = [pool.submit(outcome, handle) for handle in handles]
        streamer = pool.submit(list, handles[0])
        for waiter in waiters:
            assert "ZeroDivisionError: a model's own error" in waiter.result(SECONDS)
        with pytest.raises(InferenceError, match="stopped"):
            streamer.result(SECONDS)
    assert not engine.is_alive
    with pytest.raises(InferenceError, match="stopped"):
        engine.submit(request(9))
    with pytest.raises(InferenceError, match="stopped"):
        list(engine.generate([request(9)]))


def test_soft_prompts_are_added_before_requests(shared: PackedEngine) -> None:
    ids = shared.add_soft_prompt(torch.zeros(2, 64))
    soft = replace(request(0), prompt_token_ids=(*ids, 7, 8))
    assert shared.submit(soft).result(SECONDS)[0].failure is None
