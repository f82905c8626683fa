"""The README's text and its code."""

from tests.documents import PROJECT, blocks_of

README = (PROJECT / "README.md").read_text(encoding="utf-8")
_BLOCKS = blocks_of(PROJECT / "README.md")
PYTHON = [block.code for block in _BLOCKS if block.language == "python"]
CONSOLE = "\n".join(block.code for block in _BLOCKS if block.language == "console")
