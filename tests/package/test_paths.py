"""Which names are safe."""

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import NameTable, safe_path

LIMITS = ArchiveLimits()


@pytest.mark.parametrize(
    ("name", "expected"), [("a/b", "a/b"), ("./a//b/", "a/b"), (".", ""), ("", ""), ("..a/b..", "..a/b.."), ("é", "é")]
)
def test_harmless_spellings_are_cleaned(name: str, expected: str) -> None:
    assert safe_path(name, LIMITS) == expected


@given(st.text(st.sampled_from("ab./\\:C\0\n~ é\ud800"), max_size=12) | st.text(max_size=20))
def test_an_accepted_path_stays_inside(name: str) -> None:
    try:
        path = safe_path(name, LIMITS)
    except ValueError:
        return
    root = Path("/somewhere/package")
    assert (root / path).resolve().is_relative_to(root)
    assert ".." not in PurePosixPath(path).parts
    assert safe_path(path, LIMITS) == path
    assert not set(path) & set("\\\0\n")


def test_a_directory_may_be_listed_after_its_files_but_only_once() -> None:
    names = NameTable()
    names.add("a/b", "file")
    names.add("a", "directory")
    with pytest.raises(ValueError, match="occurs twice"):
        names.add("a", "directory")
