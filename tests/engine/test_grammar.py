"""Grammars hold what they promise: every text that ends with `stop` is one of the grammar, whatever else is asked."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import LoadedExpert, Request, SamplingParams, load_expert
from pipeline.engine.choose import choose_tokens_
from pipeline.engine.grammar import JSON_OBJECT
from pipeline.engine.grammar_compiler import MAX_WHITESPACE, GrammarCompiler
from pipeline.engine.grammar_matcher import GrammarMatcher, TokenSet, mask_grammars_, unpack
from pipeline.engine.sequence import Sequence, start
from pipeline.engine.stopping import StopRules
from pipeline.engine.types import Choice, Completion, Grammar
from pipeline.errors import GrammarError
from pipeline.package import open_package
from tests import tiny

xgrammar = pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER) + 31  # more logits than tokens, as models have
RULES = StopRules(TOKENIZER, frozenset({EOS}))
UPSTREAM = Path(__file__).parents[3] / "shared" / "upstream" / "expert-sql" / "grammar.gbnf"

LEFT_RECURSIVE = Grammar("gbnf", 'root ::= my_sum\nmy_sum ::= my_sum "+" digit | digit\ndigit ::= [0-9]\n')
GRAMMARS = {
    "left recursion, underscores": LEFT_RECURSIVE,
    "statements": Grammar("gbnf", 'root ::= one (";" one)*\none ::= "SELECT " ("name" | "age") (" FROM users")?\n'),
    "fixed": Grammar("gbnf", 'root ::= "ab;cd"\n'),
    "indirect left recursion": Grammar("gbnf", 'root ::= a_1\na_1 ::= b_1 "x" | "y"\nb_1 ::= a_1 "z" | "w"\n'),
    "comments and classes": Grammar(
        "gbnf", '# words\nroot ::= word ("\\n" word)* # of letters\nword ::= [a-zé🎉]{1,3}\n'
    ),
    "schema": Grammar(
        "json_schema",
        '{"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "integer"}},'
        ' "required": ["a"]}',
    ),
    "regex": Grammar("regex", "[a-c]+;?[0-9]{2}(<\\|im_start\\|>)?"),
    "anything": Grammar("regex", "(.|\\n)*"),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB, RULES)


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> LoadedExpert:
    folder = tmp_path_factory.mktemp("grammar")
    base = tiny.make_base(folder, vocab_size=VOCAB)
    path, _ = tiny.make_package("lora", base, folder)
    return load_expert(open_package(path), base, device="cpu", dtype="float32")


def is_accepted(grammar: Grammar, text: str) -> bool:
    """The oracle: xgrammar alone, with another vocabulary."""
    info = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], stop_token_ids=[0])
    compile_ = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    kinds = {
        "gbnf": compile_.compile_grammar,
        "json_schema": compile_.compile_json_schema,
        "regex": compile_.compile_regex,
    }
    matcher = xgrammar.GrammarMatcher(kinds[grammar.kind](grammar.text))
    return (not text or matcher.accept_string(text)) and matcher.is_completed()


def answer(compiler: GrammarCompiler, grammar: Grammar, params: SamplingParams, seed: int) -> Completion:
    """What random scores make of a grammar."""
    (sequence,) = start(Request("a", (5, 6), params, grammar), RULES)
    sequence.matcher = compiler.matcher(grammar, params)
    generator = torch.Generator().manual_seed(seed)
    while not sequence.is_finished:
        logits = torch.randn(1, VOCAB, generator=generator) * 2
        logits[0, [token_id for token_id in (EOS, *params.stop_token_ids) if token_id < VOCAB]] += 3
        sequence.append(choose_tokens_(logits, [sequence])[0])
    return sequence.completion()


STOP_STRINGS = (";", "b", "\n", "}", '"', "ab", "+1", "SELECT", "<|im_start|>", "🎉")
STOP_TOKENS = (*map(TOKENIZER.convert_tokens_to_ids, (";", "+", "a", "}")), 0, 1, 5000)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 60]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    max_tokens=st.just(40),
    min_tokens=st.sampled_from([0, 0, 3, 30]),
    stop=st.lists(st.sampled_from(STOP_STRINGS), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.sampled_from(STOP_TOKENS), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(GRAMMARS)), PARAMS, st.integers(0, 10**6))
def test_a_text_that_ends_with_stop_is_one_of_the_grammar(
    compiler: GrammarCompiler, name: str, params: SamplingParams, seed: int
) -> None:
    completion = answer(compiler, GRAMMARS[name], params, seed)
    assert completion.failure is None
    if completion.finish_reason == "stop":
        assert is_accepted(GRAMMARS[name], completion.text), completion
    else:
        assert completion.completion_tokens == params.max_tokens


def test_most_of_these_texts_end(compiler: GrammarCompiler) -> None:
    """The test above says little if nearly all texts are cut."""
    reasons = [
        answer(compiler, grammar, SamplingParams(max_tokens=40, temperature=1.0, seed=seed), seed).finish_reason
        for grammar in GRAMMARS.values()
        for seed in range(5)
    ]
    assert reasons.count("stop") > len(reasons) / 2


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(GRAMMARS)), PARAMS, st.integers(0, 10**6))
def test_a_look_at_a_few_tokens_says_what_the_mask_says(
    compiler: GrammarCompiler, name: str, params: SamplingParams, seed: int
) -> None:
    matcher = compiler.matcher(GRAMMARS[name], params)
    generator = torch.Generator().manual_seed(seed)
    for position in range(8):
        logits = torch.zeros(1, VOCAB)
        mask_grammars_(logits, [(0, matcher, position)])
        allowed = set((logits[0] == 0).nonzero().flatten().tolist())
        order = torch.randperm(VOCAB, generator=generator).tolist()
        for count in (1, 3):
            found = matcher.first_allowed(order, position, count)
            wanted = [token_id for token_id in order if token_id in allowed][:count]
            assert found in (wanted, None)
            assert found == wanted or len(wanted) < count or set(wanted) & {EOS, *params.stop_token_ids}
        following = [token_id for token_id in order if token_id in allowed and token_id != EOS]
        if not following or not matcher.accept(following[0]):
            return


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_rows_obey_and_free_rows_do_not_change(expert: LoadedExpert, temperature: float) -> None:
    options = {"max_tokens": 40, "temperature": temperature}
    free = [
        expert.requests.build(f"f{at}", prompt=f"question {at}", options={**options, "seed": at}) for at in range(3)
    ]
    held = [
        replace(request, id=f"{name}{request.id}", grammar=grammar)
        for name, grammar in GRAMMARS.items()
        for request in free
    ]
    alone = {answer.request_id: answer for answer in expert.engine.generate(free)}
    mixed = {answer.request_id: answer for answer in expert.engine.generate([*held, *free])}
    for request in free:
        assert mixed[request.id] == alone[request.id]
        assert not is_accepted(LEFT_RECURSIVE, alone[request.id].text), "a free answer must not obey by chance"
    for request in held:
        completion = mixed[request.id]
        assert request.grammar is not None
        assert completion.finish_reason == "length" or is_accepted(request.grammar, completion.text)


def allowed_texts(matcher: GrammarMatcher, position: int = 5) -> set[str]:
    logits = torch.zeros(1, VOCAB)
    mask_grammars_(logits, [(0, matcher, position)])
    return {TOKENIZER.decode([token_id]) for token_id in (logits[0] == 0).nonzero().flatten().tolist()}


def feed(compiler: GrammarCompiler, grammar: Grammar, text: str, **options: Any) -> Sequence:
    """A sequence whose tokens are those of a text, as long as it is not finished."""
    params = SamplingParams(**options)
    (sequence,) = start(Request("a", (5,), params, grammar), RULES)
    sequence.matcher = compiler.matcher(grammar, params)
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        sequence.append(Choice(token_id))
    return sequence


def test_a_stop_string_may_end_a_text_where_the_grammar_could(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("gbnf", 'root ::= "ab"'), SamplingParams(stop=(";",)))
    assert ";" not in allowed_texts(matcher)
    for token_id in TOKENIZER.encode("ab", add_special_tokens=False):
        assert matcher.accept(token_id)
    assert {";", "<|im_end|>"} <= allowed_texts(matcher)


def test_a_stop_string_inside_a_text_of_the_grammar_does_not_cut_it(compiler: GrammarCompiler) -> None:
    schema = GRAMMARS["schema"]
    held = feed(compiler, schema, '{"a": "x}y"', stop=("}",))
    assert not held.is_finished, "what stands before it is not complete"
    held.append(Choice(TOKENIZER.convert_tokens_to_ids("}")))
    assert not held.is_finished, "nor here: the text would lack its last brace"
    held.append(Choice(EOS))
    assert held.completion().text == '{"a": "x}y"}'
    cut = feed(compiler, GRAMMARS["statements"], "SELECT name;SELECT", stop=(";",)).completion()
    assert (cut.text, cut.finish_reason) == ("SELECT name", "stop"), "here it is complete"


def test_a_stop_token_ends_a_text_only_where_it_is_complete(compiler: GrammarCompiler) -> None:
    (semicolon,) = TOKENIZER.encode(";", add_special_tokens=False)
    fixed = feed(compiler, GRAMMARS["fixed"], "ab;cd", stop_token_ids=(semicolon,))
    assert not fixed.is_finished
    fixed.append(Choice(semicolon))
    assert fixed.completion().text == "ab;cd"
    assert fixed.finish_reason == "stop"


def test_a_complete_text_that_nothing_can_follow_ends_whatever_is_asked(compiler: GrammarCompiler) -> None:
    for options in ({"ignore_eos": True}, {"min_tokens": 50}, {"min_tokens": 50, "stop": (";",)}):
        completion = answer(compiler, GRAMMARS["fixed"], SamplingParams(max_tokens=90, **options), 1)  # type: ignore[arg-type]
        assert (completion.text, completion.finish_reason) == ("ab;cd", "stop")
    long = answer(compiler, LEFT_RECURSIVE, SamplingParams(max_tokens=90, min_tokens=50), 1)
    assert long.completion_tokens > 50, "but while anything can follow, it goes on"
    assert answer(compiler, LEFT_RECURSIVE, SamplingParams(max_tokens=60, ignore_eos=True), 1).finish_reason == "length"


def test_a_special_token_does_not_stand_for_its_text(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(GRAMMARS["regex"], SamplingParams())
    for token_id in TOKENIZER.encode("abc12", add_special_tokens=False):
        assert matcher.accept(token_id)
    assert "<|im_start|>" not in allowed_texts(matcher)
    assert "<" in allowed_texts(matcher)


def test_a_grammar_without_end_fails_its_row_alone(expert: LoadedExpert) -> None:
    good = expert.requests.build("good", prompt="question", options={"max_tokens": 9})
    bad = replace(good, id="bad", grammar=Grammar("gbnf", 'root ::= "a" nothing\nnothing ::= [^\\x00-\\U0010ffff]'))
    answers = {answer.request_id: answer for answer in expert.engine.generate([bad, good])}
    assert answers["good"].failure is None
    assert answers["bad"].finish_reason == "error"
    assert answers["bad"].failure is not None
    assert answers["bad"].failure.code == GrammarError.code


@pytest.mark.parametrize(
    "grammar",
    [
        *(Grammar("gbnf", text) for text in ("", "  ", "root ::=", "root ::= missing", "root :: broken")),
        Grammar("gbnf", "x" * (5 << 20)),
        Grammar("gbnf", 'root ::= "\ud800"'),
        Grammar("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        Grammar("regex", ""),
        Grammar("regex", "(a"),
        Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
        Grammar("regex", "(?=a)b"),
        Grammar("regex", "(a)\\1"),
        Grammar("json_schema", ""),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[1]"),
        Grammar("json_schema", '{"type": "banana"}'),
        Grammar("json_schema", '{"items":' * 200 + "{}" + "}" * 200),
        Grammar("json_schema", '{"items":' * 20000 + "{}" + "}" * 20000),
        Grammar("json_schema", '{"not": {"type": "string"}}'),
        Grammar("json_schema", '{"properties": {"a": {"items": {"uniqueItems": true}}}}'),
        Grammar("json_schema", '{"anyOf": [{"$ref": "http://example.com/schema"}]}'),
        Grammar("json_schema", '{"allOf": [{"minimum": 3}, {"maximum": 5}]}'),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:20]!a}",
)
def test_a_wrong_grammar_is_that_rows_error_alone(expert: LoadedExpert, grammar: Grammar) -> None:
    good = expert.requests.build("good", prompt="question", options={"max_tokens": 3, "n": 2})
    bad = replace(good, id="bad", grammar=grammar)
    answers = list(expert.engine.generate([bad, good]))
    assert [answer.failure for answer in answers if answer.request_id == "good"] == [None, None]
    failures = [answer.failure for answer in answers if answer.request_id == "bad"]
    assert [failure.code if failure else None for failure in failures] == [GrammarError.code] * 2


def test_what_a_schema_says_of_its_own_names_is_no_keyword(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"not": {"const": 1}, "if": {"enum": [{"then": 2}]}}, "required": ["not"]}
    compiler.compile(Grammar("json_schema", json.dumps(schema)))


def test_any_json_object_is_one(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(JSON_OBJECT, SamplingParams())
    assert matcher.accepts('{"a": [1, {"b": null}], "c": "é"}')
    assert not matcher.accepts("[1]")
    assert not matcher.accepts('{"a": 1')


@pytest.mark.parametrize("schema", ['{"type": "object"}', '{"properties": {"a": {"const": 1}}, "required": ["a"]}'])
def test_a_schema_lets_json_be_indented_but_not_for_ever(compiler: GrammarCompiler, schema: str) -> None:
    matcher = compiler.matcher(Grammar("json_schema", schema), SamplingParams())
    for space in ("", " ", "\n  ", "\n" + " " * (MAX_WHITESPACE - 1)):
        assert matcher.accepts(f'{{{space}"a":{space}1{space}}}')
    assert not matcher.accepts('{"a":' + " " * (MAX_WHITESPACE + 1) + "1}")


@pytest.mark.skipif(not UPSTREAM.exists(), reason="the published grammar is not here")
def test_the_published_grammar_works(compiler: GrammarCompiler) -> None:
    grammar = Grammar("gbnf", UPSTREAM.read_text())
    assert compiler.matcher(grammar, SamplingParams()).accepts("SELECT name FROM users WHERE price > 100")
    for seed in range(5):
        params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, stop=(";", "\n\n"), max_tokens=60, seed=seed)
        completion = answer(compiler, grammar, params, seed)
        assert completion.finish_reason == "length" or is_accepted(grammar, completion.text)


@given(st.sets(st.integers(0, 99)), st.integers(0, 99))
def test_a_set_of_tokens_is_its_bits(token_ids: set[int], last: int) -> None:
    flags = unpack(TokenSet(token_ids, last + 1).bits[None], last + 1)
    assert flags.nonzero()[:, 1].tolist() == sorted(token_id for token_id in token_ids if token_id <= last)


def test_a_token_that_the_grammar_forbids_fails_the_sequence(compiler: GrammarCompiler) -> None:
    held = feed(compiler, LEFT_RECURSIVE, "1+x")
    assert held.finish_reason == "error"
    assert "2 tokens" in str(held.failure)
    ended = feed(compiler, LEFT_RECURSIVE, "1+")
    ended.append(Choice(EOS))
    assert ended.finish_reason == "error", "the end is no end where the text is not complete"
    cut = feed(compiler, LEFT_RECURSIVE, "1+x", max_tokens=3)
    assert cut.finish_reason == "error", "nor does the limit hide it"


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.compile(Grammar("regex", "[a-f]{3}"))
    assert compiler.compile(Grammar("regex", "[a-f]" + "{3}")) is first
    assert compiler.compile(Grammar("gbnf", 'root ::= "[a-f]{3}"')) is not first


def test_compiling_is_given_up_after_a_while() -> None:
    slow = Grammar("gbnf", "root ::= " + " | ".join(f'"{number}"' for number in range(60_000)))
    impatient = GrammarCompiler(TOKENIZER, VOCAB, RULES, max_seconds=0.2)
    running = []
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"more than 0\.2 seconds"):
            impatient.compile(slow)
        running.append({thread.ident for thread in threading.enumerate() if thread.name == "compile-grammar"})
    assert running[1] <= running[0], "for the second who asks nothing is begun"
    GrammarCompiler(TOKENIZER, VOCAB, RULES, max_seconds=120).compile(slow)


def test_threads_share_one_compilation(compiler: GrammarCompiler) -> None:
    grammar = Grammar("gbnf", "root ::= " + " | ".join(f'"{number}"' for number in range(5_000)))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile(grammar))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_the_cache_forgets_the_oldest() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, RULES, max_cached=3)
    first = compiler.compile(Grammar("regex", "a0"))
    for number in range(1, 3):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert compiler.compile(Grammar("regex", "a0")) is first
    second = compiler.compile(Grammar("regex", "a1"))
    for number in range(3, 6):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert compiler.compile(Grammar("regex", "a1")) is not second


def test_a_grammar_that_takes_too_long_to_follow_fails_its_row() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, RULES)
    grammar = Grammar("regex", "(a*)*b")
    params = SamplingParams(max_tokens=2000)
    (sequence,) = start(Request("a", (5,), params, grammar), RULES)
    compiled = compiler.compile(grammar)
    endings = compiler.matcher(grammar, params)._endings
    sequence.matcher = GrammarMatcher(lambda: xgrammar.GrammarMatcher(compiled), endings, max_seconds=0.05)
    token_id = TOKENIZER.convert_tokens_to_ids("a")
    while not sequence.is_finished:
        sequence.append(Choice(token_id))
    failure = sequence.completion().failure
    assert failure is not None
    assert "too long" in failure.message
