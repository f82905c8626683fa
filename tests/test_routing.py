"""Which expert a prompt is for, and the language of hints."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InvalidRequestError, ManifestError, RoutingError
from pipeline.package import Routing
from pipeline.router_hints import Hint, Not, Several, Term, parse_hint
from pipeline.routing import Router

EXPERTS = {
    "sql": Routing(
        keywords=("sql", "table", "group by", "count"),
        exclude_keywords=("explain", "what is"),
        router_hint="database=sql OR query=sql OR task=text2sql",
        priority=0.85,
    ),
    "cypher": Routing(keywords=("graph", "count"), router_hint="database=neo4j AND NOT dialect=gql", priority=0.9),
    "json": Routing(keywords=("JSON", "c++")),
    "silent": Routing(),
}


@pytest.mark.parametrize(
    ("prompt", "expert", "reason"),
    [
        ("Which TABLE has the most rows, by sql?", "sql", "keywords 'sql', 'table'; its router_hint holds"),
        ("count the nodes", "cypher", "keywords 'count'; priority 0.9"),
        ("group  by\ncity", "sql", "keywords 'group by'; priority 0.85"),
        ("explain a table as json", "json", "keywords 'JSON'; priority 0"),
        ("counting tables in C++", "json", "keywords 'c++'; priority 0"),
    ],
)
def test_keywords_exclusions_hints_and_priority(prompt: str, expert: str, reason: str) -> None:
    route = Router(EXPERTS).route(prompt)
    assert route.expert == expert
    assert reason in route.reason
    assert len(route.candidates) == len(EXPERTS)


def test_facts_decide_what_hints_ask() -> None:
    router = Router(EXPERTS)
    assert router.route("Anything", facts={"Database": "SQL"}).expert == "sql"
    assert router.route("Anything", facts={"database": "neo4j"}).expert == "cypher"
    with pytest.raises(RoutingError):
        router.route("Anything", facts={"database": "neo4j", "dialect": "gql"})


def test_the_last_message_of_a_conversation_counts() -> None:
    messages = [{"role": "user", "content": "sql table"}, {"role": "user", "content": "as json"}]
    assert Router(EXPERTS).route(messages).expert == "json"
    with pytest.raises(InvalidRequestError, match="type int"):
        Router(EXPERTS).route(5)


def test_a_prompt_that_fits_nobody_says_why_for_each() -> None:
    with pytest.raises(RoutingError) as caught:
        Router(EXPERTS).route("explain the weather")
    assert "sql: it excludes 'explain'" in caught.value.details
    assert "silent: no keyword and no hint fits" in caught.value.details
    with pytest.raises(RoutingError):
        Router({}).route("a")


def test_and_binds_more_tightly_than_or() -> None:
    a, b, c = Term(None, "a"), Term("k", "b"), Term("k", "c d", is_equal=False)
    assert parse_hint('a OR k=b and not k != "c d"') == Several("OR", (a, Several("AND", (b, Not(c)))))
    assert parse_hint("(a OR k=b) AND a") == Several("AND", (Several("OR", (a, b)), a))
    assert parse_hint(" a ") == a


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a OR", "character 5: there is the end where a word should be"),
        ("(a", "character 3: there is the end where a ) should be"),
        ("a b", "character 3: 'b' does not belong here"),
        ("a = AND", "character 5: there is AND where a word should be"),
        ("a ! b", "character 3: '!' does not belong here"),
        ('a="', "character 3: '\"' does not belong here"),
        ("(" * 40 + "a", "nested more than 32 deep"),
        ("a OR " * 2000, "more than 4,096"),
        ("''", "where a word should be"),
    ],
)
def test_what_is_no_hint_is_refused_with_its_place(text: str, place: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_hint(text)
    assert place in caught.value.details[0]
    with pytest.raises(ManifestError, match="router_hint of sql"):
        Router({"sql": Routing(router_hint=text)})


TERMS = st.builds(
    Term, st.none() | st.sampled_from(["k", "database"]), st.sampled_from(["a", "b c", "AND"]), st.booleans()
).map(lambda term: term if term.key else Term(None, term.value))
HINTS: st.SearchStrategy[Hint] = st.recursive(
    TERMS,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(Several, st.sampled_from(["AND", "OR"]), st.tuples(inner, inner)),
    ),
    max_leaves=8,
)


def written(hint: Hint) -> str:
    """A hint as text, with brackets around everything."""
    if isinstance(hint, Term):
        quoted = f'"{hint.value}"'
        return quoted if hint.key is None else f"{hint.key}{'=' if hint.is_equal else '!='}{quoted}"
    if isinstance(hint, Not):
        return f"NOT ({written(hint.part)})"
    assert isinstance(hint, Several)
    return f" {hint.kind} ".join(f"({written(part)})" for part in hint.parts)


@given(HINTS, st.sampled_from(["a", "b  c and", "x"]), st.sampled_from([{}, {"k": "A"}, {"database": "b c"}]))
def test_a_hint_says_what_was_written(hint: Hint, text: str, facts: dict[str, str]) -> None:
    assert parse_hint(written(hint)) == hint
    assert parse_hint(written(hint)).holds(text, facts) == hint.holds(text, facts)


@given(st.text(max_size=40))
def test_any_text_is_a_hint_or_refused(text: str) -> None:
    with suppress(ManifestError):
        parse_hint(text).holds("a", {})
