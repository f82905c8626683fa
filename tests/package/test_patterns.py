"""Patterns of strangers: those that people write are taken, those that backtrack without end are not."""

import re

import pytest

from pipeline.package.patterns import runs_away

MODULES = [
    "q_proj",
    r".*\.(q|k|v|o)_proj",
    r"model\.layers\.(0|1|[2-9]|1\d)\..*(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q_proj|k_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj)))",
    r"layers\.\d{1,2}\.(self_attn\.)?q_proj",
    r"[a-z_(|)*+]+\.weight",
]
TOKENIZERS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}|\s+(?!\S)|\s+",
    r"(?:a|b)+",
]
ENDLESS = ["(a+)+b", "(a*)*", r"(.*\..*)*x", "((a)+)*", "(?:a+b?){2,}", "(a{1,100}){1,100}", "(?>a+)+", "(x(a+)y)*"]
ENDLESS_WITH_NAMES = [
    "(a?a?)+b",
    "(a|a)*b",
    "(.|.)+!",
    "(?:a|ab|b){5,90}",
    ".*" * 5,
    "a*b*c*d*e*",
    "(a+b+)(c+d+e+|x)",
    r"\w+\d+x{3,}y*z+",
]


@pytest.mark.parametrize("pattern", MODULES)
def test_names_of_modules(pattern: str) -> None:
    assert re.compile(pattern)
    assert not runs_away(pattern, is_strict=True)


@pytest.mark.parametrize("pattern", TOKENIZERS)
def test_what_tokenizers_split_by(pattern: str) -> None:
    assert not runs_away(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_backtracks_without_end(pattern: str) -> None:
    assert runs_away(pattern)
    assert runs_away(pattern, is_strict=True)


@pytest.mark.parametrize("pattern", ENDLESS_WITH_NAMES)
def test_what_no_name_of_modules_needs(pattern: str) -> None:
    assert runs_away(pattern, is_strict=True)
