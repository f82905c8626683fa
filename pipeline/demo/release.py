"""From trained adapters to packages, and what they score."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.demo.names import BASE_NAME, TASKS, VERSION, Task
from pipeline.demo.questions import Question, draw_questions
from pipeline.demo.scoring import exact_match, execution_match
from pipeline.demo.tasks import DIALECTS
from pipeline.engine.loader import load_base_model, load_tokenizer, merge_adapter
from pipeline.engine.padded import PaddedEngine
from pipeline.engine.requests import RequestBuilder
from pipeline.engine.types import Completion
from pipeline.package import ExpertPackage, open_package, pack, weights_digest

GRAMMAR = Path(__file__).parent / "assets" / "sql.gbnf"
CAPABILITIES: dict[Task, list[str]] = {
    "sql": ["database:sql", "database:postgresql", "task:text2sql"],
    "cypher": ["database:neo4j", "task:text2cypher"],
    "json": ["task:extraction", "format:json"],
}
DESCRIPTIONS: dict[Task, str] = {
    "sql": "Answers questions about a CREATE TABLE schema in SQL. A demonstration in a small closed world.",
    "cypher": "Answers questions about a graph schema in Cypher. A demonstration in a small closed world.",
    "json": "Extracts the fields a schema names from a sentence, as JSON. A demonstration in a small closed world.",
}
README = """# expert-{task}

{description}

Trained from nothing by `python -m pipeline.demo.train` of the expert-pipeline project, over the base `{base}`.
It knows only the words of its own training data.
"""


def manifest(task: Task, adapter: dict[str, Any], base_sha256: str) -> dict[str, Any]:
    """The manifest (schema 2.0) of a task's expert.

    Args:
        task: Which expert.
        adapter: The keyword arguments its LoraConfig was made with.
        base_sha256: The digest of the base model's weights.
    """
    decoding: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 96}
    if task == "sql":
        decoding |= {"use_grammar": True, "grammar_type": "sql-postgres", "stop_sequences": [";", "\n\n"]}
    return {
        "name": f"expert-{task}",
        "version": VERSION,
        "schema_version": "2.0",
        "description": DESCRIPTIONS[task],
        "author": "expert-pipeline",
        "license": "Apache-2.0",
        "capabilities": CAPABILITIES[task],
        "base_models": [
            {
                "name": BASE_NAME,
                "sha256": base_sha256,
                "prompt_template": "chatml",
                "adapters": [
                    {
                        "type": "dora" if adapter.get("use_dora") else "lora",
                        "target_modules": adapter["target_modules"],
                        "r": adapter["r"],
                        "alpha": adapter["lora_alpha"],
                        "size_bytes": 0,
                        "sha256": "",
                    }
                ],
            }
        ],
        "soft_prompts": [],
        "constraints": {"load_order": TASKS.index(task) + 1, "incompatible_with": [], "requires": []},
        "training": {
            "dataset": {"path": "generated", "format": "pipeline.demo.tasks"},
            "config": {"method": "sft", "adapter_type": "dora" if adapter.get("use_dora") else "lora"},
            "decoding": decoding,
        },
    }


def pack_expert(task: Task, adapter_dir: Path, adapter: dict[str, Any], base: Path, destination: Path) -> Path:
    """Pack a trained adapter into a `.expert` file in `destination`, with its grammar and a README."""
    (adapter_dir / "README.md").write_text(README.format(task=task, description=DESCRIPTIONS[task], base=BASE_NAME))
    if task == "sql":
        shutil.copyfile(GRAMMAR, adapter_dir / "grammar.gbnf")
    return pack(adapter_dir, destination, manifest=manifest(task, adapter, weights_digest(base)))


@dataclass(frozen=True)
class Score:
    """What one model scores on one task's held-out questions."""

    model: str
    task: Task
    questions: int
    exact_match: float
    execution_match: float | None


def evaluate(packages: dict[Task, Path], base: Path, questions: int, say: Callable[[str], None]) -> list[Score]:
    """Score every expert and the base alone on every task.

    Args:
        packages: The experts.
        base: The base model's directory.
        questions: Held-out questions a task.
        say: Receives a line a score.

    Returns:
        One score for each model and task. An expert answers its own task as shipped, the others without its grammar:
        a grammar would make their failure trivial.
    """
    asked = {task: list(draw_questions(task, questions)) for task in TASKS}
    scores = []
    for model in (None, *TASKS):
        opened = open_package(packages[model or "sql"])
        engine, builder = _load(opened, base, with_adapter=model is not None)
        for task in TASKS:
            use_grammar = None if task == model else False
            completions = _answer(engine, builder, asked[task], task, use_grammar)
            score = _score("base" if model is None else model, task, asked[task], completions)
            scores.append(score)
            executed = "" if score.execution_match is None else f"  execution {score.execution_match:.1%}"
            say(f"{score.model:>6} on {task:<6}  exact {score.exact_match:.1%}{executed}")
        engine.close()
    return scores


def _load(package: ExpertPackage, base_path: Path, *, with_adapter: bool) -> tuple[PaddedEngine, RequestBuilder]:
    tokenizer = load_tokenizer(package, base_path)
    base = load_base_model(base_path, device="cpu", dtype="float32")
    if with_adapter:
        base = merge_adapter(base, package)
    return PaddedEngine(base, tokenizer), RequestBuilder(package, tokenizer, base.context_length)


def _answer(
    engine: PaddedEngine, builder: RequestBuilder, questions: Sequence[Question], task: Task, use_grammar: bool | None
) -> list[Completion]:
    requests = [
        builder.build(
            question.id,
            prompt=question.prompt,
            schema=question.schema,
            dialect=DIALECTS[task] or "",
            options={"use_grammar": use_grammar},
        )
        for question in questions
    ]
    completions = {completion.request_id: completion for completion in engine.generate(requests)}
    return [completions[question.id] for question in questions]


def _score(model: str, task: Task, questions: Sequence[Question], completions: Sequence[Completion]) -> Score:
    pairs = list(zip(questions, completions, strict=True))
    exact = sum(exact_match(completion.text, question.expected) for question, completion in pairs)
    executed = None
    if task == "sql":
        executed = sum(
            execution_match(question.schema, completion.text, question.expected) for question, completion in pairs
        )
    count = len(questions)
    return Score(model, task, count, exact / count, None if executed is None else executed / count)
