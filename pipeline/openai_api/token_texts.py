"""Token ids and their log probabilities as clients see them: by text, and only those that the text is made of."""

from collections import defaultdict, deque
from collections.abc import Iterable

from pipeline.engine.token_bytes import TokenBytes
from pipeline.engine.types import Completion, TokenLogprob
from pipeline.openai_api.events import Delta, TokenText


class TokenTexts:
    """The tokens of one request's answers.

    An answer's tokens may reach beyond its text: by an end token or a stop string, or by text that is not certain yet.
    Each is told with the text it begins in, so that a streamed answer and a whole one tell the same tokens.

    Args:
        token_bytes: Of the tokenizer.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._answers: dict[int, _Answer] = defaultdict(_Answer)

    def of(self, index: int, text: str, logprobs: Iterable[TokenLogprob] | None) -> tuple[TokenText, ...] | None:
        """The tokens that begin in the next text of answer `index`; None where none are asked for.

        Args:
            index: Which answer.
            text: What follows its text so far.
            logprobs: What follows its tokens so far.
        """
        if logprobs is None:
            return None
        answer = self._answers[index]
        answer.waiting.extend(one for one in logprobs if not self._token_bytes.is_special(one.token_id))
        answer.text_end += len(text.encode())
        told = []
        while answer.waiting and answer.token_end < answer.text_end:
            one = answer.waiting.popleft()
            top = tuple(self._text(token_id, value) for token_id, value in one.top)
            told.append(self._text(one.token_id, one.logprob, top))
            answer.token_end += len(told[-1].utf8)
        return tuple(told)

    def _text(self, token_id: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
        utf8 = self._token_bytes[token_id]
        return TokenText(utf8.decode("utf-8", "replace"), utf8, logprob, top)


def whole_text(completion: Completion, token_bytes: TokenBytes) -> Delta:
    """All that an answer says, once it is finished.

    Args:
        completion: The answer; it has not failed.
        token_bytes: Of the tokenizer.
    """
    told = TokenTexts(token_bytes).of(completion.index, completion.text, completion.logprobs)
    return Delta(completion.text, completion.index, told)


class _Answer:
    """How far one answer has been told, in bytes."""

    def __init__(self) -> None:
        self.text_end = 0
        self.token_end = 0
        self.waiting: deque[TokenLogprob] = deque()
