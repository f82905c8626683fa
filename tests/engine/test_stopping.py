"""When a text ends: end tokens, stop strings across token borders, the limit. Checked token by token."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.stopping import StopChecker
from tests import tiny

TOKENIZER = tiny.tokenizer()
EOS = frozenset({TOKENIZER.eos_token_id})


def run(text: str, stop: tuple[str, ...], max_tokens: int = 1000) -> tuple[str, str | None, int]:
    """Feed a text's tokens one by one, as an engine would."""
    checker = StopChecker(TOKENIZER, EOS, stop, max_tokens)
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
)
def test_the_text_is_cut_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    answer, reason, used = run(text, tuple(stop))
    if not any(item in text for item in stop):
        assert (answer, reason) == (text, None)
        return
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    before, seen = (TOKENIZER.decode(token_ids[:count]) for count in (used - 1, used))
    assert reason == "stop"
    assert not any(item in before for item in stop), "it ends with the first token that completes a stop string"
    # A token can complete two of them at once; the text ends before the earlier one.
    assert answer == seen[: min(seen.find(item) for item in stop if item in seen)]


def test_a_stop_string_across_tokens_is_found_at_once() -> None:
    answer, reason, used = run("SELECT name FROM users\n\nand then some", ("\n\n",))
    assert (answer, reason) == ("SELECT name FROM users", "stop")
    assert used < len(TOKENIZER.encode("SELECT name FROM users\n\nand then some"))


def test_the_end_token_ends_and_is_no_text() -> None:
    assert run("SELECT<|im_end|>more", ()) == ("SELECT", "stop", 2)


def test_the_limit_ends_with_length() -> None:
    answer, reason, used = run("SELECT name FROM users", (), max_tokens=2)
    assert (answer, reason, used) == ("SELECT name", "length", 2)
