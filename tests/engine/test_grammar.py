"""Grammars hold what they promise, in mixed batches, with stop strings and with sampling."""

from dataclasses import replace

import pytest
import torch

from pipeline.engine import LoadedExpert, load_expert
from pipeline.engine.grammar import GrammarCompiler, mask_logits_
from pipeline.errors import GrammarError
from pipeline.package import open_package
from tests import tiny

pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")

LEFT_RECURSIVE = 'root ::= my_sum\nmy_sum ::= my_sum "+" digit | digit\ndigit ::= [0-9]\n'


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> LoadedExpert:
    folder = tmp_path_factory.mktemp("grammar")
    base = tiny.make_base(folder, vocab_size=len(tiny.tokenizer()))
    path, _ = tiny.make_package("lora", base, folder)
    return load_expert(open_package(path), base, device="cpu", dtype="float32")


def is_sum(text: str) -> bool:
    return all(len(part) == 1 and part.isdigit() for part in text.split("+"))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_rows_obey_and_free_rows_do_not_change(expert: LoadedExpert, temperature: float) -> None:
    options = {"max_tokens": 40, "temperature": temperature}
    free = [
        expert.requests.build(f"f{at}", prompt=f"question {at}", options={**options, "seed": at}) for at in range(3)
    ]
    held = [replace(request, id=request.id.replace("f", "h"), grammar=LEFT_RECURSIVE) for request in free]
    alone = {answer.request_id: answer for answer in expert.engine.generate(free)}
    mixed = {answer.request_id: answer for answer in expert.engine.generate([*held, *free])}
    for request in free:
        assert mixed[request.id] == alone[request.id]
        assert not is_sum(alone[request.id].text), "a free answer must not obey by chance"
    for request in held:
        answer = mixed[request.id]
        assert is_sum(answer.text) or (answer.finish_reason == "length" and is_sum(answer.text.rstrip("+")))


def test_a_stop_string_may_end_a_text_where_the_grammar_could(expert: LoadedExpert) -> None:
    tokenizer = tiny.tokenizer()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    matcher = compiler.matcher('root ::= "ab"', stop=(";",))
    semicolon = tokenizer.convert_tokens_to_ids(";")

    def allowed() -> set[int]:
        logits = torch.zeros(1, len(tokenizer))
        mask_logits_(logits, [matcher])
        return set(torch.nonzero(logits[0] == 0).flatten().tolist())

    assert semicolon not in allowed()
    for token_id in tokenizer.encode("ab", add_special_tokens=False):
        assert token_id in allowed()
        matcher.accept(token_id)
    assert semicolon in allowed()
    assert tokenizer.eos_token_id in allowed()


@pytest.mark.parametrize("grammar", ["", "  ", "root ::=", "root ::= missing", "root :: broken", "x" * (2 << 20)])
def test_a_wrong_grammar_is_that_rows_error_alone(expert: LoadedExpert, grammar: str) -> None:
    good = expert.requests.build("good", prompt="question", options={"max_tokens": 3})
    bad = replace(good, id="bad", grammar=grammar)
    answers = {answer.request_id: answer for answer in expert.engine.generate([bad, good])}
    assert answers["good"].failure is None
    assert answers["bad"].finish_reason == "error"
    assert answers["bad"].failure is not None
    assert answers["bad"].failure.code == GrammarError.code
