"""What is told of answers in the shapes of OpenAI's: one whole body, or the chunks of a stream.

Source: OpenAI's API reference (chat.completion, chat.completion.chunk, text_completion).
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.openai_api.events import Delta, Ended, TokenText
from pipeline.openai_api.http_errors import HttpError
from pipeline.openai_api.protocol import Call, Kind

DONE = b"data: [DONE]\n\n"
_MIN_LOGPROB = -9999.0  # what OpenAI says for a token of no probability: JSON has no infinity
ID_PREFIXES: Mapping[Kind, str] = {"chat": "chatcmpl-", "text": "cmpl-"}
_OBJECTS: Mapping[Kind, tuple[str, str]] = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "text": ("text_completion", "text_completion"),
}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Answers:
    """Gathers the answers of one request and puts them into shape.

    Args:
        call: What was asked for.
        answer_id: What a client may name the answers by.
        digest: The sha256 of the package that answers.
        created: When they were asked for, in seconds since 1970.
    """

    def __init__(self, call: Call, answer_id: str, *, digest: str, created: int) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._call = call
        self._whole, chunk = _OBJECTS[call.kind]
        self._head = {
            "id": answer_id,
            "created": created,
            "model": call.model,
            "system_fingerprint": f"fp_{digest[:12]}",
        }
        head = _encode({"object": chunk, **self._head})
        self._chunk_head = f'data: {head[:-1]},"choices":['
        self._chunk_tail = '],"usage":null}\n\n' if call.includes_usage else "]}\n\n"
        self._answers = [_Answer() for _ in range(call.num_answers)]

    def add(self, delta: Delta) -> None:
        """Keep text for the whole body."""
        answer = self._answers[delta.index]
        answer.texts.append(delta.text)
        if delta.logprobs is not None:
            answer.tokens.extend(delta.logprobs)

    def end(self, ended: Ended) -> None:
        """Keep why an answer ended."""
        self._answers[ended.index].finish_reason = ended.finish_reason
        self.completion_tokens += ended.completion_tokens

    @property
    def num_missing(self) -> int:
        """How many answers have not ended."""
        return sum(answer.finish_reason is None for answer in self._answers)

    def body(self) -> bytes:
        """The whole answer, as JSON."""
        return json_bytes(self.content())

    def content(self) -> dict[str, Any]:
        """The whole answer, as plain values."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(self._answers)]
        return {"object": self._whole, **self._head, "choices": choices, "usage": self._usage()}

    def delta_chunk(self, delta: Delta) -> bytes:
        """The event that carries text; before the first text of a chat answer, the one that says who speaks."""
        answer = self._answers[delta.index]
        role = self._role_chunk(delta.index, answer)
        if not delta.text and not delta.logprobs:
            return role
        logprobs = None
        if self._call.has_logprobs:
            tokens = delta.logprobs or ()
            logprobs = self._logprobs(tokens, answer.token_offset)
            answer.token_offset += sum(len(token.text) for token in tokens)
        return role + self._chunk(self._choice(delta.index, {"content": delta.text}, delta.text, logprobs, None))

    def end_chunk(self, ended: Ended) -> bytes:
        """The event that says why an answer ended."""
        role = self._role_chunk(ended.index, self._answers[ended.index])
        return role + self._chunk(self._choice(ended.index, {}, "", None, ended.finish_reason))

    def last_chunks(self) -> bytes:
        """What ends a stream: the counts of tokens, where they are asked for, and the mark of the end."""
        if not self._call.includes_usage:
            return DONE
        usage = _encode(self._usage())
        return f'{self._chunk_head}],"usage":{usage}}}\n\n'.encode() + DONE

    def _role_chunk(self, index: int, answer: "_Answer") -> bytes:
        if answer.has_role or self._call.kind == "text":
            return b""
        answer.has_role = True
        return self._chunk(self._choice(index, {"role": "assistant", "content": "", "refusal": None}, "", None, None))

    def _chunk(self, choice: Mapping[str, Any]) -> bytes:
        return f"{self._chunk_head}{_encode(choice)}{self._chunk_tail}".encode()

    def _choice(
        self, index: int, delta: Mapping[str, Any], text: str, logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._call.kind == "chat" else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _whole_choice(self, index: int, answer: "_Answer") -> dict[str, Any]:
        text = "".join(answer.texts)
        content: dict[str, Any] = {"text": text}
        if self._call.kind == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = self._logprobs(answer.tokens, 0) if self._call.has_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, tokens: Iterable[TokenText], offset: int) -> dict[str, Any]:
        if self._call.kind == "chat":
            return {"content": [_chat_token(token) for token in tokens], "refusal": None}
        return _text_tokens(tokens, offset)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class _Answer:
    """One answer so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[TokenText] = []
        self.token_offset = 0  # characters of the tokens sent
        self.has_role = False
        self.finish_reason: str | None = None


def error_event(error: HttpError) -> bytes:
    """The event that ends a stream whose answer is lost; OpenAI's clients raise it."""
    return b"data: " + error.body + b"\n\n"


def json_bytes(value: Any) -> bytes:
    """A value as compact JSON in UTF-8."""
    return _encode(value).encode()


def _chat_token(token: TokenText) -> dict[str, Any]:
    return {**_chat_entry(token), "top_logprobs": [_chat_entry(other) for other in token.top]}


def _chat_entry(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.utf8)}


def _text_tokens(tokens: Iterable[TokenText], offset: int) -> dict[str, Any]:
    """The log probabilities of `/v1/completions`: columns, with where in the text each token begins."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        top: dict[str, float] = {}
        for other in (*token.top, token):
            top.setdefault(other.text, _finite(other.logprob))  # of two tokens with one text, the likelier
        columns["tokens"].append(token.text)
        columns["token_logprobs"].append(_finite(token.logprob))
        columns["top_logprobs"].append(top)
        columns["text_offset"].append(offset)
        offset += len(token.text)
    return columns


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB) if not math.isnan(logprob) else _MIN_LOGPROB
