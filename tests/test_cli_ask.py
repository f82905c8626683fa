"""`expert generate` and `expert chat`: text as it comes, and a conversation line by line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from pipeline import ExpertManager, demo
from pipeline.chat_session import ChatSession, converse, typed_lines
from pipeline.cli import app
from pipeline.cli_common import printable
from pipeline.demo.questions import draw_questions
from pipeline.errors import ConfigError, UnknownModelError

QUESTION = next(iter(draw_questions("sql", 1)))
PACKAGES = [str(demo.package("sql")), str(demo.package("json"))]
OPTIONS = ["--base-model", str(demo.BASE_MODEL), "--device", "cpu"]


@pytest.fixture(scope="module")
def manager() -> Iterator[ExpertManager]:
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu") as made:
        made.load_experts({f"expert-{task}": demo.package(task) for task in ("sql", "json")})
        yield made


def said(session: ChatSession, *lines: str) -> str:
    shown: list[str] = []
    converse(session, lines, shown.append)
    return "".join(shown)


def test_a_conversation(manager: ExpertManager, tmp_path: Path) -> None:
    (tmp_path / "schema.sql").write_text(QUESTION.schema)
    wanted = manager.generate("expert-sql", QUESTION.prompt, schema=QUESTION.schema).text
    session = ChatSession(manager)
    assert said(session, f"/schema {tmp_path / 'schema.sql'}", QUESTION.prompt, " ").endswith(f"\n{wanted}\n")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert "* expert-sql\n  expert-json\n  auto\n" in said(session, "/expert")
    assert said(session, "/expert json") == "expert: expert-json\n"
    assert session.messages == [], "another expert, another conversation"
    (tmp_path / "fields.json").write_text('{"city": "string", "age": "integer"}')
    shown = said(session, f"/schema {tmp_path / 'fields.json'}", "Maria lives in Lima and is 30 years old.")
    assert '{"city": "Lima", "age": 30}' in shown
    assert "a new conversation" in said(session, "/clear")
    assert session.messages == []
    assert "/schema FILE" in said(session, "/help")
    assert said(session, "/quit", "Omar turned 45.") == ""


def test_a_mistake_in_a_conversation_is_told_and_it_goes_on(manager: ExpertManager) -> None:
    session = ChatSession(manager, max_tokens=4)
    for line, kind in (("/expert nobody", UnknownModelError), ("/schema nowhere", ConfigError), ("/x", ConfigError)):
        with pytest.raises(kind):
            list(session.answer(line))
        assert said(session, line).startswith(f"{kind.__name__}: ")
    shown = said(session, "users " * 2000, "Who?")
    assert shown.startswith("PromptTooLongError: ")
    assert len(session.messages) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--json-schema", '{"type": "nonsense"}'], 'the JSON schema is not valid: Unsupported type "nonsense"'),
        (["--json-schema", '{"type": "nonsense"}', "--json"], "the JSON schema is not valid"),
        (["--json-schema", "{"], "the JSON schema is not JSON"),
        (["--regex", "(a"], "the regular expression is not valid"),
        (["--grammar"], "has no grammar"),
    ],
)
def test_an_answer_held_to_what_is_wrong_is_a_wrong_call(given: list[str], said: str) -> None:
    pytest.importorskip("xgrammar")
    done = CliRunner().invoke(app, ["generate", PACKAGES[1], "Omar turned 45.", *OPTIONS, *given])
    assert done.exit_code == 2
    assert done.stderr.startswith("GrammarError: ")
    assert said in done.stderr


def test_ctrl_c_stops_an_answer_and_forgets_it(manager: ExpertManager) -> None:
    session = ChatSession(manager, max_tokens=100)
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 1:
            raise KeyboardInterrupt

    converse(session, ["Who?"], show)
    assert shown[-1] == "\n(stopped)\n"
    assert session.messages == []


def test_lines_are_typed_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "history"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("first\nwrong\x03sec\x01a \n\x04")  # Ctrl-C drops a line, Ctrl-A goes to its beginning
        assert list(typed_lines(kept)) == ["first", "a sec"]
    assert [line[1:] for line in kept.read_text().splitlines() if line.startswith("+")] == ["first", "a sec"]


def test_chat_reads_standard_input(tmp_path: Path) -> None:
    (tmp_path / "schema.sql").write_text(QUESTION.schema)
    lines = f"{QUESTION.prompt}\n/expert json\n/nothing\n"
    arguments = ["chat", *PACKAGES, "--schema", f"@{tmp_path / 'schema.sql'}", *OPTIONS]
    done = CliRunner().invoke(app, arguments, input=lines)
    assert done.exit_code == 0, done.output
    answer, chosen, mistake, *_ = done.stdout.splitlines()
    assert answer.startswith("SELECT ")
    assert chosen == "expert: expert-json"
    assert "there is no command /nothing" in mistake
    twice = CliRunner().invoke(app, ["chat", PACKAGES[0], PACKAGES[0], *OPTIONS], input="")
    assert twice.exit_code == 2


def test_several_answers_are_printed_or_told_as_json() -> None:
    arguments = ["generate", PACKAGES[1], "Omar turned 45.", "--n", "2", "--max-tokens", "3", *OPTIONS]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 0, plain.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert told["timings"]["total"] > 0
    assert plain.stdout == f"{told['text']}\n{told['alternatives'][0]['text']}\n"


def test_nothing_in_an_answer_is_obeyed_by_a_terminal() -> None:
    assert printable("a\x1b[2J\x07\r\x9bb\n\tc é") == "a[2Jb\n\tc é"


def test_exit_codes_and_completion() -> None:
    shown = re.sub(r"\s+", " ", CliRunner().invoke(app, ["--help"]).stdout)
    for words in ("Exit codes:", "130 it was interrupted", "--install-completion"):
        assert words in shown
    asked = {"_EXPERT_COMPLETE": "complete_bash", "COMP_WORDS": "expert ge", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(app, [], prog_name="expert", env=asked)
    assert completed.stdout.split() == ["generate"]


def test_bench_measures_one_prompt_and_many() -> None:
    command = ["bench", PACKAGES[0], *OPTIONS, "--schema", QUESTION.schema, "--max-tokens", "6", "--batches", "1,3"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    one, many = json.loads(done.output)
    assert (one["num_prompts"], many["num_prompts"]) == (1, 3)
    assert (one["completion_tokens"], many["completion_tokens"]) == (6, 18)
    for speed in (one, many):
        assert 0 < speed["first_token_seconds"] <= speed["seconds"]
    shown = CliRunner().invoke(app, command)
    assert re.search(r"first token.*\n +1 .* ms .*\n +3 .* ms ", shown.output), shown.output


@pytest.mark.parametrize("batches", ["many", "0,8", ""])
def test_bench_says_what_batches_are(batches: str) -> None:
    done = CliRunner().invoke(app, ["bench", PACKAGES[0], *OPTIONS, "--batches", batches])
    assert done.exit_code == 2
    assert "Write for example 1,8,32." in done.output
