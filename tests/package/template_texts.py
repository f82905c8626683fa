"""Chat templates: sane ones, and what a hostile one may try when a message bids it."""

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
    "".join(f"{{% set a{number} = 'a' * 1000000 %}}" for number in range(600)),
]
