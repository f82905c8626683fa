"""Chat templates within bounds: sane ones give what jinja gives, others are stopped whatever they try."""

import json
import resource
from typing import Any

import jinja2.ext
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.package.bounded_template import BoundedTemplate, BoundError

THINKING = """\
{%- set ns = namespace(seen=false, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" and not message.content.startswith('<r>') %}
        {%- set ns.seen = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</t>' in content %}
            {%- set thought = content.split('</t>')[0].rstrip('\\n').split('<t>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</t>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|' + message.role + '|>' + (thought if loop.index0 > ns.last else '') + content + '\\n' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
SANE = [
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m['content']|trim + '<|end|>' }}{% endfor %}",
    THINKING,
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns') }}"
    "{% endif %}[{{ m.role }}]{{ m.content ~ eos_token ~ loop.index }}{% endfor %}",
    "{% macro one(m) %}{{ m.role|title }}: {{ m.content|replace('\n', ' ')|upper }}{{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% call one(m) %}!{% endcall %}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ messages|map(attribute='content')|join(', ') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ undefined_name }}{{ 2 ** 10 * 3 + 1 }}",
    "{% set text %}{% for m in messages %}{{ m.content|indent(2) }}{{ '%s:%5.1f' % (m.role, 2) }}{% endfor %}"
    "{% endset %}{{ text }}{{ '{:>8}|{}'.format('a', text|length) }}{{ 'ab'.center(9, '-') }}"
    "{{ ['a', 'b']|join }}{{ [1, 2] + [3] }}",
    "{% set found = {'a': 1, 'b': messages|length} %}{% for k, v in found.items() %}{{ k, v }}{% endfor %}"
    "{{ namespace(a=1) is defined }}{{ dict(a=2).a }}{{ 'x' * 3 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 'a' 'b' }}{{ none }}",
]
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


BIG = "{% set s = 'a' * 1000000 %}"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}"
HOSTILE = [
    FOREVER + "{% endfor %}{% endfor %}",
    FOREVER.replace("%}", "if false %}", 2).replace("99999) if false", "99999)", 1) + "{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=('a', u)) %}{% for a in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ ns.x|string }}",
    "{% set ns = namespace(x={}) %}{% for a in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}"
    "{{ ns.x|tojson }}",
    "{% set ns = namespace(x=namespace(a='b')) %}{% for a in range(60) %}{% set n = namespace() %}{% set n.l = ns.x %}"
    "{% set n.r = ns.x %}{% set ns.x = n %}{% endfor %}{{ ns.x }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "{% set _step = 1 %}{% macro _kept(x) %}{{ x }}{% endmacro %}" + FOREVER + "{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ ['a'] * 1000000000 }}",
    "{{ (2 ** 64) ** 64 ** 64 }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(width=1000000000) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'|indent(1000000000, true) }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ ('\t' * 1000000).expandtabs(9999) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>1000000000}'.format('a') }}",
    "{{ '{:>{}}'.format('a', 1000000000) }}",
    "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "{{ ('a'|attr('format'))('a') if false else ('{:>1000000000}'|attr('format'))('a') }}",
    "{{ '%1000000000d'|format(1) }}",
    BIG + "{{ '{0}{0}{0}{0}'.format(s) }}",
    BIG + "{{ s.replace('a', s) }}",
    BIG + "{{ s|replace('a', s) }}",
    BIG + "{{ s.join(s) }}",
    BIG + "{{ s|join(s) }}",
    BIG + "{{ ''.join([s] * 10000) }}",
    BIG + "{{ ([s] * 10000)|join }}",
    BIG + "{{ ([s] * 10000)|string }}",
    BIG + "{{ range(99999)|map('default', s)|join }}",
    BIG + "{{ range(99999)|map(attribute='none', default=s)|join }}",
    BIG + "{{ ''.join(range(99999)|map(attribute='none', default=s)) }}",
    BIG + "{{ ([[s]] * 1000)|sum(start=[]) }}",
    BIG + "{{ s.translate({97: s}) }}",
    BIG + "{{ s.encode('punycode') }}",
    BIG + "{{ ('a\n' * 100000)|indent(s) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ 'a'.encode() * 1000000000 }}",
    "{{ lipsum(n=1000000000) }}",
    "{% set x %}{% for a in range(99999) %}" + "b" * 100_000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + "b" * 100_000 + "{% endmacro %}{% for a in range(99999) %}{{ m() }}{% endfor %}",
    "".join(f"{{% set a{number} = 'a' * 1000000 %}}" for number in range(2000)),
]


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
