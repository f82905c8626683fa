"""Runs one peer in a process of its own and checks that it did the work."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.registry import PROFILE, SWAP, Peer, environment_of, interpreter_of
from benchmarks.workloads import Workload, make_workload

WARMUP_ROWS = 4
WARMUP_TOKENS = 8
ERROR_LINES = 12


@dataclass(frozen=True)
class Measurement:
    """What one peer needed for one workload.

    Args:
        peer: Its name.
        seconds: From the first row handed in to the last answer; without loading and warming up. Of rows handed in one
            by one, the median row's.
        load_seconds: Loading the model; compiling it, too, where the engine compiles.
        peak_bytes: The most memory its processes had resident, the mapped weights included.
        prompt_tokens: The prompt tokens that were answered in these seconds.
        output_tokens: The tokens that were generated in them.
        cpu_seconds: Processor time of its processes meanwhile: what stays the same when other programs slow it down.
        others_share: The share of the cores that other programs took meanwhile; above a few per cent, measure again.
        answers: Token ids by row id.
        error: Why there is no measurement, or None.
    """

    peer: str
    seconds: float = 0.0
    load_seconds: float = 0.0
    peak_bytes: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cpu_seconds: float = 0.0
    others_share: float = 0.0
    answers: Mapping[str, Sequence[int]] | None = None
    error: str | None = None


def measure(
    name: str,
    peer: Peer,
    workload: Workload,
    *,
    model: Path,
    dtype: str,
    experts: Sequence[Path] = (),
    interpreters: Mapping[str, Path] | None = None,
    timeout: float = 7200.0,
) -> Measurement:
    """Run a peer on a workload; a peer that fails is a measurement with an error, for the others to go on.

    Args:
        name: The peer's name, for the table.
        peer: What to run.
        workload: What it answers.
        model: The model's directory.
        dtype: `"bfloat16"` or `"float32"`.
        experts: Folders of `make_experts`, in the order of their numbers; for a workload without experts none.
        interpreters: Pythons by name, for peers that need one of their own.
        timeout: Seconds after which it is ended.
    """
    python = interpreter_of(peer, interpreters or {})
    if python is None:
        return Measurement(name, error=f"give its interpreter with --peer {peer.interpreter}=PATH/python")
    if workload.num_experts and not peer.takes_experts:
        return Measurement(name, error="it cannot answer rows of several experts")
    if peer.unmixed and not workload.num_experts:
        return Measurement(name, error="the workload has no experts that it could merge")
    if peer.unmixed:
        experts = experts[:1]
        workload = replace(workload, rows=tuple(replace(row, expert=0) for row in workload.rows))
    job = _job(peer, workload, model=model, dtype=dtype, experts=experts)
    status, output, errors = _run_job(peer, python, job, timeout)
    if status != 0:
        return Measurement(name, error=f"ended with {status}\n" + "\n".join(errors.splitlines()[-ERROR_LINES:]))
    lines = [line for line in output.splitlines() if line.startswith('{"seconds"')]  # engines may log after it
    if len(lines) != 1:
        return Measurement(name, error="printed no measurement\n" + "\n".join(output.splitlines()[-ERROR_LINES:]))
    return _checked(name, workload, json.loads(lines[0]))


def measure_swap(
    workload: Workload, *, model: Path, dtype: str, experts: Sequence[Path], timeout: float = 600.0
) -> dict[str, Any]:
    """What changing the expert costs, in milliseconds by name; `error` where it could not be measured.

    Args:
        workload: Its first prompt is asked.
        model: The model's directory.
        dtype: `"bfloat16"` or `"float32"`.
        experts: Two or more folders of `make_experts`.
        timeout: Seconds after which it is ended.
    """
    return _last_line(SWAP, _job(SWAP, workload, model=model, dtype=dtype, experts=experts), timeout)


def measure_profile(workload: Workload, *, model: Path, dtype: str, timeout: float = 600.0) -> dict[str, Any]:
    """Where the time of a prefill step and of decode steps goes, by step; see `benchmarks.peers.profile`.

    Args:
        workload: Its prompts are computed.
        model: The model's directory.
        dtype: `"bfloat16"` or `"float32"`.
        timeout: Seconds after which it is ended.

    Returns:
        `error` where it could not be measured.
    """
    return _last_line(PROFILE, _job(PROFILE, workload, model=model, dtype=dtype, experts=()), timeout)


def _last_line(peer: Peer, job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The JSON that a module of our own prints last, or `error`."""
    status, output, errors = _run_job(peer, Path(sys.executable), job, timeout)
    if status != 0:
        return {"error": "\n".join(errors.splitlines()[-ERROR_LINES:])}
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def _job(peer: Peer, workload: Workload, *, model: Path, dtype: str, experts: Sequence[Path]) -> dict[str, Any]:
    other = make_workload(
        workload.name, rows=len(workload.rows), vocab_size=workload.vocab_size, seed=workload.seed + 1
    )
    warmup = [
        replace(row, id=f"warmup-{row.id}", max_tokens=WARMUP_TOKENS, expert=0 if peer.unmixed else row.expert)
        for row in other.rows[:WARMUP_ROWS]
    ]
    return {
        "model": str(model.resolve()),
        "dtype": dtype,
        "options": dict(peer.options),
        "experts": [str(path.resolve()) for path in experts],
        "one_by_one": workload.is_one_by_one,
        "rows": [asdict(row) for row in workload.rows],
        "warmup": [asdict(row) for row in warmup],
    }


def _run_job(peer: Peer, python: Path, job: Mapping[str, Any], timeout: float) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [str(python), "-m", f"benchmarks.peers.{peer.module}", str(path)]
        return _run(command, environment_of(peer, python), timeout)


def _checked(name: str, workload: Workload, result: dict[str, Any]) -> Measurement:
    answers = result.pop("answers")
    wrong = [row.id for row in workload.rows if len(answers.get(row.id, ())) != row.max_tokens]
    if wrong or len(answers) != len(workload.rows):
        return Measurement(
            name, error=f"{len(wrong)} answers have another length than asked for: {', '.join(wrong[:8])}"
        )
    return Measurement(
        name,
        seconds=float(result["seconds"]),
        load_seconds=float(result["load_seconds"]) + float(result["warmup_seconds"]),
        peak_bytes=int(result["peak_bytes"]),
        prompt_tokens=workload.num_prompt_tokens // (len(workload.rows) if workload.is_one_by_one else 1),
        output_tokens=workload.num_output_tokens // (len(workload.rows) if workload.is_one_by_one else 1),
        cpu_seconds=float(result["cpu_seconds"]),
        others_share=float(result["others_share"]),
        answers=answers,
    )


def _run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Run a program in a process group of its own, so that what it started ends with it."""
    process = subprocess.Popen(  # noqa: S603 - our own modules, in interpreters the user names
        command,
        cwd=Path(__file__).parent.parent,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL, "", f"it ran for more than {timeout:g} seconds"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, output, errors
