"""A tokenizer's chat template, rendered within bounds.

What a template makes of ordinary conversations was tried when its package was opened. It may still run away with a
certain one: so each rendering is bounded, and one that runs away is the error of that row alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from pipeline.errors import TokenizerError
from pipeline.package.bounded_template import BoundedTemplate

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """Renders and encodes conversations as `tokenizer.apply_chat_template` does.

    Args:
        tokenizer: Of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text: str = tokenizer.get_chat_template()
        self._variables = {
            **tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            "enable_thinking": False,
        }

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: Whether the answer's turn is opened.

        Raises:
            TokenizerError: The template cannot render these messages, or runs away with them.
        """
        variables = self._variables | {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        characters = sum(len(text) for message in messages for text in message.values())
        return self._within_bounds(lambda template: template.render(variables, characters))

    def encode(self, messages: Messages, *, add_generation_prompt: bool = True) -> tuple[int, ...]:
        """The tokens of a conversation; control tokens that stand in a content are encoded as the text they are.

        Raises:
            TokenizerError: As `render`; or the tokenizer cannot tell such a control token from its text.
        """
        from transformers.utils.chat_template_utils import mark_control_tokens

        marked: Any = mark_control_tokens([dict(message) for message in messages], self._control_tokens)
        text = self.render(marked, add_generation_prompt=add_generation_prompt)
        try:
            encoded = self._tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)
        except (ValueError, NotImplementedError) as error:
            raise TokenizerError(
                "the tokenizer cannot encode this conversation",
                details=(str(error),),
                hint="Leave the control tokens of the model out of the prompt.",
            ) from error
        return tuple(encoded["input_ids"])

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """What is text where it stands in a content: special tokens, and added tokens that the template writes itself.

        Source: `PreTrainedTokenizerBase._get_control_tokens`, which compiles the template without bounds.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        chosen = getattr(self._tokenizer, "chat_control_tokens", None)
        if chosen is None:
            written = self._within_bounds(lambda template: "\0".join(template.literals))
            chosen = {token.content for token in added if token.content in written and not token.content.isspace()}
        found = [token.content for token in added if token.special or token.content in set(chosen)]
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")

    def _within_bounds(self, run: Callable[[BoundedTemplate], T]) -> T:
        try:
            return run(_compiled(self._text))
        except Exception as error:  # a chat template is a foreign program: it may raise anything
            raise TokenizerError(
                "the chat template cannot render this conversation",
                details=(f"{type(error).__name__}: {error}",),
                hint="Check chat_template.jinja, or chat_template in tokenizer_config.json, of the expert or its base.",
            ) from error


@lru_cache(maxsize=64)
def _compiled(text: str) -> BoundedTemplate:
    """The template in the environment that transformers gives to any; it would compute constants without bounds."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return BoundedTemplate(text, like=_compile_jinja_template("").environment)
