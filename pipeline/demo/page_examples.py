"""Example questions for the playground: `python -m pipeline.demo.page_examples` writes them anew."""

import json
from itertools import islice
from pathlib import Path

from pipeline import demo
from pipeline.demo.questions import Question, draw_questions
from pipeline.package import open_package
from pipeline.serve import playground

PATH = Path(playground.__file__).parent / "examples.json"
ROWS = 100
PER_EXPERT = 3


def examples() -> dict[str, list[dict[str, str]]]:
    """For each demo package, by its digest: held-out questions, each with another schema, and no answers."""
    return {open_package(demo.package(task)).digest: _examples(task) for task in demo.TASKS}


def _examples(task: demo.Task) -> list[dict[str, str]]:
    by_schema: dict[str, Question] = {}
    for question in draw_questions(task, ROWS):
        by_schema.setdefault(question.schema, question)
    return [{"schema": one.schema, "prompt": one.prompt} for one in islice(by_schema.values(), PER_EXPERT)]


def main() -> None:
    """Write the file that the page reads."""
    PATH.write_text(json.dumps(examples(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
