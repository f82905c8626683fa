"""Text as it comes, from threads and tasks: pieces, a result at the end, and an end before it."""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest

from pipeline import Expert, InferenceResult, demo
from pipeline.demo.questions import draw_questions
from pipeline.errors import ConfigError, GrammarError, InferenceError, InvalidRequestError

QUESTIONS = list(draw_questions("sql", 8))
QUESTION = QUESTIONS[0]
ENDLESS: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "use_grammar": False, "stop": [], "schema": None}


@pytest.fixture(scope="module")
def expert() -> Iterator[Expert]:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as loaded:
        yield loaded


def test_the_pieces_are_the_text_and_the_result_is_that_of_generate(expert: Expert) -> None:
    whole = expert.generate(QUESTION.prompt, schema=QUESTION.schema)
    stream = expert.generate_stream(QUESTION.prompt, schema=QUESTION.schema)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text
    assert stream.result == whole
    assert list(stream) == []


def test_its_return_value_is_the_result(expert: Expert) -> None:
    def passed_on() -> Generator[str, None, InferenceResult]:
        result = yield from expert.generate_stream(QUESTION.prompt, schema=QUESTION.schema)
        return result

    def collected() -> Generator[str, None, None]:
        results.append((yield from passed_on()))

    results: list[InferenceResult] = []
    assert "".join(collected()) == results[0].text


def test_closing_early_cancels_and_leaves_what_there_is(expert: Expert) -> None:
    with closing(expert.generate_stream("Who?", **ENDLESS)) as stream:
        first = next(stream)
        with pytest.raises(InvalidRequestError, match="has not ended"):
            _ = stream.result
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text.startswith(first)
    assert stream.result.completion_tokens < 400
    assert next(stream, None) is None
    with pytest.raises(KeyError), closing(expert.generate_stream("Who?", **ENDLESS)) as other:
        other.throw(KeyError("a"))
    assert other.result.finish_reason == "cancelled"
    assert expert.stats().num_running == 0


def test_a_stream_that_is_dropped_is_cancelled(expert: Expert) -> None:
    stream = expert.generate_stream("Who?", **ENDLESS)
    running = stream._running
    next(stream)
    del stream
    assert running.wait().finish_reason == "cancelled"


def test_what_is_wrong_is_raised_as_generate_does(expert: Expert) -> None:
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        expert.generate_stream("")
    wrong = expert.generate_stream("Who?", grammar="root ::= nowhere")
    with pytest.raises(GrammarError):
        list(wrong)
    assert wrong.result.error is not None


def test_tasks_are_answered_together_and_stream(expert: Expert) -> None:
    wanted = [expert.generate(question.prompt, schema=question.schema) for question in QUESTIONS]

    async def streamed() -> str:
        stream = expert.agenerate_stream(QUESTION.prompt, schema=QUESTION.schema)
        text = "".join([piece async for piece in stream])
        assert stream.result.text == text
        return text

    async def everything() -> None:
        asked = [expert.agenerate(question.prompt, schema=question.schema) for question in QUESTIONS]
        *results, text = await asyncio.gather(*asked, streamed())
        assert results == wanted
        assert text == wanted[0].text
        batch = await expert.agenerate_batch([{"prompt": QUESTION.prompt}, ""], schema=QUESTION.schema)
        assert batch[0] == wanted[0]
        assert batch[1].error is not None
        with pytest.raises(InvalidRequestError):
            await expert.agenerate("")

    asyncio.run(everything())


def test_an_async_stream_that_is_left_is_cancelled(expert: Expert) -> None:
    async def everything() -> None:
        async with aclosing(expert.agenerate_stream("Who?", **ENDLESS)) as stream:
            first = await anext(stream)
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.text.startswith(first)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in other:
                begun.set()

        other = expert.agenerate_stream("Who?", **ENDLESS)
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        never = expert.agenerate_stream("Who?")
        await never.aclose()
        with pytest.raises(InvalidRequestError, match="has not ended"):
            _ = never.result

    asyncio.run(everything())


def test_a_task_that_is_cancelled_cancels_its_request(expert: Expert) -> None:
    async def everything() -> None:
        task = asyncio.create_task(expert.agenerate("Who?", **ENDLESS))
        while not expert.stats().num_running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while expert.stats().num_running:
            await asyncio.sleep(0)

    asyncio.run(everything())


def test_a_stream_of_an_expert_that_is_closed_ends_with_an_error() -> None:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as expert:
        stream = expert.generate_stream("Who?", **ENDLESS)
        next(stream)
        expert.close()
        with pytest.raises(InferenceError, match="closed"):
            list(stream)
        with pytest.raises(InferenceError, match="closed"):
            _ = stream.result


def test_the_padded_engine_answers_and_streams_nothing(expert: Expert) -> None:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu", engine="padded") as padded:
        items = [{"prompt": question.prompt, "schema": question.schema} for question in QUESTIONS[:3]]
        assert padded.generate_batch(items) == expert.generate_batch(items)
        with pytest.raises(ConfigError, match="streams none"):
            padded.generate_stream("Who?")
