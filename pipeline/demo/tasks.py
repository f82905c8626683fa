"""The three demo tasks: what is asked, and the one right answer."""

import json
from dataclasses import dataclass
from random import Random

from pipeline.demo.extraction import Extraction, draw_extraction, draw_fields, fields_schema
from pipeline.demo.names import Task
from pipeline.demo.queries import Query, draw_query
from pipeline.demo.world import draw_schema, is_held_out

DIALECTS: dict[Task, str | None] = {"sql": "postgres", "cypher": "neo4j", "json": None}
INSTRUCTIONS: dict[Task, str] = {"sql": "Answer in SQL.", "cypher": "Answer in Cypher.", "json": "Answer in JSON."}
TERMINATORS: dict[Task, str] = {"sql": ";", "cypher": "", "json": ""}
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Example:
    """One question over one schema. `expected` is the task's answer, `plan` the base model's neutral one."""

    task: Task
    kind: str
    schema: str
    prompt: str
    expected: str
    plan: str


def draw_group(rng: Random, task: Task, size: int, *, held_out: bool) -> list[Example]:
    """`size` different questions over one schema.

    With `held_out`, every question uses a pair that training never shows; without, none does.
    """
    examples: dict[str, Example] = {}
    schema = draw_schema(rng)
    fields = draw_fields(rng)
    for draw in range(1, MAX_DRAWS):
        if len(examples) == size:
            break
        if draw % 60 == 0:  # a small schema can run out of questions of the wanted split
            schema, fields, examples = draw_schema(rng), draw_fields(rng), {}
        drawn: Query | Extraction = draw_extraction(rng, fields) if task == "json" else draw_query(rng, schema)
        if any(is_held_out(*pair) for pair in drawn.pairs()) is not held_out:
            continue
        if isinstance(drawn, Extraction):
            example = Example(
                task, "extract", fields_schema(fields), drawn.text(rng), json.dumps(drawn.answer()), drawn.as_plan()
            )
        else:
            text = schema.as_sql() if task == "sql" else schema.as_graph()
            answer = drawn.as_sql() if task == "sql" else drawn.as_cypher()
            example = Example(task, drawn.kind, text, drawn.question(rng), answer, drawn.as_plan())
        examples.setdefault(example.prompt, example)
    return list(examples.values())
