"""The `expert` command: what it prints, and how it fails."""

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline import demo
from pipeline.cli import app
from pipeline.cli_common import errors_on_exit
from pipeline.demo.questions import draw_questions
from pipeline.package import open_package
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import make_output

SQL = str(demo.package("sql"))
JSON = str(demo.package("json"))
BASE = str(demo.BASE_MODEL)
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def expert(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_generate_prints_the_answer(tmp_path: Path) -> None:
    question = next(iter(draw_questions("sql", 1)))
    (tmp_path / "schema.sql").write_text(question.schema)
    options = ["--base-model", BASE, "--device", "cpu"]
    plain = expert("generate", SQL, question.prompt, "--schema", question.schema, *options)
    assert plain.exit_code == 0, plain.stderr
    from_file = expert("generate", SQL, "-", "--schema", f"@{tmp_path / 'schema.sql'}", *options, stdin=question.prompt)
    assert from_file.stdout == plain.stdout
    as_json = expert("generate", SQL, question.prompt, "--schema", question.schema, "--json", *options)
    assert json.loads(as_json.stdout)["text"] == plain.stdout.rstrip("\n")


def test_inspect_shows_the_card() -> None:
    shown = expert("inspect", SQL)
    assert shown.exit_code == 0, shown.stderr
    for word in ("expert-sql@0.1.0", "demo-qwen3-2m", "dora, rank 12", "GBNF"):
        assert word in shown.stdout
    card = json.loads(expert("inspect", SQL, "--json").stdout)
    assert card["adapter"] == "dora, rank 12"
    assert card["digest"].startswith("sha256:")


def test_packages_are_packed_signed_verified_and_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_TRUST_DIR", str(tmp_path / "trusted"))
    root = open_package(SQL).root
    source = tmp_path / "checkpoint"
    source.mkdir()
    for name in (*COPIED, "adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes((root / name).read_bytes())
    (source / "optimizer.pt").write_bytes(b"large")
    archive = str(tmp_path / "mine.expert")
    made = ["--name", "expert-mine", "--version", "1.2.3", "--base-model", "demo-qwen3-2m"]
    packed = expert("pack", str(source), "-o", archive, *made)
    assert (packed.exit_code, packed.stdout) == (0, f"{archive}\n"), packed.output
    assert "left out: optimizer.pt" in packed.stderr
    assert expert("verify", archive, "--trust", "signed").exit_code == 1
    key = tmp_path / "keys" / "alice.key"
    assert expert("keygen", "alice", "--folder", str(key.parent)).exit_code == 0
    assert expert("sign", archive, "--key", str(key)).exit_code == 0
    assert expert("trust", str(key.with_suffix(".pub"))).exit_code == 0
    verified = expert("verify", archive, "--trust", "trusted", "--json")
    assert verified.exit_code == 0, verified.output
    shown = json.loads(verified.stdout)
    assert shown["not_covered"] == []
    assert "signed by alice" in shown["checked"]["signature"]
    assert "mine.expert.sha256" in shown["checked"]["checksums"]
    assert "whom you trust" in expert("verify", archive).stdout.replace("\n", " ")
    staged = expert("stage", archive, "--base-model", BASE, "--to", str(tmp_path / "store"))
    assert staged.exit_code == 0, staged.output
    package, base = staged.stdout.split()
    assert "was there" in expert("stage", archive, "--to", str(tmp_path / "store")).stderr
    answered = expert("generate", package, "List the name of all users.", "--base-model", base, "--device", "cpu")
    assert answered.exit_code == 0, answered.output
    cached = json.loads(expert("cache", "ls", "--json").stdout)
    assert {"packages", "models"} <= {entry["kind"] for entry in cached if entry["whole"]}
    assert expert("cache", "verify").exit_code == 0
    assert "freed 0 bytes" in expert("cache", "prune", "--all", "--dry-run").stdout.replace("would free", "freed")
    assert json.loads(expert("schema").stdout)["title"] == "manifest.json of an expert package"


@pytest.mark.parametrize("task", demo.TASKS)
def test_demo_data_writes_questions(task: demo.Task, tmp_path: Path) -> None:
    parquet, jsonl = tmp_path / "a" / "q.parquet", tmp_path / "q.jsonl"
    assert expert("demo-data", str(parquet), "--rows", "30", "--task", task).exit_code == 0
    assert expert("demo-data", str(jsonl), "--rows", "30", "--task", task).exit_code == 0
    table = pq.read_table(parquet)
    assert table.column_names == ["id", "schema", "prompt", "expected"]
    assert table.to_pylist() == [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert len(set(table["schema"].to_pylist())) < 30 == len(set(table["id"].to_pylist()))
    assert expert("demo-data", str(jsonl), "--rows", "30", "--task", task).exit_code == 0, "the same is there already"
    refused = expert("demo-data", str(jsonl), "--rows", "31", "--task", task)
    assert refused.exit_code == 2
    assert "exists, and holds something else" in refused.stderr
    assert len(jsonl.read_text().splitlines()) == 30
    assert expert("demo-data", str(jsonl), "--rows", "31", "--task", task, "--overwrite").exit_code == 0
    assert len(jsonl.read_text().splitlines()) == 31
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "nowhere.expert", "a"], 1, ["PackageNotFoundError", "nowhere.expert", "Fix:"]),
        (["generate", SQL, "a"], 1, ["BaseModelError", "demo-qwen3-2m", "Fix:"]),
        (["generate", SQL, " ", "--base-model", BASE], 2, ["InvalidRequestError", "prompt is empty", "Fix:"]),
        (["generate", SQL, "a", "--schema", "@nowhere.sql"], 2, ["ConfigError", "nowhere.sql", "Fix:"]),
        (["inspect", __file__], 1, ["ArchiveError", "Fix:"]),
        (["stage", "--to", "store"], 2, ["ConfigError", "nothing is named to stage", "Fix:"]),
        (["pack", ".", "-o", "x.expert", "--name", "a", "--manifest", "b"], 2, ["ConfigError", "Fix:"]),
        (["keygen", "../x"], 2, ["ConfigError", "no name for a key", "Fix:"]),
        (["trust", "nowhere.pub"], 2, ["ConfigError", "nowhere.pub", "Fix:"]),
        (["cache", "prune", "--max-size", "much"], 2, ["ConfigError", "20GiB", "Fix:"]),
        (["run", "nowhere.yaml"], 2, ["ConfigError", "nowhere.yaml", "Fix:"]),
        (["run", "configs/demo.yaml", "num_wrokers=2"], 2, ["ConfigError", "num_workers", "Fix:"]),
        (
            ["run", "configs/demo.yaml", f"expert={JSON}", "sampling.use_grammar=true"],
            2,
            ["GrammarError", "no grammar"],
        ),
        (["eval", "configs/demo.yaml", "sampling.json_schema='{'"], 2, ["GrammarError", "not JSON", "Fix:"]),
        (["status", "nowhere"], 1, ["OutputError", "not the output of a job", "Fix:"]),
        (["verify-output", "nowhere"], 1, ["OutputError", "not the output of a job", "Fix:"]),
        (["status", "s3://a/b", "--storage-option", "x"], 2, ["ConfigError", "KEY=VALUE", "Fix:"]),
        (["generate"], 2, ["Missing argument"]),
        (["demo-data", "x.parquet", "--rows", "0"], 2, ["--rows"]),
        (["demo-data", "x.csv"], 2, ["x.csv ends with neither .parquet nor .jsonl"]),
        (["demo-data", "x.jsonl", "--format", "parquet"], 2, ["x.jsonl does not go with --format parquet"]),
        (["demo-data", "x.parquet", "--format", "openai"], 2, ["x.parquet does not go with --format openai"]),
        (["pack", ".", "-o", "x.expert", "--name", "a"], 2, ["ConfigError: --name 'a'", "expert-a"]),
        (["pack", ".", "-o", "x.expert", "--name", "expert-a", "--version", "1"], 2, ["ConfigError: --version '1'"]),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: list[str], code: int, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    failed = expert(*arguments)
    assert failed.exit_code == code, failed.output
    for words in says:
        assert words in failed.stderr
    assert "Traceback" not in failed.output


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, errors_on_exit():  # noqa: PT012  # what follows the signal is never reached
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it goes on")
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted; what is committed stays, and the same command continues\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_status_and_verification_of_an_output(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    output = make_output(storage, "jsonl", [{}, {1}], finished=False)
    unfinished = expert("status", str(tmp_path / "out"))
    assert unfinished.exit_code == 0, unfinished.stderr
    for words in ("2 of 2 (100.0%)", "stopped", "1 (prompt_too_long 1)"):
        assert words in unfinished.stdout
    assert expert("verify-output", str(tmp_path / "out")).exit_code == 1
    output.finish()
    assert json.loads(expert("status", str(tmp_path / "out"), "--json").stdout)["complete"] is True
    verified = expert("verify-output", str(tmp_path / "out"))
    assert verified.exit_code == 0, verified.output
    assert "8 in 2 parts" in verified.stdout
    (tmp_path / "out" / "notes.txt").write_text("mine")
    found = expert("verify-output", str(tmp_path / "out"), "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["problems"] == [{"where": "notes.txt", "what": "is no file of a job"}]


def test_every_command_teaches_by_example() -> None:
    for words in commands_of(typer.main.get_command(app)):
        assert "Example: expert" in expert(*words, "--help").stdout, words


def commands_of(command: Any) -> list[tuple[str, ...]]:
    """The words of each command, those of groups among them."""
    if not hasattr(command, "commands"):
        return [()]
    return [(name, *rest) for name, inner in command.commands.items() for rest in commands_of(inner)]
