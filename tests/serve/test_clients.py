"""The clients that people use, against the demo experts: OpenAI's own, LangChain's, and curl."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from pipeline import Expert
from pipeline.demo import BASE_MODEL, TASKS, package
from pipeline.engine.chat import schema_message
from pipeline.engine.runtime import open_experts
from pipeline.package import open_package
from pipeline.serve.api import make_api
from pipeline.serve.keys import KeyRing, key_hash
from pipeline.serve.local import local_backend
from tests.serve.scripted import serving

KEY = "a-key-of-the-tests"
SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT)"
QUESTION = "How many users are there?"
USER = {"role": "user", "content": QUESTION}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    packages = {task: open_package(package(task)) for task in TASKS}
    experts = open_experts(packages, BASE_MODEL, device="cpu", dtype="float32")
    with local_backend(experts) as backend:
        api = make_api(backend, backend.cards, keys=KeyRing({"tests": key_hash(KEY)}))
        with serving(api) as address:
            yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def answer() -> str:
    """What the expert answers where there is no HTTP."""
    expert = Expert.load(package("sql"), base_model=BASE_MODEL, device="cpu", dtype="float32")
    return expert.generate(QUESTION, schema=SCHEMA).text


def test_the_client_gets_the_experts_own_answer(client: openai.OpenAI, answer: str) -> None:
    completion = client.chat.completions.create(model="sql", messages=[USER], extra_body={"schema": SCHEMA})
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", answer, "stop")
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion._request_id


def test_a_schema_in_the_system_message_is_the_same_question(client: openai.OpenAI, answer: str) -> None:
    system = {"role": "system", "content": schema_message(SCHEMA, "postgres")}
    completion = client.chat.completions.create(model="sql", messages=[system, USER], tools=openai.NOT_GIVEN)
    assert completion.choices[0].message.content == answer


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, answer: str) -> None:
    stream = client.chat.completions.create(
        model="sql",
        messages=[USER],
        extra_body={"schema": SCHEMA},
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == answer
    assert len([text for text in texts if text]) > 2


def test_the_clients_stream_helper_understands_it(client: openai.OpenAI, answer: str) -> None:
    with client.chat.completions.stream(model="sql", messages=[USER], extra_body={"schema": SCHEMA}) as stream:
        assert stream.get_final_completion().choices[0].message.content == answer


def test_the_async_client_asks_many_at_once(url: str, answer: str) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
            asked = (
                made.chat.completions.create(model="sql", messages=[USER], extra_body={"schema": SCHEMA})
                for _ in range(16)
            )
            return [completion.choices[0].message.content for completion in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [answer] * 16


def test_completions_with_a_prompt(client: openai.OpenAI, answer: str) -> None:
    completion = client.completions.create(model="sql", prompt=QUESTION, logprobs=2, extra_body={"schema": SCHEMA})
    (choice,) = completion.choices
    assert choice.text == answer
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == answer


def test_logprobs_of_a_chat(client: openai.OpenAI, answer: str) -> None:
    completion = client.chat.completions.create(
        model="sql", messages=[USER], logprobs=True, top_logprobs=3, extra_body={"schema": SCHEMA}
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == answer
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in logprobs.content)


def test_several_sampled_answers_are_the_same_again(client: openai.OpenAI) -> None:
    def draw() -> list[str | None]:
        completion = client.chat.completions.create(
            model="sql",
            messages=[USER],
            n=4,
            seed=11,
            temperature=2.0,
            max_completion_tokens=12,
            extra_body={"schema": SCHEMA, "use_grammar": False, "top_k": 50},
        )
        return [choice.message.content for choice in completion.choices]

    drawn = draw()
    assert len(set(drawn)) > 1
    assert draw() == drawn


# No place for blanks: the demo expert knows no JSON of this kind, and would fill any other with line breaks.
VERDICT = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {"enum": ["yes", "no"]}}}


def test_an_answer_is_held_to_a_json_schema(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="json", messages=[USER], response_format=VERDICT)  # type: ignore[call-overload]
    assert completion.choices[0].message.content in {'"yes"', '"no"'}


def test_the_models_are_the_experts(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == set(TASKS)
    shown = client.models.retrieve("sql")
    assert shown == models["sql"]
    assert (shown.model_extra or {})["kind"] == "dora"


def test_what_cannot_be_done_is_the_clients_own_error(client: openai.OpenAI, url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="sql", messages=[USER], tools=[tool])
    assert (bad.value.param, bad.value.code) == ("tools", "invalid_request")
    with pytest.raises(openai.NotFoundError, match="The models are cypher, json, sql"):
        client.chat.completions.create(model="automatic", messages=[USER])
    with pytest.raises(openai.BadRequestError, match="prompt has") as long:
        client.chat.completions.create(model="sql", messages=[{"role": "user", "content": "users " * 5000}])
    assert long.value.code == "prompt_too_long"
    with openai.OpenAI(base_url=url, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_langchain_asks_streams_and_answers_by_a_schema(url: str, answer: str) -> None:
    system = SystemMessage(schema_message(SCHEMA, "postgres"))
    model = ChatOpenAI(model="sql", base_url=url, api_key=KEY, max_retries=0)  # type: ignore[arg-type]
    said = model.invoke([system, HumanMessage(QUESTION)])
    assert said.content == answer
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in model.stream([system, HumanMessage(QUESTION)])) == answer
    assert model.bind(response_format=VERDICT).invoke(QUESTION).content in {'"yes"', '"no"'}


def test_langchains_completions(url: str, answer: str) -> None:
    model = OpenAI(model="sql", base_url=url, api_key=KEY, max_retries=0, extra_body={"schema": SCHEMA})  # type: ignore[call-arg, arg-type]
    assert model.invoke(QUESTION) == answer


def test_curl(url: str, answer: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = {"model": "sql", "messages": [USER], "schema": SCHEMA}
    head = [curl, "-sS", "-N", "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]

    def ask(**fields: object) -> str:
        command = [*head, f"{url}/chat/completions", "-d", json.dumps({**body, **fields})]
        return subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout

    assert json.loads(ask())["choices"][0]["message"]["content"] == answer
    lines = [line for line in ask(stream=True).split("\n") if line]
    assert lines.pop() == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == answer
