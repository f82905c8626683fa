"""The engines that can be measured, by name."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import BUILD


@dataclass(frozen=True)
class Peer:
    """One engine, with the options under which it is measured.

    Args:
        module: A module of `benchmarks.peers`, run as a program.
        about: What it is, for the table's reader.
        options: What the module takes.
        interpreter: Its name as given with `--peer NAME=PATH`; None for the interpreter that measures.
        takes_experts: It can answer rows that experts answer.
        unmixed: It answers with one merged expert what the workload gives to several.
    """

    module: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    interpreter: str | None = None
    takes_experts: bool = False
    unmixed: bool = False


SWAP = Peer("swap", "what changing the expert costs", takes_experts=True)
PROFILE = Peer("profile", "where the time of a step goes")
PEERS = {
    "thirty-lines": Peer(
        "thirty_lines",
        "stock generate, left-padded batches of 16, input order; experts one after another, each merged by PEFT",
        takes_experts=True,
    ),
    "sorted": Peer("thirty_lines", "the same, sorted by prompt length", {"sort": True}, takes_experts=True),
    "transformers-cb": Peer("transformers_cb", "transformers' continuous batching"),
    "padded": Peer("ours", "pipeline's padded engine", {"engine": "padded"}),
    "packed": Peer("ours", "pipeline's packed engine", {"engine": "packed"}, takes_experts=True),
    "packed-no-hint": Peer(
        "ours",
        "packed, not told how long the shared prefixes are",
        {"engine": "packed", "hint": 0},
        takes_experts=True,
    ),
    "packed-torch": Peer(
        "ours", "packed, on a GPU by torch's operations", {"engine": "packed", "triton": False}, takes_experts=True
    ),
    "packed-no-bank": Peer("ours", "packed, without a bank of experts", {"engine": "packed", "bank": False}),
    "packed-merged": Peer(
        "ours",
        "packed, all rows by one merged expert",
        {"engine": "packed", "merge": True},
        takes_experts=True,
        unmixed=True,
    ),
    "vllm": Peer("vllm_offline", "vLLM's LLM, prefix caching on", interpreter="vllm"),
    "vllm-no-prefix": Peer("vllm_offline", "prefix caching off", {"prefix_caching": False}, interpreter="vllm"),
    "vllm-eager": Peer("vllm_offline", "prefix caching on, not compiled", {"compile": False}, interpreter="vllm"),
}


def interpreter_of(peer: Peer, interpreters: Mapping[str, Path]) -> Path | None:
    """The Python that runs a peer, or None where none was given for it."""
    if peer.interpreter is None:
        return Path(sys.executable)
    return interpreters.get(peer.interpreter)


def environment_of(peer: Peer, interpreter: Path) -> dict[str, str]:
    """The environment a peer runs in: offline, and set as its own documentation asks for a CPU.

    vLLM on a CPU wants Intel's OpenMP preloaded (https://docs.vllm.ai/en/latest/getting_started/installation/cpu/), and
    left alone it keeps one core free for its scheduler, which on two cores would halve it.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("EXPERT_CACHE_DIR", str((BUILD / "cache").absolute()))
    if peer.interpreter != "vllm":
        return environment
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "6")  # GiB: more than all rows of a workload need together
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "nobind"
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    openmp = interpreter.parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file():
        environment.setdefault("LD_PRELOAD", str(openmp.resolve()))
    return environment
