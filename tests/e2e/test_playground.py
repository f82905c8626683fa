"""The playground in a real Chromium, over the real gateway and the demo's experts."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect

from pipeline import demo
from pipeline.engine.runtime import open_experts
from pipeline.errors import ReplicaLostError
from pipeline.package import open_package
from pipeline.serve.api import make_api
from pipeline.serve.keys import KeyRing, key_hash
from pipeline.serve.local import local_backend
from pipeline.serve.messages import Ask, Backend, Delta, Ended, Event, ModelCard, Refused, Started
from pipeline.serve.playground import HEADERS
from tests.e2e.chromium import BROWSERS, LOW_CONTRAST, chromium, evaluate, find_chromium, lightness

SECONDS = 20
KEY = "sk-playground-test"
SEND = "Control+Enter"


class ScriptedBackend:
    """Answers each question with the events written for it, and notes whose stream was closed before its end."""

    def __init__(self) -> None:
        self.script: list[Event | Exception] = []
        self.is_endless = False
        self.left_early = threading.Event()
        self.asked: list[Ask] = []

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """See `Backend.ask`."""
        self.asked.append(ask)
        try:
            for event in self.script:
                if isinstance(event, Exception):
                    raise event
                yield event
            while self.is_endless:
                yield Delta("la ")
                await asyncio.sleep(0.02)
        except (asyncio.CancelledError, GeneratorExit):
            self.left_early.set()
            raise


CARD = ModelCard("expert-scripted", "none", "1.0.0", "0" * 64, "lora", takes_schema=True, dialects=("one", "two"))


@contextmanager
def serving(backend: Backend, models: Sequence[ModelCard], keys: KeyRing | None = None) -> Iterator[str]:
    """The gateway's API on a free port of this machine; yields its URL."""
    api = make_api(backend, models, keys=keys)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(SECONDS)


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    packages = {f"expert-{task}": open_package(demo.package(task)) for task in demo.TASKS}
    experts = open_experts(packages, demo.BASE_MODEL, device="cpu", batch_size=8)
    with local_backend(experts) as backend, serving(backend, backend.cards) as url:
        yield url


@pytest.fixture(scope="module")
def scripted_backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def scripted_url(scripted_backend: ScriptedBackend) -> Iterator[str]:
    with serving(scripted_backend, [CARD]) as url:
        yield url


@pytest.fixture
def scripted(scripted_backend: ScriptedBackend) -> ScriptedBackend:
    scripted_backend.script = []
    scripted_backend.is_endless = False
    scripted_backend.left_early.clear()
    scripted_backend.asked.clear()
    return scripted_backend


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with chromium() as started:
        yield started


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page and waits for its experts. In the end: no error in it, and nothing asked of anyone else."""
    contexts, problems = [], []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def opened(url: str, *, width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(url)
        expect(page.locator("#server")).to_have_attribute("data-state", "up")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def test_each_expert_answers_its_example_as_the_api_does(demo_url: str, open_page: OpenPage) -> None:
    page = open_page(demo_url)
    names = page.get_by_label("Expert").locator("option").all_text_contents()
    assert sorted(names) == sorted(f"expert-{task}" for task in demo.TASKS)

    for name in names:
        page.get_by_label("Expert").select_option(name)
        page.locator("#example-list button").first.click()
        page.keyboard.press(SEND)
        expect(page.get_by_text("Done")).to_be_visible()

        schema, question = page.get_by_label("Schema").input_value(), page.get_by_label("Question").input_value()
        body = {"model": name, "messages": [{"role": "user", "content": question}], "schema": schema}
        whole = httpx.post(f"{demo_url}v1/chat/completions", json=body, timeout=SECONDS).raise_for_status().json()
        assert page.locator("#answer").text_content() == whole["choices"][0]["message"]["content"] != ""
        expect(page.locator("#prompt-tokens")).to_have_text(f"{whole['usage']['prompt_tokens']} tok")
        expect(page.locator("#completion-tokens")).to_have_text(f"{whole['usage']['completion_tokens']} tok")
        expect(page.locator("#first-token")).to_contain_text("s")
        expect(page.locator("#speed")).to_contain_text("tok/s")
        expect(page.locator("#finish")).to_have_text("complete")
        expect(page.locator("#request-id")).to_contain_text("Request ")


def test_the_code_does_what_the_page_does(demo_url: str, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(demo_url, permissions=["clipboard-read", "clipboard-write"])
    question = 'It\'s "quoted" $HOME `x` \\ and ünïcode 🦜\non two lines: what is the speed of cars?'
    page.get_by_label("Schema").fill("CREATE TABLE cars (id INT, speed INT);")
    page.get_by_label("Question").fill(question)
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Off", exact=True).check()
    page.keyboard.press(SEND)
    expect(page.get_by_text("Done")).to_be_visible()
    answer = page.locator("#answer").text_content()

    shell = _copied(page, "curl")
    done = _run(["bash", "-c", shell.replace("curl ", "curl -sS ", 1)])
    events = [line.removeprefix("data: ") for line in done.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == answer

    program = tmp_path / "program.py"
    program.write_text(_copied(page, "Python"), encoding="utf-8")
    assert _run([sys.executable, str(program)]) == answer


def test_only_what_was_filled_in_is_sent(scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage) -> None:
    scripted.script = [Started(3), Delta("ok"), Ended("stop", 1)]
    page = open_page(scripted_url)
    page.get_by_label("Question").fill("one")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("Done")).to_be_visible()
    page.get_by_label("Schema").fill("tables")
    page.get_by_label("Dialect").select_option("two")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("9")
    page.get_by_label("On", exact=True).check()
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("Done")).to_be_visible()

    bare, full = scripted.asked
    assert dict(bare.fields)["messages"] == [{"role": "user", "content": "one"}]
    assert not any(dict(bare.fields).get(name) for name in ("schema", "dialect", "system"))
    assert {name for name, value in bare.options.items() if value is not None} == set()
    assert (full.fields["schema"], full.fields["dialect"]) == ("tables", "two")
    given = {name: value for name, value in full.options.items() if value is not None}
    assert given == {"temperature": 0.25, "seed": 9, "use_grammar": True}


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_ends_the_answer_here_and_at_the_server(
    how: str, scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage
) -> None:
    scripted.script, scripted.is_endless = [Started(3)], True
    page = open_page(scripted_url)
    page.get_by_label("Question").fill("sing")
    page.keyboard.press(SEND)
    expect(page.locator("#answer")).to_contain_text("la la la")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()

    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.locator("#finish")).to_have_text("stopped")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#error")).to_be_hidden()
    assert scripted.left_early.wait(5)


def test_markup_in_an_answer_or_an_error_stays_text(
    scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage
) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\r\n\x0b&amp;"
    scripted.script = [Started(3), *(Delta(character) for character in hostile), Ended("stop", len(hostile))]
    page = open_page(scripted_url)
    page.get_by_label("Question").fill(hostile)
    page.keyboard.press(SEND)
    expect(page.get_by_text("Done")).to_be_visible()
    assert page.locator("#answer").text_content() == hostile

    scripted.script = [Refused("invalid_request", hostile, hostile)]
    page.keyboard.press(SEND)
    expect(page.locator("#error-message")).to_contain_text("<img src=x")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Expert playground"


def test_an_error_is_shown_with_its_code_and_what_to_do(demo_url: str, open_page: OpenPage) -> None:
    page = open_page(demo_url)
    page.get_by_label("Question").fill("anything")
    page.get_by_label("Temperature").fill("1000")
    page.keyboard.press(SEND)

    expect(page.get_by_role("alert")).to_contain_text("invalid_request")
    expect(page.get_by_role("alert")).to_contain_text("HTTP 400")
    expect(page.get_by_role("alert")).to_contain_text("Give a number of at least 0 and at most 100.")

    page.get_by_label("Temperature").fill("0")
    page.keyboard.press(SEND)
    expect(page.get_by_text("Done")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_answer_that_breaks_off_keeps_its_text_and_says_so(
    scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage
) -> None:
    scripted.script = [Started(3), Delta("SELECT "), ReplicaLostError("the replica has died", hint="Ask again.")]
    page = open_page(scripted_url)
    page.get_by_label("Question").fill("one")
    page.keyboard.press(SEND)

    expect(page.locator("#error-code")).to_have_text("replica_lost")
    expect(page.locator("#answer")).to_have_text("SELECT ")
    expect(page.locator("#finish")).to_have_text("failed")
    expect(page.locator("#status")).to_have_text("")


@pytest.mark.parametrize("ending", ["", 'data: {"choices": [', 'data: {"choices": []}'])
def test_a_stream_without_its_end_is_no_answer(ending: str, scripted_url: str, open_page: OpenPage) -> None:
    """A proxy between cuts the stream off, and has put it into lines of its own before."""
    piece = '{"choices": [{"delta": {"content": "SELECT"}, "finish_reason": "stop"}]}'
    body = f": ping\r\n\r\nevent: x\r\ndata:{piece}\r\n\r\n{ending}"
    page = open_page(scripted_url)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.get_by_label("Question").fill("one")
    page.keyboard.press(SEND)

    expect(page.locator("#error-code")).to_have_text("connection_lost")
    expect(page.locator("#answer")).to_have_text("SELECT")
    expect(page.locator("#finish")).to_have_text("failed")


def test_a_server_that_is_gone_is_named(open_page: OpenPage) -> None:
    backend = ScriptedBackend()
    with serving(backend, [CARD]) as url:
        page = open_page(url)
    page.get_by_label("Question").fill("one")
    page.keyboard.press(SEND)

    expect(page.locator("#error-code")).to_have_text("unreachable")


def test_a_key_is_asked_for_used_and_kept_only_when_wanted(browser: Browser) -> None:
    backend = ScriptedBackend()
    backend.script = [Started(3), Delta("hello"), Ended("stop", 1)]
    with serving(backend, [CARD], KeyRing({"tester": key_hash(KEY)})) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        field = page.locator("#key")
        expect(field).to_be_focused()
        expect(page.locator("#error-code")).to_have_text("invalid_api_key")
        expect(page.locator("#key-problem")).to_have_text("This server asks for a key.")
        expect(page.locator("#code")).to_contain_text("$EXPERT_API_KEY")
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#key-problem")).to_have_text("This server does not know that key.")
        expect(page.locator("#server")).to_have_text("locked")
        field.fill(KEY)
        field.press("Enter")
        expect(page.locator("#server")).to_have_text("1 expert")
        expect(page.locator("#error")).to_be_hidden()
        page.get_by_label("Question").fill("hi")
        page.keyboard.press(SEND)
        expect(page.locator("#answer")).to_have_text("hello")
        for language in ("curl", "Python"):
            page.get_by_role("tab", name=language).click()
            expect(page.locator("#code")).to_contain_text("EXPERT_API_KEY")
            expect(page.locator("#code")).not_to_contain_text(KEY)

        page.reload()
        expect(page.locator("#server")).to_have_text("locked")
        field.fill(KEY)
        page.get_by_label("Keep it until this tab is closed").check()
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#server")).to_have_text("1 expert")
        page.reload()
        expect(page.locator("#server")).to_have_text("1 expert")
        assert KEY not in json.dumps(context.storage_state())  # neither cookies nor what outlives the tab
        context.close()


def test_it_can_be_used_without_a_mouse(scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage) -> None:
    scripted.script = [Started(3), Delta("ok"), Ended("stop", 1)]
    page = open_page(scripted_url)
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(evaluate(page, "document.activeElement.id || document.activeElement.name || ''"))
        ring = evaluate(page, "getComputedStyle(document.activeElement).outlineStyle")
        assert reached[-1] in ("", "grammar") or ring != "none", f"focus on {reached[-1]} cannot be seen"
    wanted = ["open-key", "theme", "model", "schema", "dialect", "question", "temperature", "max_tokens", "seed"]
    wanted += ["grammar", "send", "stop", "answer-box", "tab-curl", "copy-code", "code-panel"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted

    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_be_focused()
    expect(page.locator("#code")).to_contain_text("from openai import OpenAI")


def test_every_control_has_a_name(scripted_url: str, open_page: OpenPage) -> None:
    page = open_page(scripted_url)
    page.get_by_role("button", name="API key").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    roles = {"button", "textbox", "combobox", "spinbutton", "radio", "checkbox", "tab", "radiogroup", "alert", "region"}
    controls = [node for node in tree["nodes"] if node.get("role", {}).get("value") in roles and not node["ignored"]]
    assert len(controls) > 15
    assert [node for node in controls if not node["name"]["value"].strip()] == []
    assert evaluate(page, "[...document.querySelectorAll('input, select, textarea')].every((one) => one.labels.length)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable_and_the_choice_is_kept(
    scheme: str, scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage
) -> None:
    scripted.script = [Started(3), Delta("SELECT 1"), ReplicaLostError("the replica has died", hint="Ask again.")]
    page = open_page(scripted_url, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Question").fill("one")
    page.keyboard.press(SEND)
    expect(page.locator("#error")).to_be_visible()
    assert (lightness(page) > 0.5) == (scheme == "light")
    assert evaluate(page, LOW_CONTRAST) == []

    page.get_by_role("button", name="Switch between light and dark").click()
    assert (lightness(page) > 0.5) == (scheme == "dark")
    assert evaluate(page, LOW_CONTRAST) == []
    page.reload()
    expect(page.locator("#server")).to_have_attribute("data-state", "up")
    assert (lightness(page) > 0.5) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 600, 1024])
def test_nothing_is_wider_than_the_window(
    width: int, scripted_url: str, scripted: ScriptedBackend, open_page: OpenPage
) -> None:
    scripted.script = [Started(3), Delta("x" * 2000), Ended("length", 1)]
    page = open_page(scripted_url, width=width, height=700)
    page.get_by_label("Question").fill("one")
    page.keyboard.press(SEND)
    expect(page.locator("#finish")).to_have_text("cut at max tokens")

    assert evaluate(page, "document.documentElement.scrollWidth") <= width
    assert evaluate(
        page, "document.querySelector('.answer').scrollWidth <= document.querySelector('.answer').clientWidth"
    )
    expect(page.locator("#answer-box")).to_be_in_viewport()
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


def test_the_files_carry_a_policy_that_is_in_force(scripted_url: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(scripted_url)
    for name in ("", "playground/style.css", "playground/app.js", "playground/examples.json"):
        response = page.request.get(scripted_url + name)
        assert response.ok
        assert {key: response.headers.get(key.lower()) for key in HEADERS} == dict(HEADERS)
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    with pytest.raises(Error, match="requires 'TrustedHTML'"):
        page.locator("#answer").evaluate("node => { node.innerHTML = '<b>bold</b>'; }")
    page.close()


def _copied(page: Page, language: str) -> str:
    """What the copy button puts on the clipboard, by pasting it into a field; the page is left as it was."""
    page.get_by_role("tab", name=language).click()
    page.locator("#copy-code").click()
    expect(page.locator("#copy-code")).to_have_text("Copied")
    question = page.get_by_label("Question")
    before = question.input_value()
    question.fill("")
    question.focus()
    page.keyboard.press("Control+V")
    text = question.input_value()
    question.fill(before)
    return text


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS * 3, check=False, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
