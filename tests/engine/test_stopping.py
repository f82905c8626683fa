"""When a text ends: end tokens, stop tokens, stop strings across token borders, the limits. Checked token by token."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import SamplingParams
from pipeline.engine.stopping import StopRules
from tests import tiny

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
RULES = StopRules(TOKENIZER, frozenset({EOS}))
MORE = len(TOKENIZER.encode("SELECT<|im_end|>more", add_special_tokens=False))
COMMA = TOKENIZER.convert_tokens_to_ids(",")


def run(text: str, stop: tuple[str, ...] = (), **options: Any) -> tuple[str, str | None, int]:
    """Feed a text's tokens one by one, as an engine would."""
    checker = RULES.checker(SamplingParams(**{"max_tokens": 1000, "stop": stop, **options}))
    seen: list[int] = []
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        seen.append(token_id)
        reason = checker.check(seen)
        if reason is not None:
            return checker.text(seen), reason, len(seen)
    return checker.text(seen), None, len(seen)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab;é🎉 \n", max_size=30),
    st.lists(st.text(alphabet="ab;é🎉 \n", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
)
def test_the_text_is_cut_before_the_first_stop_string(text: str, stop: list[str], min_tokens: int) -> None:
    answer, reason, used = run(text, tuple(stop), min_tokens=min_tokens)
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    seen = [whole(TOKENIZER.decode(token_ids[:count])) for count in range(len(token_ids) + 1)]
    # The plain meaning: the first token, from min_tokens on, with which a stop string is complete that was not before.
    for count in range(max(1, min_tokens), len(seen)):
        cuts = [
            at
            for item in stop
            for at in range(len(seen[count]))
            if seen[count].startswith(item, at) and at + len(item) > len(seen[count - 1])
        ]
        if cuts:
            assert (answer, reason, used) == (seen[count][: min(cuts)], "stop", count)
            return
    assert (answer, reason) == (text, None)


def whole(text: str) -> str:
    """A text without the half of a character at its end."""
    return text.rstrip("\ufffd")


def test_a_stop_string_across_tokens_is_found_at_once() -> None:
    answer, reason, used = run("SELECT name FROM users\n\nand then some", ("\n\n",))
    assert (answer, reason) == ("SELECT name FROM users", "stop")
    assert used < len(TOKENIZER.encode("SELECT name FROM users\n\nand then some"))


def test_the_end_token_ends_and_is_no_text() -> None:
    assert run("SELECT<|im_end|>more") == ("SELECT", "stop", 2)
    assert run("SELECT<|im_end|>more", min_tokens=2) == ("SELECTmore", None, MORE)
    assert run("SELECT<|im_end|>more", ignore_eos=True) == ("SELECTmore", None, MORE)
    assert run("a<|im_end|>b", ignore_eos=True, stop_token_ids=(EOS,)) == ("a", "stop", 2)


def test_a_stop_token_ends_and_is_no_text() -> None:
    assert run("a,b,c", stop_token_ids=(COMMA,)) == ("a", "stop", 2)
    assert run("a,b,c", stop_token_ids=(COMMA,), min_tokens=1) == ("a", "stop", 2)
    assert run("a,b,c", stop_token_ids=(COMMA,), min_tokens=2) == ("a,b", "stop", 4)


def test_a_control_token_as_a_stop_string_ends() -> None:
    assert run("a<|im_start|>b", ("<|im_start|>",)) == ("a", "stop", 2)
    assert run("a<|im_start|>b", ("<|im_start|>",), ignore_eos=True) == ("a", "stop", 2)


def test_a_stop_string_before_min_tokens_stays_in_the_text() -> None:
    assert run("a,b,c,d", (",",), min_tokens=3) == ("a,b", "stop", 4)


def test_the_limit_ends_with_length() -> None:
    assert run("SELECT name FROM users", max_tokens=2) == ("SELECT name", "length", 2)
    assert run("a,b", (",",), max_tokens=2) == ("a", "stop", 2)
