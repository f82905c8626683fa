"""An expert as an LLM of LlamaIndex; `pip install "expert-pipeline[llamaindex]"`."""

from collections.abc import Mapping, Sequence
from contextlib import aclosing, closing
from functools import cached_property
from typing import Any

from pipeline.errors import ConfigError
from pipeline.integrations.asked import Asked, checked_role, raise_missing
from pipeline.results import InferenceResult

try:
    from llama_index.core.base.llms.generic_utils import (
        achat_to_completion_decorator,
        astream_chat_to_completion_decorator,
        chat_to_completion_decorator,
        stream_chat_to_completion_decorator,
    )
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseAsyncGen,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseAsyncGen,
        CompletionResponseGen,
        LLMMetadata,
        MessageRole,
        TextBlock,
    )
    from llama_index.core.bridge.pydantic import Field
    from llama_index.core.llms import LLM
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
except ImportError as error:
    raise_missing("llama-index-core", "llamaindex", error)

__all__ = ["ExpertLLM"]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


class ExpertLLM(LLM):
    """An expert, or one of a manager's, wherever LlamaIndex takes an LLM.

    What threads and tasks ask at the same time is answered in one running batch. Options of a call are those of
    `Expert.generate`: `schema=`, `temperature=`, `json_schema=` ...

    Args:
        expert: An `Expert`, or an `ExpertManager`; it stays the caller's to close.
        model: Which of the manager's experts; `"auto"` lets each prompt decide. Left out for an `Expert`.
        options: Options of every call; those of a call go before them.
        context_window: Tokens that the model's context holds. Left out for an `Expert`, which knows.
        num_output: Tokens that LlamaIndex keeps free of them for the answer; the manifest's `max_new_tokens` of an
            `Expert`, or 256.

    Examples:
        >>> from pipeline import Expert, demo
        >>> from pipeline.integrations.llamaindex import ExpertLLM
        >>> expert = Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL)
        >>> llm = ExpertLLM(expert=expert, options={"schema": "CREATE TABLE users (id INT, name TEXT);"})
        >>> llm.complete("List the name of all users.").text
        'SELECT name FROM users'
    """

    expert: Any = Field(exclude=True)
    model: str | None = None
    options: Mapping[str, Any] = Field(default_factory=dict)
    context_window: int | None = None
    num_output: int | None = None

    def model_post_init(self, context: Any, /) -> None:
        """Check that the expert can be asked."""
        super().model_post_init(context)
        if self.asked.package is None and self.context_window is None:
            raise ConfigError("context_window is not given", hint="Give it, as the manager's experts may differ.")

    @cached_property
    def asked(self) -> Asked:
        """What answers."""
        return Asked(self.expert, self.model)

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex calls it."""
        return "ExpertLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex makes prompts by; the model of an `Expert` is loaded for it."""
        package = self.asked.package
        most = 256 if package is None else package.manifest.decoding.max_new_tokens or 256
        return LLMMetadata(
            context_window=self.context_window or self.expert.context_length,
            num_output=self.num_output or most,
            is_chat_model=True,
            model_name=self.asked.identity["expert"],
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return _response(self.asked.generate(**self._given(messages, kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation, giving the text as it comes."""

        def pieces() -> ChatResponseGen:
            text = ""
            with closing(self.asked.stream(**self._given(messages, kwargs))) as stream:
                for piece in stream:
                    text += piece
                    yield _part(text, piece)

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`."""
        return _response(await self.asked.agenerate(**self._given(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As `stream_chat`."""

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async with aclosing(self.asked.astream(**self._given(messages, kwargs))) as stream:
                async for piece in stream:
                    text += piece
                    yield _part(text, piece)

        return pieces()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        """Answer one prompt."""
        return chat_to_completion_decorator(self.chat)(prompt, **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:  # noqa: ARG002
        """Answer one prompt, giving the text as it comes."""
        return stream_chat_to_completion_decorator(self.stream_chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        """As `complete`."""
        return await achat_to_completion_decorator(self.achat)(prompt, **kwargs)

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: ARG002
        **kwargs: Any,
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`."""
        return await astream_chat_to_completion_decorator(self.astream_chat)(prompt, **kwargs)

    def _given(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.options, **kwargs, "messages": [_message(one, at) for at, one in enumerate(messages)]}


def _message(message: ChatMessage, position: int) -> dict[str, str]:
    is_text = all(isinstance(block, TextBlock) for block in message.blocks)
    role = MessageRole(message.role).value
    return checked_role(role, ROLES, message.content or "" if is_text else None, f"messages[{position}]")


def _response(result: InferenceResult) -> ChatResponse:
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
    message = ChatMessage(role=MessageRole.ASSISTANT, content=result.text)
    return ChatResponse(message=message, raw=result.to_dict(), additional_kwargs=usage)


def _part(text: str, piece: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)
