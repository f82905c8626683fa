"""A page to talk with an expert, asked as a browser asks it: through Gradio's own client; run by `test_gradio.py`."""

from collections.abc import Iterator
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from pipeline import Expert
from pipeline.demo.questions import draw_questions
from tests.test_examples import example

QUESTION = next(iter(draw_questions("sql", 1)))


@pytest.fixture(scope="module")
def client(expert: Expert) -> Iterator[Client]:
    page = example("gradio_page").page(expert)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False)
    try:
        yield Client(address, verbose=False)
    finally:
        page.close(verbose=False)


def test_the_page_answers_as_the_expert_does(client: Client, expert: Expert) -> None:
    job = client.submit(QUESTION.prompt, QUESTION.schema, api_name="/chat")
    wanted = expert.generate(QUESTION.prompt, schema=QUESTION.schema).text
    assert job.result(60) == wanted
    parts = job.outputs()
    assert len(parts) > 1, "the text comes as it is made"
    assert all(wanted.startswith(part) for part in parts)


def test_it_remembers_what_was_said(client: Client, expert: Expert) -> None:
    client.reset_session()
    client.predict("List all users.", QUESTION.schema, api_name="/chat")
    first = expert.generate("List all users.", schema=QUESTION.schema).text
    said = [("user", "List all users."), ("assistant", first), ("user", "And how many?")]
    wanted = expert.generate(messages=[{"role": r, "content": c} for r, c in said], schema=QUESTION.schema).text
    assert client.predict("And how many?", QUESTION.schema, api_name="/chat") == wanted


def test_a_mistake_is_told(client: Client) -> None:
    with pytest.raises(AppError, match="prompt has"):
        client.predict("users " * 2000, "", api_name="/chat")


def test_its_schema_is_there_at_first_and_nothing_is_told_to_others(expert: Expert) -> None:
    page: Any = expert.to_gradio(schema=QUESTION.schema)
    assert page.additional_inputs[0].value == QUESTION.schema
    assert page.analytics_enabled is False
    assert page.title == "expert-sql@0.1.0"
