"""An expert wherever LangChain takes a chat model."""

import asyncio
from typing import Any, Literal

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel

from pipeline import Expert, ExpertManager, demo
from pipeline.demo.questions import draw_questions
from pipeline.errors import ConfigError, InferenceError, InvalidRequestError
from pipeline.integrations.langchain import ChatExpert

QUESTIONS = list(draw_questions("sql", 8))
QUESTION = QUESTIONS[0]
ENDLESS: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "use_grammar": False, "stop": []}


@pytest.fixture(scope="module")
def model(expert: Expert) -> ChatExpert:
    return ChatExpert(expert=expert, options={"schema": QUESTION.schema})


def test_it_answers_as_the_expert_does(model: ChatExpert, expert: Expert) -> None:
    wanted = expert.generate(QUESTION.prompt, schema=QUESTION.schema)
    answer = model.invoke(QUESTION.prompt)
    assert answer.text == wanted.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == wanted.prompt_tokens
    assert answer.usage_metadata["output_tokens"] == wanted.completion_tokens
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "expert-sql@0.1.0"
    assert asyncio.run(model.ainvoke(QUESTION.prompt)).text == wanted.text
    several = model.generate([[HumanMessage(QUESTION.prompt)]], n=2, temperature=5.0, seed=3, use_grammar=False)
    assert len(several.generations[0]) == 2


def test_a_conversation_keeps_its_roles(expert: Expert) -> None:
    said: list[BaseMessage] = [
        SystemMessage(f"Schema:\n{QUESTION.schema}"),
        HumanMessage([{"type": "text", "text": QUESTION.prompt}]),
        AIMessage("SELECT 1"),
        HumanMessage("And how many?"),
    ]
    ours = [
        {"role": role, "content": message.text}
        for role, message in zip(("system", "user", "assistant", "user"), said, strict=True)
    ]
    assert ChatExpert(expert=expert).invoke(said).text == expert.generate(messages=ours).text


def test_it_streams(model: ChatExpert, expert: Expert) -> None:
    class Heard(BaseCallbackHandler):
        tokens: list[str] = []  # noqa: RUF012  # of this test alone

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:  # noqa: ARG002
            self.tokens.append(token)

    heard = Heard()
    chunks = list(model.stream(QUESTION.prompt, config={"callbacks": [heard]}))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    wanted = expert.generate(QUESTION.prompt, schema=QUESTION.schema)
    assert whole.text == "".join(heard.tokens) == wanted.text
    assert len(chunks) > 2
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == wanted.completion_tokens
    assert whole.response_metadata["finish_reason"] == "stop"

    async def streamed() -> str:
        return "".join([chunk.text async for chunk in model.astream(QUESTION.prompt)])

    assert asyncio.run(streamed()) == wanted.text


def test_a_stream_that_is_left_is_cancelled(model: ChatExpert, expert: Expert) -> None:
    stream = model.bind(**ENDLESS).stream("Who?")
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert expert.stats().num_running == 0


def test_batches_are_answered_together(model: ChatExpert, expert: Expert) -> None:
    prompts = [question.prompt for question in QUESTIONS]
    wanted = [result.text for result in expert.generate_batch(list(prompts), schema=QUESTION.schema)]
    held: dict[str, Any] = {"max_tokens": 24, **{key: ENDLESS[key] for key in ("ignore_eos", "use_grammar", "stop")}}
    before = expert.stats()
    model.bind(**held).batch(prompts, config={"max_concurrency": len(prompts)})
    after = expert.stats()
    num_tokens = after.num_tokens_generated - before.num_tokens_generated
    assert num_tokens == 24 * len(prompts)
    assert after.num_steps - before.num_steps < num_tokens / 2
    assert [answer.text for answer in model.batch(prompts)] == wanted
    assert [answer.text for answer in asyncio.run(model.abatch(prompts))] == wanted


def test_stop_and_options_reach_the_expert(model: ChatExpert, expert: Expert) -> None:
    word = f" {model.invoke(QUESTION.prompt).text.split()[1]}"
    wanted = expert.generate(QUESTION.prompt, schema=QUESTION.schema, stop=[word], use_grammar=False).text
    assert model.invoke(QUESTION.prompt, stop=[word], use_grammar=False).text == wanted
    assert model.bind(stop=[word], use_grammar=False).invoke(QUESTION.prompt).text == wanted
    assert word not in wanted
    other = QUESTIONS[1]
    assert (
        model.invoke(other.prompt, schema=other.schema).text == expert.generate(other.prompt, schema=other.schema).text
    )
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | model | StrOutputParser()
    assert chain.invoke({"question": QUESTION.prompt}) == model.invoke(QUESTION.prompt).text
    with pytest.raises(InvalidRequestError, match="unknown option maxtokens"):
        model.invoke(QUESTION.prompt, maxtokens=3)


def test_what_an_expert_cannot_read_is_named(model: ChatExpert) -> None:
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}])
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] is not text alone"):
        model.invoke([image])
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] has the role 'tool'"):
        model.invoke([HumanMessage("a"), ToolMessage("b", tool_call_id="1")])


class City(BaseModel):
    """Where somebody lives."""

    city: Literal["Lima", "Oslo"]
    age: Literal[30, 45]


def test_structured_output_is_held_to_its_schema(expert: Expert) -> None:
    model = ChatExpert(expert=expert, options={"max_tokens": 200})
    told = model.with_structured_output(City).invoke("Maria lives in Lima and is 30 years old.")
    assert isinstance(told, City)
    raw = model.with_structured_output(City.model_json_schema(), include_raw=True).invoke("Omar turned 45.")
    assert set(raw["parsed"]) == {"city", "age"}
    assert raw["parsing_error"] is None
    short = ChatExpert(expert=expert, options={"max_tokens": 2})
    cut = short.with_structured_output(City, include_raw=True).invoke("Who?")
    assert cut["parsed"] is None
    assert isinstance(cut["parsing_error"], InferenceError)
    with pytest.raises(InferenceError, match="not a whole object"):
        short.with_structured_output(City.model_json_schema()).invoke("Who?")
    with pytest.raises(ConfigError, match="json_schema"):
        model.with_structured_output(City, method="function_calling")


def test_an_expert_of_a_manager_is_named() -> None:
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu") as manager:
        manager.load_expert("sql", demo.package("sql"))
        model = ChatExpert(expert=manager, model="sql", options={"schema": QUESTION.schema})
        assert (
            model.invoke(QUESTION.prompt).text == manager.generate("sql", QUESTION.prompt, schema=QUESTION.schema).text
        )
        assert model._get_ls_params()["ls_model_name"] == "sql"
        with pytest.raises(ConfigError, match="do not go together") as caught:
            ChatExpert(expert=manager)
        assert "sql, auto" in caught.value.hint


def test_what_is_no_expert_is_refused(expert: Expert) -> None:
    with pytest.raises(ConfigError, match="expert is str"):
        ChatExpert(expert="expert-sql.expert")
    with pytest.raises(ConfigError, match="do not go together"):
        ChatExpert(expert=expert, model="sql")


def test_answers_are_cached_by_expert_and_options(model: ChatExpert, expert: Expert) -> None:
    assert model._identifying_params["expert_sha256"] == expert.package.digest
    assert model._get_llm_string() != ChatExpert(expert=expert)._get_llm_string()
