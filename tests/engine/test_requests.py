"""Defaults, overrides and limits: the same for batch and for everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.engine import LoadedExpert, load_expert
from pipeline.engine.preparing import load_preparers
from pipeline.engine.requests import RequestBuilder, override_options, request_defaults
from pipeline.engine.types import Grammar
from pipeline.errors import AdapterError, GrammarError, InvalidRequestError, PromptTooLongError
from pipeline.package import open_package, pack
from tests import tiny

CONTEXT = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(tiny.tokenizer()), context=CONTEXT)


@pytest.fixture(scope="module")
def expert(base: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedExpert:
    path, _ = tiny.make_package("lora", base, tmp_path_factory.mktemp("package"), max_new_tokens=40)
    return load_expert(open_package(path), base, device="cpu")


def test_a_prompt_beyond_the_context_is_refused(expert: LoadedExpert) -> None:
    with pytest.raises(PromptTooLongError, match=f"holds {CONTEXT}"):
        expert.requests.build("a", prompt="word " * 100)


def test_an_answer_never_leaves_the_context(expert: LoadedExpert) -> None:
    request = expert.requests.build("a", prompt="users " * 30)
    assert request.params.max_tokens == CONTEXT - len(request.prompt_token_ids) < 40
    completion = next(iter(expert.engine.generate([request])))
    assert completion.prompt_tokens + completion.completion_tokens <= CONTEXT


def test_the_dialect_comes_with_a_schema_alone(expert: LoadedExpert) -> None:
    tokenizer = tiny.tokenizer()
    with_schema = tokenizer.decode(expert.requests.build("a", prompt="b", schema="c").prompt_token_ids)
    assert "Dialect: postgres\nSchema:\nc" in with_schema
    assert "Dialect" not in tokenizer.decode(expert.requests.build("a", prompt="b").prompt_token_ids)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"temprature": 1}, InvalidRequestError, "temprature"),
        ({"use_grammar": "yes"}, InvalidRequestError, "use_grammar"),
        ({"use_grammar": True}, GrammarError, "has no grammar"),
        ({"temperature": -1}, InvalidRequestError, "temperature"),
        ({"min_tokens": 500}, InvalidRequestError, "min_tokens"),
        ({"truncate": "middle"}, InvalidRequestError, "truncate"),
        ({"regex": 5}, InvalidRequestError, "regex is int"),
        ({"grammar": ["root"]}, InvalidRequestError, "grammar is list"),
        ({"json_schema": {"a": {1, 2}}}, InvalidRequestError, "not JSON"),
        ({"regex": "a", "json_schema": {}}, InvalidRequestError, "json_schema and regex"),
        ({"regex": "a", "use_grammar": True}, InvalidRequestError, "regex and use_grammar"),
        ({"grammar": " "}, GrammarError, "bytes"),
        ({"regex": "a" * (5 << 20)}, GrammarError, "bytes"),
        ({"json_schema": {"not": {}}}, GrammarError, "no grammar here"),
        ({"json_schema": "{"}, GrammarError, "not JSON"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(
    expert: LoadedExpert, base: Path, tmp_path: Path, options: dict[str, object], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        expert.requests.build("a", prompt="b", options=options)
    path, _ = tiny.make_package("lora", base, tmp_path)
    with pytest.raises(kind, match=says):
        request_defaults(open_package(path), options)


def test_soft_prompts_are_not_silently_left_out(base: Path, tmp_path: Path) -> None:
    tiny.make_package("lora", base, tmp_path)
    source = tmp_path / "lora"
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["soft_prompts"] = [{"name": "style", "path": "style.pt", "tokens": 4, "init_method": "random"}]
    (source / "style.pt").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"style\.pt"):
        load_expert(open_package(pack(source, tmp_path, manifest=manifest)), base)


def soft_prompted(source: Path) -> tuple[Path, dict[str, Any]]:
    """An adapter's folder, and its manifest with two soft prompts, whose files are still to be written."""
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["soft_prompts"] = [
        {"name": name, "path": f"{name}.safetensors", "tokens": tokens} for name, tokens in (("style", 4), ("tone", 2))
    ]
    return source, manifest


def test_what_is_prepared_without_an_engine_is_what_an_engine_is_asked(base: Path, tmp_path: Path) -> None:
    _, _ = tiny.make_package("lora", base, tmp_path)
    source, manifest = soft_prompted(tmp_path / "lora")
    for name, tokens in (("style", 4), ("tone", 2)):
        save_file({"prompt": torch.full((tokens, 64), float(tokens))}, source / f"{name}.safetensors")
    package = open_package(pack(source, tmp_path, manifest=manifest))
    options = {"temperature": 0.5, "soft_prompt": "tone"}
    expert = load_expert(package, base, dtype="float32", options=options)
    expert.engine.close()
    preparer = load_preparers({"it": package}, base, {"it": options})["it"]
    for asked in (
        {"prompt": "How many?"},
        {"prompt": "How many?", "options": {"soft_prompt": "style", "seed": 7}},
        {"prompt": "How many?", "schema": "a", "options": {"regex": "a"}},
        {"prompt": "users " * 80, "options": {"truncate": "left", "soft_prompt": "style"}},
    ):
        wanted = expert.requests.build("a", **asked)
        assert expert.requests.request("a", preparer.prepare(**asked)) == wanted
        assert len(wanted.prompt_token_ids) + wanted.params.max_tokens <= CONTEXT
    with pytest.raises(PromptTooLongError, match="holds 62"):
        preparer.prepare(prompt="users " * 80)


def test_a_packages_soft_prompt_stands_before_the_prompt(base: Path, tmp_path: Path) -> None:
    _, adapted = tiny.make_package("lora", base, tmp_path)
    source, manifest = soft_prompted(tmp_path / "lora")
    torch.manual_seed(5)
    soft = {"style": torch.randn(4, 64), "tone": torch.randn(2, 64)}
    for name, embeddings in soft.items():
        save_file({"prompt": embeddings}, source / f"{name}.safetensors")
    expert = load_expert(open_package(pack(source, tmp_path, manifest=manifest)), base, dtype="float32")
    with pytest.raises(InvalidRequestError, match="2 soft prompts, and none is chosen"):
        expert.requests.build("a", prompt="b")
    with pytest.raises(InvalidRequestError, match="no soft prompt 'mood'"):
        expert.requests.build("a", prompt="b", options={"soft_prompt": "mood"})
    requests = [expert.requests.build(name, prompt="How many?", options={"soft_prompt": name}) for name in soft]
    answers = {completion.request_id: completion for completion in expert.engine.generate(requests)}
    expert.engine.close()
    for request in requests:
        embeddings = soft[request.id]
        prompt = torch.tensor([request.prompt_token_ids[len(embeddings) :]])
        embedded = torch.cat([embeddings[None], adapted.get_input_embeddings()(prompt)], dim=1)
        with torch.inference_mode():
            wanted = adapted.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones(embedded.shape[:2]),
                max_new_tokens=12,
                do_sample=False,
            )
        assert list(answers[request.id].token_ids) == wanted[0].tolist()
    assert answers["style"].token_ids != answers["tone"].token_ids


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"grammar": 'root ::= "a"'}, Grammar("gbnf", 'root ::= "a"')),
        ({"regex": "a|b"}, Grammar("regex", "a|b")),
        ({"json_schema": {"const": "é"}}, Grammar("json_schema", '{"const": "é"}')),
        ({"json_schema": '{"const": 1}', "use_grammar": False}, Grammar("json_schema", '{"const": 1}')),
        ({"use_grammar": False}, None),
        ({}, None),
    ],
)
def test_a_row_brings_its_own_grammar(expert: LoadedExpert, options: dict[str, object], wanted: Grammar | None) -> None:
    assert expert.requests.build("a", prompt="b", options=options).grammar == wanted


def test_a_rows_grammar_takes_the_place_of_the_jobs(expert: LoadedExpert, base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path)
    job = RequestBuilder(open_package(path), tiny.tokenizer(), CONTEXT, {"regex": "a"})
    assert job.build("a", prompt="b").grammar == Grammar("regex", "a")
    assert job.build("a", prompt="b", options={"json_schema": "{}"}).grammar == Grammar("json_schema", "{}")
    assert job.build("a", prompt="b", options={"use_grammar": False}).grammar is None
    assert override_options({"regex": "a", "top_k": 1}, {"grammar": "b", "top_p": None}) == {"top_k": 1, "grammar": "b"}
    assert override_options({"regex": "a"}, {"top_k": 2}) == {"regex": "a", "top_k": 2}


def test_a_request_names_its_expert(base: Path, tmp_path: Path) -> None:
    path, _ = tiny.make_package("lora", base, tmp_path)
    builder = RequestBuilder(open_package(path), tiny.tokenizer(), CONTEXT, expert_name="sql")
    assert builder.build("a", prompt="b").expert == "sql"


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["left", "right"]),
    st.sampled_from(["prompt", "schema", "system", "messages"]),
    st.lists(st.sampled_from(["users ", "é", "🎉", "日本", "x" * 30, "<|im_end|>", "\n"]), max_size=90).map("".join),
    st.integers(1, 200),
)
def test_a_long_prompt_is_cut_where_asked(
    expert: LoadedExpert, side: str, place: str, filling: str, max_tokens: int
) -> None:
    tokenizer, context = tiny.tokenizer(), 150
    builders = [RequestBuilder(expert.requests._package, tokenizer, length) for length in (context, 100_000)]
    text = f"first {filling} last"
    row: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if place != "messages":
        row = {"prompt": "a", place: text}
    options = {"truncate": side, "max_tokens": max_tokens}
    cut, whole = (builder.build("a", **row, options=options) for builder in builders)
    room = context - min(max_tokens, context // 2)
    assert cut.params.max_tokens >= context - room, "the answer keeps its room"
    if len(whole.prompt_token_ids) <= room:
        assert cut.prompt_token_ids == whole.prompt_token_ids, "nothing is cut without need"
        return
    assert room - 8 < len(cut.prompt_token_ids) <= room
    before, after = tokenizer.decode(whole.prompt_token_ids).split(text)
    frame = tokenizer.decode(cut.prompt_token_ids)
    assert frame.startswith(before), "the template stays, and the other texts"
    assert frame.endswith(after)
    kept = frame[len(before) : len(frame) - len(after)]
    assert text.endswith(kept) if side == "left" else text.startswith(kept)
    special = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")}
    assert sum(token_id in special for token_id in cut.prompt_token_ids) == (
        3 if place in ("prompt", "messages") else 5
    )


def test_a_prompt_whose_longest_text_is_not_enough_is_refused(expert: LoadedExpert) -> None:
    many = [{"role": role, "content": "users " * 5} for role in ("user", "assistant") * 12]
    with pytest.raises(PromptTooLongError, match="longest text"):
        expert.requests.build("a", messages=[*many, {"role": "user", "content": "a"}], options={"truncate": "left"})


def test_truncating_is_the_rows_choice(expert: LoadedExpert) -> None:
    long = "users " * 100
    with pytest.raises(PromptTooLongError):
        expert.requests.build("a", prompt=long)
    assert len(expert.requests.build("a", prompt=long, options={"truncate": "left"}).prompt_token_ids) <= CONTEXT // 2
