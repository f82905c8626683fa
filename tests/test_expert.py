"""`Expert`: three lines, and what a person tries next."""

import asyncio
import inspect
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import Expert, InferenceResult, demo
from pipeline.demo.questions import draw_questions
from pipeline.engine.chat import schema_message
from pipeline.errors import (
    BaseModelError,
    ConfigError,
    GrammarError,
    InferenceError,
    InvalidRequestError,
    PackageNotFoundError,
    PromptTooLongError,
    TrustError,
)
from pipeline.metrics import MemoryMetrics
from pipeline.package import open_package

QUESTIONS = list(draw_questions("sql", 12))


@pytest.fixture(scope="module")
def expert() -> Expert:
    return Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu")


def test_one_prompt(expert: Expert) -> None:
    result = expert.generate("List the name of all users.", schema="CREATE TABLE users (id INT, name TEXT, age INT);")
    assert result.text == "SELECT name FROM users"
    assert result.finish_reason == "stop"
    assert result.expert == "expert-sql@0.1.0"
    assert len(result.expert_sha256) == 64
    assert result.prompt_tokens > result.completion_tokens > 0
    assert result.to_dict()["text"] == result.text


def test_a_batch_equals_one_by_one_and_keeps_the_order(expert: Expert) -> None:
    items = [{"prompt": question.prompt, "schema": question.schema} for question in QUESTIONS]
    alone = [expert.generate(question.prompt, schema=question.schema) for question in QUESTIONS]
    assert expert.generate_batch(items) == alone
    assert expert.generate_batch(items[::-1]) == alone[::-1]


def test_items_override_what_is_shared(expert: Expert) -> None:
    question = QUESTIONS[0]
    short, long = expert.generate_batch(
        [{"prompt": question.prompt, "max_tokens": 1}, question.prompt], schema=question.schema, max_tokens=50
    )
    assert short.completion_tokens == 1
    assert short.finish_reason == "length"
    assert long.finish_reason == "stop"


def test_one_bad_item_does_not_hinder_the_others(expert: Expert) -> None:
    question = QUESTIONS[0]
    good = {"prompt": question.prompt, "schema": question.schema}
    results = expert.generate_batch([good, {"prompt": 5}, {"prompt": "users " * 2000}, good, 7, None])  # type: ignore[list-item]
    assert [result.error.code if result.error else None for result in results] == [
        None,
        InvalidRequestError.code,
        PromptTooLongError.code,
        None,
        InvalidRequestError.code,
        InvalidRequestError.code,
    ]
    assert results[0] == results[3]
    with pytest.raises(InvalidRequestError, match="prompt is int"):
        expert.generate_batch([good, {"prompt": 5}], raise_on_error=True)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ({"prompt": ""}, InvalidRequestError),
        ({"prompt": "a", "temperature": -1}, InvalidRequestError),
        ({"prompt": "a", "max_tokens": 0}, InvalidRequestError),
        ({"prompt": "users " * 2000}, PromptTooLongError),
        ({}, InvalidRequestError),
    ],
)
def test_one_wrong_call_raises(expert: Expert, call: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        expert.generate(**call)  # type: ignore[arg-type]


def test_a_grammar_that_is_not_there_is_an_error() -> None:
    with (
        Expert.load(demo.package("json"), base_model=demo.BASE_MODEL, device="cpu") as expert,
        pytest.raises(GrammarError, match="has no grammar"),
    ):
        expert.generate("Maria lives in Lima.", use_grammar=True)


def test_an_answer_is_held_to_what_the_caller_gives(expert: Expert) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["Ada", "Bo"]}}, "required": ["name"]}
    assert json.loads(expert.generate("Who?", json_schema=schema).text)["name"] in ("Ada", "Bo")
    shared, own = expert.generate_batch(["Who?", {"prompt": "Who?", "regex": "[0-9]{3}"}], json_schema=schema)
    assert json.loads(shared.text)["name"] in ("Ada", "Bo")
    assert len(own.text) == 3
    assert own.text.isdigit()
    with pytest.raises(InvalidRequestError, match="grammar and regex"):
        expert.generate("Who?", grammar="root ::= [a]", regex="a")


def test_an_answer_brings_its_log_probabilities(expert: Expert) -> None:
    result = expert.generate("Who?", logprobs=2, max_tokens=4)
    assert result.logprobs is not None
    assert len(result.logprobs) == result.completion_tokens
    assert all(len(entry.top) == 2 for entry in result.logprobs)


def test_several_answers_to_one_prompt(expert: Expert) -> None:
    question = QUESTIONS[0]
    options: dict[str, Any] = {"schema": question.schema, "temperature": 5.0, "use_grammar": False, "max_tokens": 8}
    result = expert.generate(question.prompt, n=3, seed=7, **options)
    assert len(result.texts) == 3
    assert len(set(result.texts)) > 1
    assert result == expert.generate_batch([question.prompt], n=3, seed=7, **options)[0]
    with pytest.raises(InvalidRequestError, match="n is 3"):
        expert.generate_stream(question.prompt, n=3)


def test_a_result_tells_what_it_took_and_whether_its_grammar_holds(expert: Expert) -> None:
    question = QUESTIONS[0]
    whole, cut, free = expert.generate_batch(
        [question.prompt, {"prompt": question.prompt, "max_tokens": 2}, {"prompt": "Who?", "use_grammar": False}],
        schema=question.schema,
    )
    assert (whole.grammar_valid, cut.grammar_valid, free.grammar_valid) == (True, False, None)
    assert expert.generate("Who?", regex="[0-9]{1,40}", max_tokens=1).grammar_valid, "cut, and yet a whole one"
    times = whole.timings
    assert times.queue is not None
    assert times.first_token is not None
    assert times.total is not None
    assert 0 <= times.queue <= times.first_token <= times.total
    assert (whole.expert_name, whole.expert_version) == ("expert-sql", "0.1.0")
    shown = repr(whole)
    assert shown.startswith(f"InferenceResult({whole.text!r}, expert-sql@0.1.0, stop, ")
    assert len(repr(replace(whole, text="x" * 5000))) < 400
    assert json.loads(json.dumps(whole.to_dict()))["timings"]["total"] == times.total
    (failed,) = expert.generate_batch([""])
    assert repr(failed) == "InferenceResult(error invalid_request: prompt is empty, expert-sql@0.1.0)"


def test_stop_strings_and_a_grammar_of_the_callers(expert: Expert) -> None:
    question = QUESTIONS[0]
    whole = expert.generate(question.prompt, schema=question.schema).text
    word = whole.split()[1]
    cut = expert.generate(question.prompt, schema=question.schema, stop=f" {word}", use_grammar=False)
    assert (cut.text, cut.finish_reason) == (whole.partition(f" {word}")[0], "stop")
    assert expert.generate("Who?", grammar='root ::= "Ada" | "Bo"').text in ("Ada", "Bo")


def test_an_option_that_is_none_is_named(expert: Expert) -> None:
    with pytest.raises(InvalidRequestError, match="unknown option maxtokens"):
        expert.generate("a", maxtokens=3)  # type: ignore[call-arg]
    assert {"schema", "seed", "json_schema"} <= set(inspect.signature(expert.generate).parameters)


def test_messages_are_a_prompt_too(expert: Expert) -> None:
    question = QUESTIONS[0]
    messages = [{"role": "user", "content": question.prompt}]
    assert expert.generate(messages=messages, schema=question.schema) == expert.generate(
        question.prompt, schema=question.schema
    )


def test_sampling_follows_the_seed(expert: Expert) -> None:
    question = QUESTIONS[0]

    def draw(seed: int) -> InferenceResult:
        return expert.generate(question.prompt, schema=question.schema, temperature=5.0, seed=seed, use_grammar=False)

    assert draw(1) == draw(1)
    assert len({draw(seed).text for seed in range(5)}) > 1


def test_a_hundred_threads_share_one_running_batch(expert: Expert) -> None:
    """Proved by the engine's own counts: computed one after the other, each token would be a step."""
    expert.warm_up()
    options: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True, "use_grammar": False, "stop": []}
    prompts = [f"What is {number}?" for number in range(100)]
    wanted = [result.text for result in expert.generate_batch(prompts, **options)]
    before = expert.stats()
    together = threading.Barrier(len(prompts))
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        together.wait(60)
        found[prompt] = expert.generate(prompt, **options).text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    after = expert.stats()
    assert [found[prompt] for prompt in prompts] == wanted
    num_tokens = after.num_tokens_generated - before.num_tokens_generated
    assert num_tokens == 100 * 32
    assert after.num_steps - before.num_steps < num_tokens / 4


def test_nothing_is_loaded_before_it_is_needed_and_nothing_after_close() -> None:
    expert = Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu")
    assert "not loaded yet" in repr(expert)
    with expert:
        expert.generate("a")
        assert "loaded" in repr(expert)
    assert "closed" in repr(expert)
    expert.close()
    with pytest.raises(InferenceError, match="closed"):
        expert.generate("a")


def test_a_warm_up_on_request_loads_once_and_nothing_is_loaded_or_moved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokenizer is the same one, and the model stays on its device, whichever way is asked."""
    metrics = MemoryMetrics()
    question = QUESTIONS[0]
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu", metrics=metrics) as expert:
        assert metrics.value("expert_loads_total", expert="expert-sql") == 0
        assert expert.warm_up() is expert
        assert "loaded" in repr(expert)
        assert "not loaded" not in repr(expert)

        def again(*_: Any, **__: Any) -> None:
            raise AssertionError("it was loaded, or moved, again")

        for owner, name in (
            (AutoTokenizer, "from_pretrained"),
            (AutoModelForCausalLM, "from_pretrained"),
            (torch.nn.Module, "_apply"),  # what `to`, `cpu` and `cuda` come to
            (torch.nn.Module, "load_state_dict"),
        ):
            monkeypatch.setattr(owner, name, again)
        wanted = expert.generate(question.prompt, schema=question.schema).text
        assert expert.generate_batch([question.prompt] * 2, schema=question.schema)[1].text == wanted
        assert "".join(expert.generate_stream(question.prompt, schema=question.schema)) == wanted
        assert asyncio.run(expert.agenerate(question.prompt, schema=question.schema)).text == wanted
        assert metrics.value("expert_loads_total", expert="expert-sql") == 1


@pytest.mark.parametrize(
    ("options", "dtype", "layer"),
    [
        ({"dtype": "float32"}, "float32", None),
        ({"dtype": "bfloat16"}, "bfloat16", None),
        ({"dtype": "float32", "quantization": "int8"}, "float32", "Int8"),
        ({"dtype": "float32", "quantization": "int4"}, "float32", "Int4"),
    ],
)
def test_dtype_and_quantization_reach_the_model(options: dict[str, Any], dtype: str, layer: str | None) -> None:
    """And `models` says where the base model of the manifest's name is."""
    question = QUESTIONS[0]
    models = {"demo-qwen3-2m": str(demo.BASE_MODEL)}
    with Expert.load(demo.package("sql"), models=models, device="cpu", **options) as expert:
        assert expert.generate(question.prompt, schema=question.schema).text == question.expected
        loaded = expert._load()
        assert (loaded.device, loaded.dtype) == ("cpu", dtype)
        kinds = {type(module).__name__ for module in loaded.engine._loop._runner._model.modules()}  # type: ignore[union-attr]
        assert any(kind.startswith(layer) for kind in kinds) if layer else not any("Int" in kind for kind in kinds)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError, match="nowhere"):
        Expert.load(tmp_path / "nowhere.expert")
    with pytest.raises(BaseModelError) as caught:
        Expert.load(demo.package("sql"))
    assert len(caught.value.details) >= 2, "it lists every place that was tried"
    with pytest.raises(ConfigError, match="nodevice"):
        Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="nodevice")


def test_what_a_package_is_named_by(expert: Expert, tmp_path: Path) -> None:
    opened = open_package(demo.package("sql"))
    folder = shutil.copytree(opened.root, tmp_path / "unpacked")
    question = QUESTIONS[0]
    wanted = expert.generate(question.prompt)
    for given in (folder, str(folder), opened):
        with Expert.load(given, base_model=demo.BASE_MODEL, device="cpu") as named:
            assert named.generate(question.prompt) == wanted
    for nothing in (None, 5, b"expert-sql.expert"):
        with pytest.raises(ConfigError, match=f"not by {type(nothing).__name__}"):
            Expert.load(nothing)  # type: ignore[arg-type]


def test_what_is_asked_of_the_signature_is_asked_of_an_opened_package_too() -> None:
    for package in (demo.package("sql"), open_package(demo.package("sql"))):
        with pytest.raises(TrustError, match="is not signed"):
            Expert.load(package, base_model=demo.BASE_MODEL, trust="signed")
        with pytest.raises(ConfigError, match="trust is 'maybe'"):
            Expert.load(package, trust="maybe")  # type: ignore[arg-type]


def test_the_system_message_and_the_dialect_reach_the_model(expert: Expert) -> None:
    question = QUESTIONS[0]
    given = expert.generate(question.prompt, schema=question.schema, system="Be brief.", dialect="sqlite")
    spelled = f"Be brief.\n\n{schema_message(question.schema, 'sqlite')}"
    messages = [{"role": "system", "content": spelled}, {"role": "user", "content": question.prompt}]
    assert given == expert.generate(messages=messages)
    assert given.prompt_tokens > expert.generate(question.prompt, schema=question.schema).prompt_tokens


def test_threads_that_all_ask_first_load_one_model() -> None:
    metrics, together = MemoryMetrics(), threading.Barrier(8)
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="auto", metrics=metrics) as expert:

        def ask() -> None:
            together.wait(60)
            expert.generate("Who?", max_tokens=2)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert metrics.value("expert_loads_total", expert="expert-sql") == 1
    assert len(metrics.values("expert_queue_seconds", expert="expert-sql")) == 8
