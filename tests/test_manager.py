"""Many experts: their base models shared, loaded when needed, let go when not."""

import asyncio
import inspect
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import Expert, ExpertManager, demo
from pipeline.demo.questions import draw_questions
from pipeline.errors import (
    ConfigError,
    InferenceError,
    InvalidRequestError,
    PackageNotFoundError,
    RoutingError,
    UnknownModelError,
)
from pipeline.package import open_package

QUESTIONS = {task: next(iter(draw_questions(task, 1))) for task in demo.TASKS}
ITEMS: dict[str, dict[str, Any]] = {
    task: {"prompt": question.prompt, "schema": question.schema} for task, question in QUESTIONS.items()
}
LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "use_grammar": False, "stop": []}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each expert answers alone."""
    found = {}
    for task in demo.TASKS:
        with Expert.load(demo.package(task), base_model=demo.BASE_MODEL, device="cpu") as expert:
            found[task] = expert.generate(**ITEMS[task]).text
    return found


@pytest.fixture
def manager() -> Iterator[ExpertManager]:
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu") as made:
        yield made


def variant(folder: Path, task: demo.Task, **changes: Any) -> Path:
    """A demo expert with another manifest."""
    path = shutil.copytree(open_package(demo.package(task)).root, folder)
    (path / "integrity.json").unlink(missing_ok=True)
    manifest = path / "manifest.json"
    read = json.loads(manifest.read_text(encoding="utf-8"))
    for name, value in changes.items():
        read[name] = {**read[name], **value} if isinstance(read.get(name), dict) else value
    read.pop("integrity", None)
    manifest.write_text(json.dumps(read), encoding="utf-8")
    return path


def test_experts_share_one_base_model_and_one_batch(manager: ExpertManager, answers: dict[str, str]) -> None:
    infos = manager.load_experts({task: demo.package(task) for task in reversed(demo.TASKS)})
    assert [info.name for info in infos] == list(demo.TASKS), "in the load_order of their manifests"
    assert [(info.kind, info.base) for info in infos] == [
        (kind, demo.BASE_MODEL.name) for kind in ("dora", "lora", "lora")
    ]
    assert all(info.num_bytes > 0 and info.rank and info.last_used is None for info in infos)
    (base,) = manager.list_base_models()
    assert base.experts == demo.TASKS
    pairs = [(task, ITEMS[task]) for task in ("json", "sql", "cypher", "sql")]
    results = manager.generate_batch(pairs)
    assert [result.text for result in results] == [answers[task] for task, _ in pairs]
    assert [result.expert_name for result in results] == [f"expert-{task}" for task, _ in pairs]
    (after,) = manager.list_base_models()
    longest = max(result.completion_tokens for result in results)
    num_tokens = sum(result.completion_tokens for result in results[:3])
    assert after.stats.num_tokens_generated == num_tokens, "the second sql prompt is the first one"
    assert after.stats.num_steps < num_tokens, "they ran side by side"
    assert after.stats.num_steps >= longest
    assert all(info.last_used is not None for info in manager.list_loaded_experts())
    assert "json" in repr(manager)


def test_the_ways_to_ask(manager: ExpertManager, answers: dict[str, str]) -> None:
    manager.load_expert("sql", demo.package("sql"))
    question = QUESTIONS["sql"]
    assert manager.generate("sql", question.prompt, schema=question.schema).text == answers["sql"]
    stream = manager.generate_stream("sql", question.prompt, schema=question.schema)
    assert "".join(stream) == stream.result.text == answers["sql"]
    assert [one.text for one in manager.generate_batch([ITEMS["sql"]], expert="sql")] == [answers["sql"]]

    async def everything() -> None:
        assert (await manager.agenerate("sql", question.prompt, schema=question.schema)).text == answers["sql"]
        assert (await manager.agenerate_batch([("sql", ITEMS["sql"])]))[0].text == answers["sql"]
        stream = manager.agenerate_stream("sql", question.prompt, schema=question.schema)
        assert "".join([piece async for piece in stream]) == answers["sql"]

    asyncio.run(everything())
    results = manager.generate_batch([("nobody", "a"), "a", ("sql", ""), ("sql", ITEMS["sql"]), ("auto", "a")])
    assert [result.error and result.error.code for result in results] == [
        UnknownModelError.code,
        InvalidRequestError.code,
        InvalidRequestError.code,
        None,
        RoutingError.code,
    ]
    with pytest.raises(UnknownModelError, match="nobody"):
        manager.generate("nobody", "a")
    with pytest.raises(InvalidRequestError, match="names no expert"):
        manager.generate_batch(["a"], raise_on_error=True)
    assert {"schema", "seed"} <= set(inspect.signature(manager.generate).parameters)


def test_what_was_used_the_longest_ago_goes_and_comes_back(answers: dict[str, str]) -> None:
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu", max_loaded_experts=2) as manager:
        for task in demo.TASKS:
            manager.load_expert(task, demo.package(task), pin=task == "json")
        infos = manager.list_loaded_experts()
        assert [(info.name, info.is_pinned) for info in infos] == [("cypher", False), ("json", True)]
        assert manager.experts == demo.TASKS
        assert manager.generate("sql", **ITEMS["sql"]).text == answers["sql"], "it is loaded again"
        assert [info.name for info in manager.list_loaded_experts()] == ["sql", "json"], "json is pinned"
        results = manager.generate_batch([(task, ITEMS[task]) for task in demo.TASKS])
        assert [result.text for result in results] == list(answers.values()), "more experts than are loaded at a time"
        assert len(manager.list_loaded_experts()) == 2
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu", max_loaded_experts=1) as manager:
        manager.load_expert("sql", demo.package("sql"), pin=True)
        with pytest.raises(ConfigError, match="pinned"):
            manager.load_expert("json", demo.package("json"))
    with pytest.raises(ConfigError, match="max_loaded_experts is 0"):
        ExpertManager(max_loaded_experts=0)


def test_a_base_model_is_loaded_once_and_goes_with_its_last_expert(
    manager: ExpertManager, tmp_path: Path, answers: dict[str, str]
) -> None:
    same = shutil.copytree(demo.BASE_MODEL, tmp_path / "same")
    other = shutil.copytree(demo.BASE_MODEL, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "note": "another digest"}))
    manager.load_expert("sql", demo.package("sql"))
    manager.load_expert("json", demo.package("json"), base_model=same)
    assert len(manager.list_base_models()) == 1
    manager.load_expert("cypher", open_package(demo.package("cypher")), base_model=other)
    assert [base.experts for base in manager.list_base_models()] == [("sql", "json"), ("cypher",)]
    results = manager.generate_batch([(task, ITEMS[task]) for task in demo.TASKS])
    assert [result.text for result in results] == list(answers.values()), "over two base models"
    manager.unload_expert("sql")
    assert [base.experts for base in manager.list_base_models()] == [("json",), ("cypher",)]
    manager.unload_expert("cypher")
    assert [base.name for base in manager.list_base_models()] == [demo.BASE_MODEL.name]
    manager.unload_expert("json")
    assert manager.list_base_models() == []
    with pytest.raises(UnknownModelError):
        manager.generate("sql", "a")


def test_a_base_model_is_loaded_once_for_each_dtype_and_quantization(
    manager: ExpertManager, answers: dict[str, str]
) -> None:
    manager.load_expert("sql", demo.package("sql"), dtype="float32")
    manager.load_expert("cypher", demo.package("cypher"), dtype="bfloat16")
    manager.load_expert("json", demo.package("json"), dtype="float32")
    manager.load_expert("small", demo.package("sql"), dtype="float32", quantization="int8")
    bases = [(base.device, base.dtype, base.quantization, base.experts) for base in manager.list_base_models()]
    assert bases == [
        ("cpu", "float32", None, ("sql", "json")),
        ("cpu", "bfloat16", None, ("cypher",)),
        ("cpu", "float32", "int8", ("small",)),
    ]
    results = manager.generate_batch([*((task, ITEMS[task]) for task in demo.TASKS), ("small", ITEMS["sql"])])
    assert [result.text for result in results] == [*answers.values(), answers["sql"]]


def test_an_expert_is_replaced_while_it_answers(manager: ExpertManager, tmp_path: Path) -> None:
    newer = variant(tmp_path / "newer", "sql", version="0.2.0")
    manager.load_expert("sql", demo.package("sql"))
    (base,) = manager.list_base_models()
    stream = manager.generate_stream("sql", "Who?", **LONG)
    next(stream)
    info = manager.load_expert("sql", newer)
    list(stream)
    assert (stream.result.expert_version, stream.result.finish_reason) == ("0.1.0", "length")
    assert info.expert == "expert-sql@0.2.0"
    assert manager.generate("sql", "Who?").expert_version == "0.2.0"
    (after,) = manager.list_base_models()
    assert after.stats.num_steps > base.stats.num_steps, "the same engine went on"
    assert after.stats.num_resident == 1, "the old one is gone"


def test_constraints_are_honoured(manager: ExpertManager, tmp_path: Path) -> None:
    needy = variant(tmp_path / "needy", "json", constraints={"requires": ["expert-sql@>=0.1.0"]})
    shy = variant(tmp_path / "shy", "cypher", constraints={"incompatible_with": ["expert-sql@*"], "load_order": 0})
    manager.load_experts({"json": needy, "sql": demo.package("sql")})
    with pytest.raises(ConfigError, match="do not go together") as caught:
        manager.load_expert("cypher", shy)
    assert "incompatible with expert-sql@0.1.0" in caught.value.details[0]
    assert manager.experts == ("sql", "json")
    manager.load_expert("cypher", demo.package("cypher"))
    with pytest.raises(ConfigError, match="do not go together"):
        manager.unload_expert("sql")
    assert manager.experts == ("sql", "json", "cypher")


def test_auto_asks_the_expert_that_the_prompt_is_for(manager: ExpertManager, tmp_path: Path) -> None:
    routed = {
        "sql": variant(tmp_path / "sql", "sql", routing={"keywords": ["users"], "priority": 0.5}),
        "json": variant(tmp_path / "json", "json", routing={"router_hint": "turned OR task=extract"}),
    }
    manager.load_experts(routed)
    assert manager.route("List all users").expert == "sql"
    assert manager.route("Anything", facts={"task": "extract"}).reason == "its router_hint holds; priority 0"
    results = manager.generate_batch(["Omar turned 45.", "List all users."], expert="auto", schema="a")
    assert [result.expert_name for result in results] == ["expert-json", "expert-sql"]
    assert manager.generate("auto", "List all users.").expert_name == "expert-sql"
    with pytest.raises(RoutingError):
        manager.generate("auto", "Hm.")
    with pytest.raises(ConfigError, match="cannot be called 'auto'"):
        manager.load_expert("auto", demo.package("sql"))


def test_threads_ask_load_and_unload_at_once(answers: dict[str, str]) -> None:
    found: list[tuple[str, str]] = []
    problems: list[BaseException] = []

    def ask(task: str) -> None:
        try:
            found.extend((task, manager.generate(task, **ITEMS[task]).text) for _ in range(4))
        except BaseException as problem:  # noqa: BLE001  # shown by the test
            problems.append(problem)

    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu", max_loaded_experts=2) as manager:
        manager.load_experts({task: demo.package(task) for task in demo.TASKS})
        threads = [threading.Thread(target=ask, args=(task,)) for task in demo.TASKS for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            manager.load_expert("again", demo.package("sql"))
            manager.unload_expert("again")
        for thread in threads:
            thread.join(120)
    assert problems == []
    assert len(found) == 36
    assert all(text == answers[task] for task, text in found)


def test_what_cannot_be_loaded_leaves_nothing_behind(manager: ExpertManager, tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError):
        manager.load_experts({"sql": demo.package("sql"), "no": tmp_path / "nowhere.expert"})
    with pytest.raises(ConfigError):
        manager.load_expert("sql", demo.package("sql"), device="nodevice")
    assert (manager.experts, manager.list_base_models()) == ((), [])
    manager.close()
    with pytest.raises(InferenceError, match="closed"):
        manager.generate_batch([("sql", "a")])
