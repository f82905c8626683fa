"""Which expert should answer a prompt: by the keywords, the hints and the priorities in the manifests.

An expert is a candidate when one of its `keywords` stands in the prompt, or its `router_hint` holds; one of whose
`exclude_keywords` stands there is not. The candidate with the most points goes first (a keyword counts one, the hint
two); between equals the `priority` decides, and then the order in which the experts were given.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.errors import InvalidRequestError, ManifestError, RoutingError
from pipeline.package import Routing
from pipeline.router_hints import Hint, parse_hint, phrase

AUTO = "auto"  # asked for where an expert's name is expected: let the prompt decide
HINT_POINTS = 2
MAX_NAMED_KEYWORDS = 5


@dataclass(frozen=True)
class Candidate:
    """How well an expert fits a prompt.

    Args:
        expert: Its name.
        keywords: Those of its keywords that stand in the prompt.
        is_hinted: Whether its router_hint holds.
        excluded_by: The exclude_keyword that stands in the prompt, or None.
        priority: From its manifest; 0 where it says nothing.
    """

    expert: str
    keywords: tuple[str, ...]
    is_hinted: bool
    excluded_by: str | None
    priority: float

    @property
    def points(self) -> int:
        """How much speaks for it; 0 for nothing."""
        return 0 if self.excluded_by is not None else len(self.keywords) + HINT_POINTS * self.is_hinted

    @property
    def reason(self) -> str:
        """What speaks for it, or against it, in words."""
        if self.excluded_by is not None:
            return f"it excludes {self.excluded_by!r}"
        found = [repr(keyword) for keyword in self.keywords[:MAX_NAMED_KEYWORDS]]
        found += [f"{len(self.keywords) - len(found)} more"] if len(self.keywords) > len(found) else []
        parts = [f"keywords {', '.join(found)}"] if found else []
        parts += ["its router_hint holds"] if self.is_hinted else []
        return "; ".join([*parts, f"priority {self.priority:g}"]) if parts else "no keyword and no hint fits"


@dataclass(frozen=True)
class Route:
    """The expert that was chosen for a prompt.

    Args:
        expert: Its name.
        reason: Why, in words.
        candidates: How well each expert fits, the best first.
    """

    expert: str
    reason: str
    candidates: tuple[Candidate, ...]


class Router:
    """Chooses among experts by what their manifests say.

    Args:
        routings: What each says, by the name that the expert goes by.

    Raises:
        ManifestError: A router_hint is not one.

    Examples:
        >>> from pipeline.package import Routing
        >>> sql = Routing(keywords=["table", "select"], exclude_keywords=["explain"], priority=0.8)
        >>> router = Router({"sql": sql, "json": Routing(keywords=["json"], router_hint="format=json OR extract")})
        >>> router.route("Select all users").reason
        "keywords 'select'; priority 0.8"
        >>> router.route("Anything", facts={"format": "json"}).expert
        'json'
    """

    def __init__(self, routings: Mapping[str, Routing]) -> None:
        self._routings = dict(routings)
        self._hints = {name: _hint(name, routing) for name, routing in routings.items()}

    def route(self, prompt: Any, *, facts: Mapping[str, str] | None = None) -> Route:
        """Choose the expert for a prompt.

        Args:
            prompt: The question, or a conversation of messages, of which the user's last counts.
            facts: What is known besides, for the `key=value` terms of router hints, such as `{"database": "sql"}`. A
                term whose key is not among them holds where its value stands in the prompt.

        Raises:
            InvalidRequestError: The prompt is no text.
            RoutingError: No expert fits; `details` says why for each.
        """
        text = _text_of(prompt)
        found = [self._candidate(name, text, facts or {}) for name in self._routings]
        ranked = sorted(found, key=lambda one: (-one.points, -one.priority))
        if not ranked or not ranked[0].points:
            raise RoutingError(
                "no expert fits the prompt",
                details=[f"{one.expert}: {one.reason}" for one in ranked],
                hint="Name the expert; or give the manifests keywords that stand in such prompts.",
            )
        return Route(ranked[0].expert, ranked[0].reason, tuple(ranked))

    def _candidate(self, name: str, text: str, facts: Mapping[str, str]) -> Candidate:
        routing, hint = self._routings[name], self._hints[name]
        return Candidate(
            expert=name,
            keywords=tuple(dict.fromkeys(word for word in routing.keywords if _stands_in(word, text))),
            is_hinted=hint is not None and hint.holds(text, facts),
            excluded_by=next((word for word in routing.exclude_keywords if _stands_in(word, text)), None),
            priority=routing.priority or 0.0,
        )


def _hint(name: str, routing: Routing) -> Hint | None:
    if routing.router_hint is None or not routing.router_hint.strip():
        return None
    try:
        return parse_hint(routing.router_hint)
    except ManifestError as error:
        raise ManifestError(f"the router_hint of {name} is not one", details=error.details, hint=error.hint) from error


def _text_of(prompt: Any) -> str:
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content")
    if not isinstance(prompt, str):
        raise InvalidRequestError(
            f"a prompt of type {type(prompt).__name__} cannot be routed", hint="Give text, or a list of messages."
        )
    return prompt


def _stands_in(keyword: str, text: str) -> bool:
    return bool(keyword.strip()) and _pattern(keyword).search(text) is not None


@lru_cache(maxsize=4096)
def _pattern(keyword: str) -> re.Pattern[str]:
    return phrase(keyword)
