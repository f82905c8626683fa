"""One truth: the same rows by `Expert`, by `run_batch` and over HTTP: the same texts, reasons to end, token counts."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline import BatchResult, Expert, demo, run_batch
from pipeline.demo.questions import draw_questions
from pipeline.errors import FingerprintError
from pipeline.package import open_package
from tests.e2e.serving import FEW_RESIDENT, Service

ROWS = 120
GRAMMAR = 'root ::= ("SELECT " | "MATCH ") [a-z]+ (", " [a-z]+)* ";"'
JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "is_new": {"type": "boolean"},
    },
    "required": ["city", "count", "is_new"],
    "additionalProperties": False,
}
FREE = {"use_grammar": False}
# What rows ask for beside their question; each in turn, so that each meets each expert many times.
OPTIONS: dict[str, dict[str, Any]] = {
    "the package's own": {},
    "nucleus": {"temperature": 0.9, "top_p": 0.9},
    "wild": {**FREE, "temperature": 3.0, "top_k": 50, "max_tokens": 24},
    "penalties": {
        **FREE,
        "temperature": 1.5,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "max_tokens": 30,
    },
    "grammar": {"grammar": GRAMMAR, "temperature": 2.0, "max_tokens": 24},
    "json_schema": {"json_schema": JSON_SCHEMA, "temperature": 2.0, "max_tokens": 60},
    "regex": {"regex": "[A-Z]{3}-[0-9]{2,6}", "temperature": 2.0},
    "stop": {**FREE, "temperature": 0.7, "stop": [" FROM", "RETURN", '":']},
    "stop tokens": {**FREE, "temperature": 1.0, "stop_token_ids": list(range(300, 340)), "max_tokens": 40},
    "beyond the end": {**FREE, "temperature": 1.0, "min_tokens": 12, "max_tokens": 20, "ignore_eos": True},
    "one token": {"max_tokens": 1, "temperature": 1.0},
    "the package's grammar": {"use_grammar": True, "temperature": 2.5},  # an error for the experts without one
    "too cold": {"temperature": -1.0},  # an error
    "two constraints": {"regex": "[a-z]+", "grammar": GRAMMAR},  # an error
    "no grammar at all": {"grammar": "root ::= ("},  # an error
}
COLUMNS = tuple(sorted({name for chosen in OPTIONS.values() for name in chosen} | {"seed", "truncate"}))


@dataclass(frozen=True)
class Row:
    """A row of the dataset, and the same as a body."""

    task: demo.Task
    kind: str
    values: Mapping[str, Any]
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What both ways tell of an answer."""

    text: str = ""
    finish_reason: str = "error"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    code: str | None = None


def draw_rows() -> Iterator[Row]:
    """Questions of all three experts in turn, each with its options, its seed and its form."""
    rng = random.Random(11)
    questions = {task: list(draw_questions(task, ROWS // len(demo.TASKS) + 1, seed=3)) for task in demo.TASKS}
    kinds = list(OPTIONS)
    for number in range(ROWS):
        task = demo.TASKS[number % len(demo.TASKS)]
        place = number // len(demo.TASKS)
        question, kind = questions[task][place], kinds[(place * 4 + number) % len(kinds)]
        chosen = {**OPTIONS[kind], "seed": rng.getrandbits(62)}
        texts: dict[str, Any] = {"prompt": question.prompt, "schema": question.schema}
        match number % 10:
            case 3:
                texts["system"] = "Answer in capital letters."
                del texts["schema"]
            case 5 | 6:
                texts["messages"] = [
                    {"role": "user", "content": "Hello."},
                    {"role": "assistant", "content": "Ask me."},
                    {"role": "user", "content": texts.pop("prompt")},
                ]
            case 7:
                texts["prompt"] = texts["prompt"] + " please" * 1500
                if place % 2:
                    chosen["truncate"] = "right"
        yield Row(task, kind, {**texts, **_as_columns(chosen)}, _as_body(task, number, texts, chosen))


def _as_columns(chosen: Mapping[str, Any]) -> dict[str, Any]:
    is_json = isinstance(chosen.get("json_schema"), dict)
    return {**chosen, "json_schema": json.dumps(chosen["json_schema"])} if is_json else dict(chosen)


def _as_body(task: str, number: int, texts: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    body = {"model": task, **texts, **chosen, "stream": number % 2 == 0}
    if "json_schema" in body and "messages" in body:
        schema = body.pop("json_schema")
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "row", "schema": schema}}
    return body


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(draw_rows())


@pytest.fixture(scope="module")
def online(shared_service: Service, rows: list[Row]) -> list[Outcome]:
    """What a service of all three experts says, all rows at once."""
    shared_service.offer(FEW_RESIDENT)
    return ask_online(shared_service, rows)


def ask_online(service: Service, rows: list[Row]) -> list[Outcome]:
    replies = service.ask_all([row.body for row in rows])
    return [
        Outcome(reply.texts[0], str(reply.finish_reasons[0]), reply.prompt_tokens, reply.completion_tokens)
        if reply.error is None
        else Outcome(code=reply.code)
        for reply in replies
    ]


NAMES = ("prompt", "messages", "schema", "system", *COLUMNS)
PACKAGES = {task: demo.package(task) for task in demo.TASKS}


def run_job(rows: list[Row], folder: Path, packages: Mapping[str, Path]) -> BatchResult:
    """All rows in one job; a column says which expert answers each."""
    return run_batch(
        [{"task": row.task, **{name: row.values.get(name) for name in NAMES}} for row in rows],
        experts=packages,
        output=folder,
        output_format="jsonl",
        base_model=demo.BASE_MODEL,
        dtype="float32",
        columns={"expert": "task", "sampling": {name: name for name in COLUMNS}},
        progress=False,
    )


@pytest.fixture(scope="module")
def job(cluster: None, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    return run_job(rows, tmp_path_factory.mktemp("mixed") / "out", PACKAGES)


@pytest.fixture(scope="module")
def offline(job: BatchResult) -> list[Outcome]:
    """What the job says."""
    return [outcome_of(line) for part in job.parts for line in Path(part).read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(rows: list[Row]) -> list[Outcome]:
    """What each expert says by itself, merged into the base model."""
    found: dict[int, Outcome] = {}
    for task in demo.TASKS:
        places = [place for place, row in enumerate(rows) if row.task == task]
        with Expert.load(demo.package(task), base_model=demo.BASE_MODEL, dtype="float32", device="cpu") as expert:
            for place, result in zip(places, expert.generate_batch([rows[p].values for p in places]), strict=True):
                found[place] = (
                    Outcome(result.text, result.finish_reason, result.prompt_tokens, result.completion_tokens)
                    if result.error is None
                    else Outcome(code=result.error.code)
                )
    return [found[place] for place in range(len(rows))]


def outcome_of(line: str) -> Outcome:
    """A line of a part."""
    row = json.loads(line)
    if row["error"] is not None:
        return Outcome(code=row["error"]["code"])
    return Outcome(row["text"], row["finish_reason"], row["prompt_tokens"], row["completion_tokens"])


def test_the_same_rows_give_the_same_answers_by_batch_and_over_http(
    rows: list[Row], online: list[Outcome], offline: list[Outcome]
) -> None:
    assert differing(rows, online, offline) == []


def test_the_same_rows_mixed_in_one_job_are_answered_as_by_each_expert_alone(
    rows: list[Row], offline: list[Outcome], alone: list[Outcome]
) -> None:
    assert differing(rows, offline, alone) == []


def differing(rows: list[Row], here: list[Outcome], there: list[Outcome]) -> list[str]:
    return [
        f"row {place} ({row.task}, {row.kind}):\n  {one}\n  {other}"
        for place, (row, one, other) in enumerate(zip(rows, here, there, strict=True))
        if one != other
    ]


def test_a_job_of_several_experts_names_that_of_each_row(rows: list[Row], job: BatchResult) -> None:
    packages = {task: open_package(place) for task, place in PACKAGES.items()}
    frame = job.to_pandas()
    assert frame["expert"].tolist() == [packages[row.task].label for row in rows]
    assert frame["expert_sha256"].tolist() == [packages[row.task].digest for row in rows]
    with pytest.raises(FingerprintError) as caught:
        run_job(rows, Path(job.output), PACKAGES | {"sql": PACKAGES["json"]})
    assert [detail.partition(":")[0] for detail in caught.value.details] == ["experts"]


def test_the_rows_try_what_they_are_meant_to_try(rows: list[Row], online: list[Outcome]) -> None:
    """Each kind of option meets each expert; answers are many and various, errors few and of several sorts."""
    assert {(row.task, row.kind) for row in rows} == {(task, kind) for task in demo.TASKS for kind in OPTIONS}
    answered = [(row, outcome) for row, outcome in zip(rows, online, strict=True) if outcome.code is None]
    assert len(answered) > ROWS * 0.6
    assert len({outcome.text for _, outcome in answered}) > len(answered) * 0.7
    assert {outcome.finish_reason for _, outcome in answered} == {"stop", "length"}
    codes = {outcome.code for outcome in online} - {None}
    assert codes == {"invalid_request", "invalid_grammar", "prompt_too_long"}
    for row, outcome in answered:
        if row.kind == "json_schema" and outcome.finish_reason == "stop":
            assert set(json.loads(outcome.text)) == set(JSON_SCHEMA["properties"])


def test_other_seeds_give_other_answers(rows: list[Row], offline: list[Outcome]) -> None:
    """So that the equality above is not that of answers which nothing could change."""
    sampled = [place for place, row in enumerate(rows) if row.kind in ("wild", "penalties")]
    kinds = {offline[place].text for place in sampled if offline[place].code is None}
    assert len(kinds) > len(sampled) * 0.7
