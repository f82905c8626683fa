"""An expert wherever LlamaIndex takes an LLM."""

import asyncio
from typing import Any

import pytest
from llama_index.core.llms import LLM, ChatMessage, ImageBlock
from llama_index.core.prompts import PromptTemplate

from pipeline import Expert, ExpertManager, demo
from pipeline.demo.questions import draw_questions
from pipeline.errors import ConfigError, InvalidRequestError
from pipeline.integrations.llamaindex import ExpertLLM

QUESTION = next(iter(draw_questions("sql", 1)))


@pytest.fixture(scope="module")
def llm(expert: Expert) -> ExpertLLM:
    return ExpertLLM(expert=expert, options={"schema": QUESTION.schema})


@pytest.fixture(scope="module")
def wanted(expert: Expert) -> str:
    return expert.generate(QUESTION.prompt, schema=QUESTION.schema).text


def test_it_completes_and_chats(llm: ExpertLLM, wanted: str, expert: Expert) -> None:
    assert isinstance(llm, LLM)
    assert llm.complete(QUESTION.prompt).text == wanted
    answer = llm.chat([ChatMessage(role="user", content=QUESTION.prompt)])
    assert answer.message.content == wanted
    assert answer.raw["expert"] == "expert-sql@0.1.0"
    assert answer.additional_kwargs["completion_tokens"] > 0
    said = [("system", f"Schema:\n{QUESTION.schema}"), ("user", QUESTION.prompt), ("assistant", "a"), ("user", "b")]
    ours = [{"role": role, "content": content} for role, content in said]
    theirs = [ChatMessage(role=role, content=content) for role, content in said]
    bare = ExpertLLM(expert=expert)
    assert bare.chat(theirs).message.content == expert.generate(messages=ours).text
    assert llm.predict(PromptTemplate("{question}"), question=QUESTION.prompt) == wanted


def test_it_streams(llm: ExpertLLM, wanted: str) -> None:
    parts = list(llm.stream_complete(QUESTION.prompt))
    assert len(parts) > 1
    assert "".join(part.delta or "" for part in parts) == parts[-1].text == wanted
    chat = list(llm.stream_chat([ChatMessage(role="user", content=QUESTION.prompt)]))
    assert chat[-1].message.content == wanted


def test_a_stream_that_is_left_is_cancelled(llm: ExpertLLM, expert: Expert) -> None:
    endless: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "use_grammar": False, "stop": []}
    stream = llm.stream_complete("Who?", **endless)
    next(stream)
    stream.close()
    while expert.stats().num_running:
        pass


def test_it_works_in_tasks(llm: ExpertLLM, wanted: str) -> None:
    async def everything() -> None:
        user = [ChatMessage(role="user", content=QUESTION.prompt)]
        first, second = await asyncio.gather(llm.acomplete(QUESTION.prompt), llm.achat(user))
        assert first.text == second.message.content == wanted
        parts = [part.delta or "" async for part in await llm.astream_complete(QUESTION.prompt)]
        assert "".join(parts) == wanted
        said = [part.message.content async for part in await llm.astream_chat(user)]
        assert said[-1] == wanted

    asyncio.run(everything())


def test_it_says_what_prompts_are_made_by(llm: ExpertLLM, expert: Expert) -> None:
    told = llm.metadata
    assert (told.context_window, told.is_chat_model) == (expert.context_length, True)
    assert told.num_output == expert.package.manifest.decoding.max_new_tokens
    assert told.model_name == "expert-sql@0.1.0"
    assert "expert" not in llm.to_dict(), "a model is no text"


def test_options_reach_the_expert(llm: ExpertLLM, wanted: str) -> None:
    word = f" {wanted.split()[1]}"
    assert word not in llm.complete(QUESTION.prompt, stop=[word], use_grammar=False).text
    with pytest.raises(InvalidRequestError, match="unknown option maxtokens"):
        llm.complete(QUESTION.prompt, maxtokens=3)
    with pytest.raises(InvalidRequestError, match="is not text alone"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://127.0.0.1/a.png")])])
    with pytest.raises(InvalidRequestError, match="has the role 'tool'"):
        llm.chat([ChatMessage(role="tool", content="a")])


def test_an_expert_of_a_manager_is_named(wanted: str) -> None:
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu") as manager:
        manager.load_expert("sql", demo.package("sql"))
        llm = ExpertLLM(expert=manager, model="sql", context_window=1024, options={"schema": QUESTION.schema})
        assert llm.complete(QUESTION.prompt).text == wanted
        assert (llm.metadata.context_window, llm.metadata.model_name) == (1024, "sql")
        with pytest.raises(ConfigError, match="context_window"):
            ExpertLLM(expert=manager, model="sql")
