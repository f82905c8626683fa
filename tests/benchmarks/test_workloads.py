"""The benchmark's rows are what its docstrings say, its table is right, and the whole of it runs."""

import json
from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.measure import Measurement, measure
from benchmarks.models import SHAPES, make_model, num_parameters
from benchmarks.registry import PEERS
from benchmarks.report import rows_of
from benchmarks.workloads import WORKLOADS, Workload, make_workload


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


def test_peers_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: the program, two peers in their own processes, the table's numbers and the JSON."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # matrices this small only lose by sharing the work
    path = tmp_path / "out.json"
    arguments = ["--model", "tiny", "--dtype", "float32", "--rows", "8", "--workload", "short", "--json", str(path)]
    assert engine.main([*arguments, "--peers", "thirty-lines,sorted"]) == 0
    report = json.loads(path.read_text())
    (workload,) = report["workloads"]
    assert [row["peer"] for row in workload["peers"]] == ["thirty-lines", "sorted"]
    assert all(row["seconds"] > 0 and row["peak_mib"] > 50 for row in workload["peers"])
    assert all(row["same_answers"] == 1.0 for row in workload["peers"]), "float32: padding changes no answer"
    assert report["machine"]["cores"] >= 1


def test_a_peer_that_fails_says_why() -> None:
    workload = make_workload("short", rows=2, vocab_size=SHAPES["tiny"]["vocab_size"])
    no_model = Path("no-such-model")
    failed = measure("thirty-lines", PEERS["thirty-lines"], workload, model=no_model, dtype="float32")
    assert failed.error is not None
    assert "no-such-model" in failed.error
    absent = measure("vllm", PEERS["vllm"], workload, model=no_model, dtype="float32")
    assert absent.error is not None
    assert "--peer vllm=" in absent.error
