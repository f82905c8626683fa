"""`prompt_template`: columns in braces and nothing else."""

import string
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.columns import resolve_columns
from pipeline.batch.config import BatchConfig, ColumnsConfig
from pipeline.batch.template import PromptTemplate
from pipeline.errors import ConfigError, DatasetError, InvalidRequestError


@pytest.mark.parametrize(
    ("text", "values", "prompt"),
    [
        ("Q: {question}", {"question": "why?"}, "Q: why?"),
        ("{a}{b} {a}", {"a": "x", "b": "y"}, "xy x"),
        ('{{"q": "{q}"}}', {"q": "x"}, '{"q": "x"}'),
        ("{{{q}}}", {"q": "x"}, "{x}"),
        ("{q}", {"q": "{q} {{ {a}"}, "{q} {{ {a}"),
        ("{q}", {"q": ""}, ""),
        ("{a b}|{ä}|{a.b}", {"a b": "1", "ä": "2", "a.b": "3"}, "1|2|3"),
        ("{n} {f} {b} {x}", {"n": 3, "f": 1.5, "b": True, "x": [1, {"ä": None}]}, '3 1.5 true [1,{"ä":null}]'),
        ("{d} {c}", {"d": date(2024, 1, 2), "c": Decimal("1.50")}, "2024-01-02 1.50"),
        ("line\n{q}\ttab", {"q": "x"}, "line\nx\ttab"),
    ],
)
def test_values_take_the_place_of_names(text, values, prompt):
    assert PromptTemplate.parse(text).render(values) == prompt


names = st.text(string.ascii_letters + " .", min_size=1, max_size=5)
pieces = st.lists(st.text(st.sampled_from("ab{}: \n"), max_size=5) | names.map(lambda name: (name,)), max_size=8)


@settings(max_examples=50)
@given(pieces, st.dictionaries(names, st.text(max_size=5)))
def test_any_text_and_any_columns_are_put_together(items, values):
    columns = [item[0] for item in items if isinstance(item, tuple)]
    values = dict.fromkeys(columns, "?") | values
    text = "".join(
        "{" + item[0] + "}" if isinstance(item, tuple) else item.replace("{", "{{").replace("}", "}}") for item in items
    )
    if not columns:
        with pytest.raises(ConfigError, match="no column is named"):
            PromptTemplate.parse(text)
        return
    template = PromptTemplate.parse(text)
    assert template.columns == tuple(dict.fromkeys(columns))
    assert template.render(values) == "".join(values[item[0]] if isinstance(item, tuple) else item for item in items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column is named"),
        ("just text", "no column is named"),
        ("Jinja {{question}}", "no column is named"),
        ("{}", "{} at character 1 names no column"),
        ("a {b", "{ at character 3 has no partner"),
        ("{a} b}", "} at character 6 has no partner"),
        ("{a{b}}", "{ at character 1 has no partner"),
    ],
)
def test_a_broken_template_says_where(text, message):
    with pytest.raises(ConfigError) as caught:
        PromptTemplate.parse(text)
    assert caught.value.message.startswith(message)
    with pytest.raises(ConfigError) as caught:
        BatchConfig.from_options(dataset="a", expert="b", output="c", prompt_template=text)
    assert caught.value.details[0].startswith(f"prompt_template: {message}")
    assert "{question}" in caught.value.details[0]


@pytest.mark.parametrize("field", ["q.__class__", "q!r", "q:>10", "q[0]", "0"])
def test_a_field_reaches_nothing_but_columns(field):
    template = PromptTemplate.parse("{" + field + "}")
    with pytest.raises(DatasetError, match="no column"):
        resolve_columns(ColumnsConfig(), ["q"], template)
    assert template.render({field: "the column of that very name", "q": object}) == "the column of that very name"


@pytest.mark.parametrize("values", [{"q": None}, {}])
def test_a_null_is_its_rows_error(values):
    with pytest.raises(InvalidRequestError, match="column 'q', which the prompt is made of, is null"):
        PromptTemplate.parse("Q: {q}").render(values)


def test_unknown_columns_are_named_with_the_nearest():
    with pytest.raises(DatasetError) as caught:
        resolve_columns(ColumnsConfig(schema="dll"), ["question", "ddl"], PromptTemplate.parse("{qestion} {zzz}"))
    assert caught.value.details == (
        "columns.schema: no column 'dll'; did you mean 'ddl'?",
        "prompt_template: no column 'qestion'; did you mean 'question'?",
        "prompt_template: no column 'zzz'",
    )


def test_a_template_takes_the_place_of_the_prompt_column():
    template = PromptTemplate.parse("{question}")
    resolved = resolve_columns(ColumnsConfig(), ["question", "prompt", "messages", "schema"], template)
    assert (resolved.prompt, resolved.messages, resolved.schema) == (None, None, "schema")
    with pytest.raises(ConfigError, match=r"prompt_template and columns\.prompt are given"):
        resolve_columns(ColumnsConfig(prompt="prompt"), ["question", "prompt"], template)
    with pytest.raises(ConfigError, match=r"prompt_template and columns\.messages are given"):
        resolve_columns(ColumnsConfig(messages="messages"), ["question", "messages"], template)
