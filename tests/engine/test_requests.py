"""Defaults, overrides and limits: the same for batch and for everything else."""

import json
from pathlib import Path

import pytest

from pipeline.engine import LoadedExpert, load_expert
from pipeline.engine.requests import request_defaults
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
    with pytest.raises(AdapterError, match="soft prompts"):
        load_expert(open_package(pack(source, tmp_path, manifest=manifest)), base)
