"""An expert as a chat model of LangChain; `pip install "expert-pipeline[langchain]"`."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

from pipeline.errors import ConfigError, InferenceError
from pipeline.integrations.asked import Asked, checked_role, raise_missing
from pipeline.results import InferenceResult

try:
    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
    from langchain_core.utils.function_calling import convert_to_json_schema
except ImportError as error:
    raise_missing("langchain-core", "langchain", error)

__all__ = ["ChatExpert"]

ROLES = {"system": "system", "human": "user", "ai": "assistant"}


class ChatExpert(BaseChatModel):
    """An expert, or one of a manager's, wherever LangChain takes a chat model.

    What is asked at the same time, by `batch` (at most `max_concurrency` at a time), `abatch`, threads or tasks, is
    answered in one running batch. Options of a call, or of `bind`, are those of `Expert.generate`: `schema=`,
    `temperature=`, `json_schema=` ...

    Args:
        expert: An `Expert`, or an `ExpertManager`; it stays the caller's to close.
        model: Which of the manager's experts; `"auto"` lets each prompt decide. Left out for an `Expert`.
        options: Options of every call; those of a call go before them.

    Examples:
        >>> from pipeline import Expert, demo
        >>> from pipeline.integrations.langchain import ChatExpert
        >>> expert = Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL)
        >>> model = ChatExpert(expert=expert, options={"schema": "CREATE TABLE users (id INT, name TEXT);"})
        >>> model.invoke("List the name of all users.").text
        'SELECT name FROM users'
    """

    expert: Any
    model: str | None = None
    options: Mapping[str, Any] = {}

    def model_post_init(self, context: Any, /) -> None:
        """Check that the expert can be asked."""
        super().model_post_init(context)
        _ = self.asked

    @cached_property
    def asked(self) -> Asked:
        """What answers."""
        return Asked(self.expert, self.model)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[Any, Any]:
        """A runnable whose answers are held to a schema while they are generated, and then parsed.

        Args:
            schema: A Pydantic class, a `TypedDict` or a JSON schema.
            include_raw: Give `{"raw", "parsed", "parsing_error"}` instead of what is parsed.
            kwargs: `method` may be `"json_schema"`, and `strict` True: it is always so.

        Raises:
            ConfigError: Another method is asked for.
            InferenceError: From the runnable: the answer was cut before it was whole.
        """
        if kwargs.pop("method", "json_schema") != "json_schema" or kwargs.pop("strict", True) is False or kwargs:
            raise ConfigError('answers are held to a schema by method "json_schema" only', hint="Leave options out.")
        parser = RunnableLambda(partial(_parsed, schema))
        held = self.bind(json_schema=convert_to_json_schema(schema))
        if not include_raw:
            return held | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=held) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    @property
    def _llm_type(self) -> str:
        return "expert"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self.asked.identity, **self.options}

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return _chat_result(self.asked.generate(**self._given(messages, stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: Any = None,
        run_manager: Any = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        return _chat_result(await self.asked.agenerate(**self._given(messages, stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: Any = None,
        run_manager: Any = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with closing(self.asked.stream(**self._given(messages, stop, kwargs))) as stream:
            for piece in stream:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        yield _last_chunk(stream.result)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: Any = None,
        run_manager: Any = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(self.asked.astream(**self._given(messages, stop, kwargs))) as stream:
            async for piece in stream:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        yield _last_chunk(stream.result)

    def _given(self, messages: list[BaseMessage], stop: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {**self.options, **kwargs, "messages": [_message(one, at) for at, one in enumerate(messages)]}
        return given if stop is None else {**given, "stop": stop}


def _message(message: BaseMessage, position: int) -> dict[str, str]:
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    is_text = all(isinstance(block, str) or block.get("type") == "text" for block in blocks)
    return checked_role(message.type, ROLES, str(message.text) if is_text else None, f"messages[{position}]")


def _parsed(schema: Any, message: BaseMessage) -> Any:
    """An answer as an object of its schema; LangChain's own parser would complete one that was cut."""
    try:
        read = getattr(schema, "model_validate_json", json.loads)
        return read(message.text)
    except ValueError as error:
        raise InferenceError(
            "the answer is not a whole object of its schema", hint="Raise max_tokens: it was cut before its end."
        ) from error


def _usage(result: InferenceResult) -> UsageMetadata:
    total = result.prompt_tokens + result.completion_tokens
    return UsageMetadata(input_tokens=result.prompt_tokens, output_tokens=result.completion_tokens, total_tokens=total)


def _about(result: InferenceResult) -> dict[str, Any]:
    return {
        "model_name": result.expert,
        "expert_sha256": result.expert_sha256,
        "finish_reason": result.finish_reason,
        "grammar_valid": result.grammar_valid,
    }


def _chat_result(result: InferenceResult) -> ChatResult:
    answers = (result, *result.alternatives)
    generations = [
        ChatGeneration(
            message=AIMessage(content=one.text, response_metadata=_about(one), usage_metadata=_usage(one)),
            generation_info={"finish_reason": one.finish_reason},
        )
        for one in answers
    ]
    return ChatResult(generations=generations, llm_output={"model_name": result.expert})


def _last_chunk(result: InferenceResult) -> ChatGenerationChunk:
    """Says what an answer took, after its text."""
    about = _about(result)
    message = AIMessageChunk(content="", response_metadata=about, usage_metadata=_usage(result), chunk_position="last")
    return ChatGenerationChunk(message=message, generation_info={"finish_reason": result.finish_reason})
