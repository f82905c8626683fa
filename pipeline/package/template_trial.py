"""A trial of a chat template: whether it stays within bounds for ordinary conversations, before any is asked."""

import re
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from pipeline.package.bounded_template import BoundedTemplate
from pipeline.package.template_nodes import BoundError

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks of transformers, which jinja does not know
_SYSTEM, _USER = {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "How many are there?"}
_CONVERSATIONS = (
    [_USER],
    [_SYSTEM, _USER],
    [_SYSTEM, _USER, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "And now?"}],
)


def try_template(text: str) -> str | None:
    """Render a chat template for a few ordinary conversations.

    Args:
        text: The template.

    Returns:
        What is wrong with it, or None. That it does not take a conversation, and says so, is nothing wrong.
    """
    try:
        template = BoundedTemplate(_GENERATION.sub("", text), functions=_FUNCTIONS)
    except TemplateSyntaxError as problem:
        return f"line {problem.lineno}: {problem.message}"
    except (BoundError, SecurityError, RecursionError) as problem:
        return str(problem) or "it is nested too deep"
    for messages in _CONVERSATIONS:
        try:
            template.render(_variables(messages))
        except (BoundError, SecurityError) as problem:
            return str(problem)
        except (RecursionError, MemoryError) as problem:
            return f"it calls itself without end ({type(problem).__name__})"
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            continue
    return None


def _variables(messages: list[dict[str, str]]) -> dict[str, Any]:
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<s>")
    return tokens | {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "enable_thinking": False,
    }


def _refuse(message: str) -> None:
    raise ValueError(message)


_FUNCTIONS = {"raise_exception": _refuse, "strftime_now": lambda _: "2025-01-01"}
