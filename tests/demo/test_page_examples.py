"""The playground's example questions are the demo's own, and are shown for the experts that are released."""

import json

from pipeline import demo
from pipeline.demo import page_examples
from pipeline.demo.questions import draw_questions


def test_the_file_is_what_the_recipe_writes() -> None:
    written = json.loads(page_examples.PATH.read_text(encoding="utf-8"))

    assert written == page_examples.examples(), "run python -m pipeline.demo.page_examples"


def test_examples_carry_no_answers() -> None:
    for task, examples in zip(demo.TASKS, page_examples.examples().values(), strict=True):
        drawn = {(question.schema, question.prompt) for question in draw_questions(task, page_examples.ROWS)}
        assert {(example["schema"], example["prompt"]) for example in examples} <= drawn
        assert all(set(example) == {"schema", "prompt"} for example in examples)
        assert len({example["schema"] for example in examples}) == page_examples.PER_EXPERT
