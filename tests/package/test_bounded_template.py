"""Chat templates within bounds: sane ones give what jinja gives, others are stopped whatever they try."""

import json
import resource
from typing import Any

import jinja2.ext
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.package.bounded_template import BoundedTemplate
from pipeline.package.template_nodes import BoundError
from tests.package.template_texts import HOSTILE, SANE

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.lists(st.sampled_from(["a", " ", "\n", "é", "<t>", "</t>", "<r>", "12345", "{", "%"])).map(
                "".join
            ),
        }
    ),
    min_size=1,
    max_size=5,
)


def refuse(message: str) -> None:
    raise ValueError(message)


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


PLAIN = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
PLAIN.filters["tojson"] = to_json
PLAIN.globals["raise_exception"] = refuse
PAIRS = [(PLAIN.from_string(text), BoundedTemplate(text, functions={"raise_exception": refuse})) for text in SANE]


@pytest.mark.parametrize(("plain", "bounded"), PAIRS)
@given(MESSAGES, st.booleans())
def test_what_a_sane_template_makes_is_what_jinja_makes(
    plain: jinja2.Template, bounded: BoundedTemplate, messages: list[dict[str, str]], opened: bool
) -> None:
    variables = {"messages": messages, "add_generation_prompt": opened, "eos_token": "</s>"}
    try:
        expected = plain.render(variables)
    except ValueError as problem:
        with pytest.raises(ValueError, match=str(problem)):
            bounded.render(variables)
    else:
        assert bounded.render(variables) == expected


def test_the_bounds_grow_with_what_a_person_sends() -> None:
    text = "word " * 1_000_000
    template = BoundedTemplate("{% for m in messages %}{{ m.role + m.content|trim }}{% endfor %}")
    variables = {"messages": [{"role": "user", "content": text}]}
    assert template.render(variables, len(text)) == "user" + text.strip()
    with pytest.raises(BoundError, match=r"more than 1,048,576 characters"):
        template.render(variables)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_that_runs_away_with_one_input_is_stopped(text: str) -> None:
    """Each is harmless, until a message says so: no trial of it can find that out."""
    template = BoundedTemplate("{% if messages[0].content == 'now' %}" + text + "{% endif %}ok")
    assert template.render({"messages": [{"role": "user", "content": "not yet"}]}) == "ok"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((BoundError, RecursionError)):
        template.render({"messages": [{"role": "user", "content": "now"}]})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most + (700 << 10)  # KiB
    assert template.render({"messages": [{"role": "user", "content": "again"}]}) == "ok"


def test_threads_do_not_share_what_they_may_use() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = BoundedTemplate("{% for a in range(30000) %}{% endfor %}{{ messages }}")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: template.render({"messages": number}), range(16)))
    assert made == [str(number) for number in range(16)]
