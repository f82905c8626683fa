"""Ranges of versions of an expert: `name@<range>`, as `constraints` in a manifest spells them."""

import re
from dataclasses import dataclass

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

_PATTERN = re.compile(r"(?P<name>[a-z0-9*-]+)(?:@(?P<range>.*))?", re.DOTALL)
_CARET = re.compile(r"\^\s*(\d+)\.(\d+)\.(\d+)")
_TILDE = re.compile(r"~(?!=)\s*(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class ExpertPattern:
    """Some versions of an expert: `expert-json@>=1.0,<2`, `expert-json@^1.2.0`, `expert-json@1.2.0`, `expert-json`."""

    text: str
    name: str
    versions: SpecifierSet

    def matches(self, name: str, version: str) -> bool:
        """Whether an expert is one of them; a pre-release counts as what it precedes."""
        wanted = re.escape(self.name).replace(r"\*", ".*")
        return re.fullmatch(wanted, name) is not None and self.versions.contains(_version(version), prereleases=True)


def parse_pattern(text: str) -> ExpertPattern:
    """Read a pattern.

    Raises:
        ValueError: It is none; the message says why.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError("Input should have the form name@<range>, such as expert-json@>=1.0,<2")
    wanted = (match["range"] or "").strip()
    if wanted in ("", "*", "latest"):
        wanted = ""
    elif wanted[0].isdigit():
        wanted = f"=={wanted.replace('.x', '.*')}"
    wanted = _CARET.sub(_caret, wanted)
    wanted = _TILDE.sub(lambda found: f">={found[1]}.{found[2]}.{found[3] or 0},=={found[1]}.{found[2]}.*", wanted)
    try:
        return ExpertPattern(text, match["name"], SpecifierSet(",".join(wanted.split()) if " " in wanted else wanted))
    except InvalidSpecifier as problem:
        raise ValueError(f"{wanted!r} is no range of versions, such as >=1.0,<2") from problem


def _caret(found: re.Match[str]) -> str:
    """Up to the next change of the first part that is not zero."""
    major, minor, patch = (int(part) for part in found.groups())
    end = f"{major + 1}" if major else f"0.{minor + 1}" if minor else f"0.0.{patch + 1}"
    return f">={major}.{minor}.{patch},<{end}"


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:  # semantic pre-releases have more forms than Python's versions
        return Version(re.match(r"[0-9.]+", text)[0])  # type: ignore[index]  # the manifest's reader has seen to it
