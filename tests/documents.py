"""The pages of the documentation and their blocks of code."""

import re
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PAGES = sorted((PROJECT / "docs").rglob("*.md"))


@dataclass(frozen=True)
class Block:
    """A block of code: `python` is run, `py` is type-checked, `console` is parsed, `yaml` and `json` are validated."""

    page: str
    language: str
    code: str


def blocks_of(path: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(str(path.relative_to(PROJECT)), language, code) for language, code in found]


BLOCKS = tuple(block for path in PAGES for block in blocks_of(path))


def of_language(language: str) -> list[Block]:
    """The blocks in a language, in order."""
    return [block for block in BLOCKS if block.language == language]


def commands(block: Block) -> list[str]:
    """The lines of a console block, without comments and what was printed."""
    lines = [re.sub(r"\s+#.*$", "", line) for line in block.code.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
