"""What the demo's parts are called."""

from typing import Literal

Task = Literal["sql", "cypher", "json"]
TASKS: tuple[Task, ...] = ("sql", "cypher", "json")

BASE_NAME = "demo-qwen3-2m"
VERSION = "0.1.0"
