"""The state of one answer: what it streams, how it finishes, what it says in the end."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import Failure, Request, SamplingParams
from pipeline.engine.detokenizer import Detokenizer, TokenDecoder
from pipeline.engine.sequence import Sequence, start
from pipeline.engine.stopping import StopRules
from pipeline.engine.types import Choice, TokenLogprob
from pipeline.errors import GrammarError
from tests import tiny

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
RULES = StopRules(TOKENIZER, frozenset({EOS}))
HARD = 'a🎉b;\n\n;é—日本語 }",' + "👩‍👩‍👧 ;;end"
TOKENS = st.lists(
    st.one_of(
        st.sampled_from(TOKENIZER.encode(HARD, add_special_tokens=False)),
        st.sampled_from(TOKENIZER.encode("\xf0🎉語" * 2, add_special_tokens=False)),  # bytes of characters, mostly
        st.integers(0, len(TOKENIZER) + 5),
    ),
    max_size=40,
)
STOPS = st.lists(
    st.sampled_from([";", "\n\n", "🎉", "日本", "a", ";;", "; ;", "語 }", "zz", "en", "\ufffd"]), max_size=3
)


def made(**options: object) -> Sequence:
    (sequence,) = start(Request("a", (5, 6), SamplingParams(**{"max_tokens": 1000, **options})), RULES)  # type: ignore[arg-type]
    return sequence


@settings(max_examples=400, deadline=None)
@given(TOKENS, STOPS, st.integers(0, 10), st.integers(10, 45), st.booleans(), st.lists(st.booleans(), min_size=45))
def test_the_pieces_are_the_text(
    token_ids: list[int], stop: list[str], min_tokens: int, max_tokens: int, ignore_eos: bool, asks: list[bool]
) -> None:
    options = {"stop": stop, "min_tokens": min_tokens, "max_tokens": max_tokens, "ignore_eos": ignore_eos}
    streamed, plain = made(**options), made(**options)
    pieces = []
    for token_id, ask in zip(token_ids, asks, strict=False):
        streamed.append(Choice(token_id))
        plain.append(Choice(token_id))
        if ask:
            pieces.append(streamed.new_text())
    if not streamed.is_finished:
        streamed.cancel()
        plain.cancel()
    pieces.append(streamed.new_text())
    assert "".join(pieces) == streamed.completion().text
    assert streamed.completion() == plain.completion(), "asking for pieces changes nothing"
    assert streamed.new_text() == "", "all of it was given"


@settings(max_examples=300, deadline=None)
@given(TOKENS)
def test_tokens_one_by_one_make_the_text_of_all(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TokenDecoder(TOKENIZER))
    for count in range(1, len(token_ids) + 1):
        before = detokenizer.certain
        detokenizer.feed(token_ids[:count])
        assert detokenizer.certain.startswith(before)
        wanted = TOKENIZER.decode(token_ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert detokenizer.certain + detokenizer.pending == wanted


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=" aéb日", max_size=20))
def test_a_decoder_that_strips_the_first_space_is_fed_with_context(text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: at for at, piece in enumerate(["<unk>", "▁", "a", "▁a", "b", "é", "日", "ab", *BYTES])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    token_ids = tokenizer.encode(text)
    detokenizer = Detokenizer(TokenDecoder(tokenizer))
    pieces = ""
    for count in range(1, len(token_ids) + 1):
        detokenizer.feed(token_ids[:count])
        assert detokenizer.certain.startswith(pieces)
        pieces = detokenizer.certain
    assert detokenizer.certain + detokenizer.pending == tokenizer.decode(token_ids)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def test_half_of_a_character_is_never_streamed() -> None:
    token_ids = TOKENIZER.encode("a🎉b", add_special_tokens=False)
    assert len(token_ids) > 3, "the character must be several tokens"
    sequence = made()
    pieces = []
    for token_id in token_ids:
        sequence.append(Choice(token_id))
        pieces.append(sequence.new_text())
    assert [piece for piece in pieces if piece] == ["a", "🎉", "b"]


def test_a_part_of_a_stop_string_is_never_streamed() -> None:
    sequence = made(stop=("; end", ";!"))
    pieces = []
    for token_id in TOKENIZER.encode("a; e; end, and more", add_special_tokens=False):
        sequence.append(Choice(token_id))
        pieces.append(sequence.new_text())
    assert "".join(pieces) == "a; e"
    assert sequence.finish_reason == "stop"
    assert not any("; end".startswith(piece) for piece in pieces if piece.startswith(";") and piece != "; e")


def test_a_cancelled_answer_keeps_its_text_and_takes_no_more() -> None:
    sequence = made(logprobs=0)
    for token_id in TOKENIZER.encode("SELECT name", add_special_tokens=False):
        sequence.append(Choice(token_id, TokenLogprob(token_id, -1.0)))
    sequence.cancel()
    sequence.append(Choice(5))
    completion = sequence.completion()
    assert (completion.text, completion.finish_reason) == ("SELECT name", "cancelled")
    assert completion.token_ids == tuple(TOKENIZER.encode("SELECT name", add_special_tokens=False))
    assert completion.logprobs is not None
    assert len(completion.logprobs) == completion.completion_tokens == 2
    sequence.cancel()
    assert sequence.completion() == completion


def test_a_failed_answer_says_why() -> None:
    first, second = start(Request("a", (5, 6), SamplingParams(n=2)), RULES)
    first.append(Choice(TOKENIZER.encode("SELECT")[0]))
    assert first.new_text() == "SELECT"
    first.fail(GrammarError("wrong", hint="Mend it."))
    assert first.new_text() == ""
    completion = first.completion()
    assert (completion.text, completion.finish_reason, completion.index) == ("", "error", 0)
    assert completion.failure == Failure("invalid_grammar", "wrong")
    assert not second.is_finished
    assert second.index == 1


def test_an_unfinished_answer_has_no_completion() -> None:
    with pytest.raises(RuntimeError, match="not finished"):
        made().completion()


def test_a_completion_names_its_tokens() -> None:
    sequence = made(logprobs=1)
    entry = TokenLogprob(EOS, math.log(0.5), ((EOS, math.log(0.5)),))
    sequence.append(Choice(EOS, entry))
    completion = sequence.completion()
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("", "stop", (EOS,))
    assert completion.logprobs == (entry,)
    assert made().logprobs == []
