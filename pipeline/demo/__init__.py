"""A tiny real base model and three real experts, to try everything with and to test everything on.

The base is a `Qwen3ForCausalLM` of two million parameters, trained from nothing in twenty minutes on two cores; the
experts are ordinary `.expert` packages: **sql** (DoRA, with a grammar), **cypher** (LoRA) and **json** (LoRA, rsLoRA).

They live in a small closed world: schemas of one or two tables drawn from sixty nouns, thirty columns and a hundred
values, and fourteen kinds of question in fixed wordings. Inside that world they are nearly always right; outside it
they are of no use. `artifacts/artifacts.json` tells how each was made and what it scores, and
`python -m pipeline.demo.train` makes them again.
"""

from pathlib import Path

from pipeline.demo.names import BASE_NAME, TASKS, VERSION, Task

ARTIFACTS = Path(__file__).parent / "artifacts"
BASE_MODEL = ARTIFACTS / BASE_NAME

__all__ = ["ARTIFACTS", "BASE_MODEL", "TASKS", "Task", "package"]


def package(task: Task) -> Path:
    """The path of a demo expert's package.

    Args:
        task: `"sql"`, `"cypher"` or `"json"`.

    Returns:
        The `.expert` file; its base model is `BASE_MODEL`.
    """
    return ARTIFACTS / f"expert-{task}-{BASE_NAME}.v{VERSION}.expert"
