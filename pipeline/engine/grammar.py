"""What an answer may be held to: checks that need neither xgrammar nor torch. `grammar_compiler` compiles it."""

import functools
import importlib.util
import logging
import re

from pipeline.engine.json_schema import check_json_schema
from pipeline.engine.types import Grammar
from pipeline.errors import GrammarError
from pipeline.package.package import MAX_GRAMMAR_BYTES

logger = logging.getLogger(__name__)

INSTALL_HINT = 'Install it: pip install "expert-pipeline[grammar]"'
JSON_OBJECT = Grammar("json_schema", '{"type": "object"}')  # any JSON object
NAMES = {"gbnf": "GBNF grammar", "json_schema": "JSON schema", "regex": "regular expression"}

MAX_SAID = 300  # characters of what a compiler says, in an error's message


def is_available() -> bool:
    """Whether xgrammar is installed."""
    return importlib.util.find_spec("xgrammar") is not None


@functools.cache
def warn_not_applied(label: str, why: str) -> None:
    """Say once that a package's manifest asks for a grammar which cannot be applied."""
    logger.warning("the manifest of %s asks for a grammar, %s; its answers are not constrained", label, why)


def check_grammar(grammar: Grammar) -> None:
    """Check what can be checked of a grammar without xgrammar.

    Raises:
        GrammarError: It is empty, too large, too deep or not text.
    """
    try:
        size = len(grammar.text.encode())
    except UnicodeEncodeError as error:
        raise not_valid(grammar, error) from error
    if not grammar.text.strip() or size > MAX_GRAMMAR_BYTES:
        raise GrammarError(
            f"the {NAMES[grammar.kind]} has {size:,} bytes", hint=f"Give one of 1 to {MAX_GRAMMAR_BYTES:,} bytes."
        )
    if grammar.kind == "json_schema":
        check_json_schema(grammar.text)


def not_valid(grammar: Grammar, error: Exception) -> GrammarError:
    """The error of a grammar that is wrong, from what a foreign compiler or codec says of it."""
    # xgrammar puts a time and a place in its own source before what it says.
    said = re.sub(r"(?m)^\[[\d:]+\] \S+?:\d+: ", "", str(error)).strip()
    first, *more = said.splitlines()[:5] or [type(error).__name__]
    return GrammarError(
        f"the {NAMES[grammar.kind]} is not valid: {first[:MAX_SAID]}",  # a row's error is the message alone
        details=more,
        hint="Correct what is named above.",
    )
