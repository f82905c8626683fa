"""The benchmark's rows are what its docstrings say, its table is right, and the whole of it runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine
from benchmarks.experts import make_experts, package_of
from benchmarks.floor import Floor
from benchmarks.measure import Measurement, measure
from benchmarks.models import SHAPES, make_model, num_parameters
from benchmarks.registry import PEERS
from benchmarks.report import rows_of
from benchmarks.workloads import WORKLOADS, Row, Workload, make_workload
from pipeline.package import open_package

Run = Callable[..., dict[str, Any]]


def lengths(workload: Workload) -> list[tuple[int, int]]:
    return [(len(row.prompt), row.max_tokens) for row in workload.rows]


def test_shared_schema_has_the_stated_shape() -> None:
    workload = make_workload("shared-schema")
    prompts, answers = zip(*lengths(workload), strict=True)
    schemas = {row.prompt[: row.prefix_length] for row in workload.rows}
    assert len(workload.rows) == 96
    assert (min(prompts), max(prompts)) == (170, 554)
    assert (min(answers), max(answers), sum(answers)) == (8, 175, 3429)
    assert len(schemas) == 8
    assert workload.num_unique_prompt_tokens < workload.num_prompt_tokens / 5
    following = [
        one.prompt[:150] == two.prompt[:150] for one, two in zip(workload.rows, workload.rows[1:], strict=False)
    ]
    assert sum(following) < 30, "rows of one schema stand together, which no dataset promises"


def test_unique_prompts_differ_from_shared_schema_in_the_sharing_alone() -> None:
    unique, shared = make_workload("unique-prompts"), make_workload("shared-schema")
    assert sorted(lengths(unique)) == sorted(lengths(shared))
    assert len({row.prompt[:8] for row in unique.rows}) == 96
    assert unique.num_unique_prompt_tokens == unique.num_prompt_tokens == shared.num_prompt_tokens


def test_long_answers() -> None:
    longer, base = make_workload("shared-schema-long"), make_workload("shared-schema")
    assert longer.num_output_tokens == 3 * base.num_output_tokens
    tail = sorted(row.max_tokens for row in make_workload("long-tail").rows)
    assert tail[-4:] == [512] * 4
    assert tail[-5] <= 64


@pytest.mark.parametrize(
    ("name", "num_experts", "num_schemas"), [("mixed-experts-3", 3, 9), ("mixed-experts-30", 30, 30)]
)
def test_experts_have_schemas_of_their_own(name: str, num_experts: int, num_schemas: int) -> None:
    workload = make_workload(name)
    owners = {(row.prompt[: row.prefix_length], row.expert) for row in workload.rows}
    assert workload.num_experts == num_experts
    assert len(owners) == len({schema for schema, _ in owners}) == num_schemas
    assert workload.num_output_tokens == 3429


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_depends_on_its_arguments_alone(name: str) -> None:
    assert make_workload(name, seed=3) == make_workload(name, seed=3)
    one, two = make_workload(name, seed=3), make_workload(name, seed=4)
    assert sorted(row.max_tokens for row in one.rows) == sorted(row.max_tokens for row in two.rows)
    assert one.num_prompt_tokens == pytest.approx(two.num_prompt_tokens, rel=0.02)
    assert not {row.prompt for row in one.rows} & {row.prompt for row in two.rows}


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_small_workloads(name: str, rows: int) -> None:
    workload = make_workload(name, rows=rows, vocab_size=300)
    assert len(workload.rows) == rows
    assert all(16 <= token < 300 for row in workload.rows for token in row.prompt)
    assert len({row.id for row in workload.rows}) == rows
    assert all(row.max_tokens > 0 and row.prefix_length < len(row.prompt) for row in workload.rows)


def test_a_workload_is_named() -> None:
    with pytest.raises(ValueError, match="shared-schema"):
        make_workload("no-such")
    with pytest.raises(ValueError, match="at least one row"):
        make_workload("short", rows=0)


def measured(peer: str, seconds: float, answers: dict[str, list[int]]) -> Measurement:
    return Measurement(peer, seconds, 1.0, 3 << 20, prompt_tokens=300, output_tokens=100, answers=answers)


def test_the_table_compares() -> None:
    slow = measured("thirty-lines", 20.0, {"0": [1, 2], "1": [3]})
    broken = Measurement("vllm", error="no interpreter")
    fast = measured("packed", 2.0, {"0": [1, 2], "1": [4]})
    first, failed, second = rows_of([slow, broken, fast])
    assert first["times_thirty-lines"] == 1.0
    assert failed == {"peer": "vllm", "error": "no interpreter"}
    assert second["times_thirty-lines"] == 10.0
    assert "times_vllm" not in second
    assert second["output_tokens_per_second"] == 50.0
    assert second["total_tokens_per_second"] == 200.0
    assert second["peak_mib"] == 3.0
    assert second["same_answers"] == 0.5


def test_the_fastest_run_counts() -> None:
    failed, slow, fast = Measurement("packed", error="x"), measured("packed", 3.0, {}), measured("packed", 2.0, {})
    assert engine.best_of([failed, slow, fast]) == [fast]
    assert engine.best_of([fast, slow, failed]) == [fast]
    assert engine.best_of([failed]) == [failed]


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(make_model("tiny", tmp_path) / "model.safetensors", "pt") as weights:
        matrices = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a dict
    assert sum(num_parameters("tiny")) == sum(shape[0] * shape[1] for shape in matrices if len(shape) == 2)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Run:
    """Runs the whole program on the tiny model in float32; its report."""
    path = tmp_path / "out.json"

    def run(*arguments: str) -> dict[str, Any]:
        assert engine.main(["--model", "tiny", "--dtype", "float32", "--json", str(path), *arguments]) == 0
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    return run


def test_peers_on_a_tiny_model(tiny_run: Run) -> None:
    """All of it: the program, the peers in their own processes, the table's numbers and the JSON."""
    report = tiny_run("--rows", "6", "--workload", "short", "--peers", "thirty-lines,padded")
    (workload,) = report["workloads"]
    assert [row["peer"] for row in workload["peers"]] == ["thirty-lines", "padded"]
    assert all(row["seconds"] > 0 and row["peak_mib"] > 50 for row in workload["peers"])
    assert all(row["same_answers"] == 1.0 for row in workload["peers"]), "float32: padding changes no answer"
    assert all(row["seconds"] > workload["floor_seconds"] > 0 for row in workload["peers"])
    assert report["machine"]["cores"] >= 1
    assert report["floor"]["flops_per_second"] > report["floor"]["bytes_per_second"] > 1e8


def test_mixed_experts_answer_as_peft_merges_them(tiny_run: Run) -> None:
    report = tiny_run("--rows", "9", "--workload", "mixed-experts-3", "--peers", "thirty-lines,packed,packed-merged")
    (workload,) = report["workloads"]
    _, packed, merged = workload["peers"]
    assert packed["same_answers"] == 1.0, "a LoRA, a DoRA and another LoRA in one batch, in float32"
    assert merged["same_answers"] < 1.0, "one expert answers all rows: the experts do not differ"
    assert packed["times_packed-merged"] == pytest.approx(merged["seconds"] / packed["seconds"])


def test_one_prompt_alone_a_change_of_expert_and_where_time_goes(tiny_run: Run) -> None:
    report = tiny_run("--single", "--peers", "thirty-lines,packed-no-bank", "--swap", "--profile")
    (workload,) = report["workloads"]
    assert [row["peer"] for row in workload["peers"]] == ["thirty-lines", "packed-no-bank"]
    assert all(row["same_answers"] == 1.0 for row in workload["peers"])
    assert all(run["output_tokens"] == 64 and run["prompt_tokens"] == 300 for run in workload["runs"])
    swap = report["swap"]
    assert 0 < swap["resident_load_ms"] < swap["cold_load_ms"]
    assert swap["same_expert_request_ms"] > 0 < swap["unload_ms"]
    assert list(report["profile"]) == ["prefill", "decode-1", "decode-16", "decode-64"]
    for step in report["profile"].values():
        assert {"products", "output layer", "attention", "norms", "gates"} < step["parts"].keys()
        assert all(seconds > 0 for seconds in step["parts"].values())
        assert step["floor_seconds"] > 0 < step["seconds"]


@pytest.mark.parametrize("at", [0, 1])
def test_an_expert_is_what_peft_reads(at: int, tmp_path: Path) -> None:
    """Every tensor finds its place, and changes a weight by about a tenth."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_path = make_model("tiny", tmp_path)
    expert = make_experts(base_path, 2)[at]
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    plain = {name: value.clone() for name, value in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, expert)
    result = adapted.load_adapter(expert, "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    adapted.delete_adapter("again")
    merged = dict(adapted.merge_and_unload().named_parameters())
    name = "model.layers.1.mlp.down_proj.weight"
    assert open_package(package_of(expert)).adapter.kind == ("lora", "dora")[at]
    assert 0.05 < (merged[name] - plain[name]).norm() / plain[name].norm() < 0.2


def test_experts_are_made_once(tmp_path: Path) -> None:
    base = make_model("tiny", tmp_path)
    first, second = make_experts(base, 2)
    before = (first / "adapter_model.safetensors").stat().st_mtime_ns
    assert make_experts(base, 1) == [first]
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert package_of(first).read_bytes() != package_of(second).read_bytes()


def test_the_floor_counts_what_must_be_computed() -> None:
    layers, head = num_parameters("tiny")
    workload = Workload("two", 0, 100, (Row("0", (16, 17, 18), 5, 2), Row("1", (16, 17, 19), 3, 2)))
    prompts, decoded = layers * 4 + head * 2, (layers + head) * 6
    fast_memory, slow_memory = Floor(2.0, 1e9, 2), Floor(2.0, 0.5, 2)
    assert fast_memory.seconds("tiny", workload) == pytest.approx(prompts + decoded)
    assert slow_memory.seconds("tiny", workload) == pytest.approx(prompts + 4 * (layers + head) * 2 / 0.5)


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    workload = make_workload("short", rows=2, vocab_size=SHAPES["tiny"]["vocab_size"])
    no_model, python = Path("no-such-model"), tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no module named $2" >&2\nexit 3\n')
    python.chmod(0o755)
    options: dict[str, Any] = {"model": no_model, "dtype": "float32"}
    failed = measure("vllm", PEERS["vllm"], workload, **options, interpreters={"vllm": python})
    assert failed.error == "ended with 3\nno module named benchmarks.peers.vllm_offline"
    mixed = make_workload("mixed-experts-3", rows=3, vocab_size=300)
    refused = measure("padded", PEERS["padded"], mixed, model=no_model, dtype="float32")
    assert refused.error is not None
    assert "several experts" in refused.error
    nothing = measure("packed-merged", PEERS["packed-merged"], workload, model=no_model, dtype="float32")
    assert nothing.error is not None
    assert "no experts" in nothing.error
    absent = measure("vllm", PEERS["vllm"], workload, model=no_model, dtype="float32")
    assert absent.error is not None
    assert "--peer vllm=" in absent.error
