"""The error tree: what it draws is what there is; errors travel whole."""

import inspect
import pickle
import re

import pytest

from pipeline import errors

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ExpertError)]


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)(\w+Error)\b", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        del parents[depth:]
        drawn[found[2]] = parents[-1] if parents else "Exception"
        parents.append(found[2])
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in TREE}


def test_codes_are_unique_and_stable_words() -> None:
    codes = [kind.code for kind in TREE]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


@pytest.mark.parametrize("kind", TREE)
def test_an_error_says_what_where_and_what_to_do_and_survives_a_process_border(kind: type[errors.ExpertError]) -> None:
    error = kind("a is wrong", hint="Mend a.", details=["line 1"])
    assert str(error) == "a is wrong\n  line 1\n  Fix: Mend a."
    # Ray carries a worker's error to the driver this way.
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert type(copy) is kind
    assert (copy.message, copy.hint, copy.details) == (error.message, error.hint, error.details)
