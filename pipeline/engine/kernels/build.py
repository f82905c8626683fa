"""Compiling `cpu.c` with the machine's own C compiler, once, and loading it.

    <cache>/kernels/<digest>.so     the digest covers the sources, the flags, the compiler and this CPU's features

so on a cluster with a shared home no machine loads what another kind of CPU was given. A library is written beside its
place and appears by one rename: any number of processes may build at once.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pipeline.package.cache import default_cache_dir

SOURCES = ("cpu.c", "linear.h", "products.h", "vectors.h")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fPIC",
)
_COMPILE_SECONDS = 300
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.(so|dylib)[^/]*$")


class KernelsUnavailableError(Exception):
    """The kernels cannot be compiled or loaded here; caught by `load_kernels`, which says what is lost.

    Args:
        reason: Why, in one line.
        hint: How to get them.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Toolchain:
    """A C compiler, how it is called, and the OpenMP runtime the library shares with torch.

    Args:
        command: The compiler, with the arguments `$CC` gives it.
        version: What it prints for `--version`.
        flags: For compiling.
        link: For linking: the OpenMP runtime.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    link: tuple[str, ...]


def load_library(cache_dir: Path | None = None) -> ctypes.CDLL:
    """The compiled kernels, compiled first when the cache has none for this machine (about 3 s).

    Args:
        cache_dir: The root of the cache; `$EXPERT_CACHE_DIR` or `~/.cache/expert` if None.

    Raises:
        KernelsUnavailableError: No compiler, a compiler that fails, another platform, or a cache that cannot be used.
    """
    sources = {name: files("pipeline.engine.kernels").joinpath(name).read_bytes() for name in SOURCES}
    toolchain = find_toolchain()
    folder = _private_folder((cache_dir or default_cache_dir()) / "kernels")
    place = folder / f"{digest(sources, toolchain)}.so"
    if not place.exists():
        compile_library(sources, toolchain, place)
    try:
        return ctypes.CDLL(str(place))
    except OSError:
        compile_library(sources, toolchain, place)  # what lies there is damaged
    try:
        return ctypes.CDLL(str(place))
    except OSError as problem:
        raise KernelsUnavailableError(
            f"the compiled kernels cannot be loaded: {problem}",
            "Set EXPERT_CACHE_DIR to a directory from which programs may be loaded.",
        ) from problem


def find_toolchain() -> Toolchain:
    """The compiler to use: `$CC`, else gcc, cc or clang.

    Raises:
        KernelsUnavailableError: There is none, or the platform is not Linux or macOS on x86-64 or arm64.
    """
    machine = platform.machine().lower()
    is_arm = machine in {"arm64", "aarch64"}
    if sys.platform not in {"linux", "darwin"} or not (is_arm or machine in {"x86_64", "amd64"}):
        raise KernelsUnavailableError(f"no kernels for {sys.platform} on {machine}", "Use Linux or macOS.")
    named = os.environ.get("CC")
    candidates = [shlex.split(named)] if named else [["gcc"], ["cc"], ["clang"]]
    for command in candidates:
        program = shutil.which(command[0]) if command else None
        version = _output([program, *command[1:], "--version"]) if program else None
        if program and version:
            break
    else:
        tried = named or "gcc, cc and clang"
        raise KernelsUnavailableError(
            f"no C compiler found (tried {tried})",
            "Install gcc (Debian: apt-get install gcc), or set CC to a C compiler.",
        )
    is_clang = "clang" in version
    openmp = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
    tune = "-mcpu=native" if is_arm else "-march=native"
    return Toolchain((program, *command[1:]), version, (*FLAGS, tune, *openmp), _openmp_link(is_clang=is_clang))


def digest(sources: Mapping[str, bytes], toolchain: Toolchain) -> str:
    """The name of a library: sha256 over all that decides its code."""
    link = [item.rpartition("/")[2] for item in toolchain.link]  # where the runtime lies decides nothing
    parts = [*toolchain.command, toolchain.version, *toolchain.flags, *link, _cpu_features()]
    parts += [hashlib.sha256(sources[name]).hexdigest() for name in sorted(sources)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def compile_library(sources: Mapping[str, bytes], toolchain: Toolchain, place: Path) -> None:
    """Compile, and put the library in its place by one rename.

    Args:
        sources: The files of `SOURCES`, by name.
        toolchain: What compiles them.
        place: Where the library goes; its folder exists.

    Raises:
        KernelsUnavailableError: The compiler fails, or the cache cannot be written; the message ends with the
            compiler's own first words.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".fresh-", dir=place.parent) as scratch:
            for name, content in sources.items():
                (Path(scratch) / name).write_bytes(content)
            _run(toolchain, [*toolchain.flags, "-c", "cpu.c", "-o", "cpu.o"], scratch)
            _run(toolchain, ["-shared", "cpu.o", "-o", "cpu.so", *toolchain.link, "-lm"], scratch)
            (Path(scratch) / "cpu.so").replace(place)
    except OSError as problem:
        raise KernelsUnavailableError(
            f"the kernels cannot be compiled into {place.parent}: {problem.strerror or problem}",
            "Set EXPERT_CACHE_DIR to a directory with free space that you may write to.",
        ) from problem


def loaded_openmp() -> Path | None:
    """The OpenMP runtime that torch has loaded into this process, or None where it cannot be told.

    The library is linked against this very file, so both share one pool of threads.
    """
    import torch

    shipped = Path(torch.__file__).parent / "lib"
    if sys.platform == "darwin":
        runtime = shipped / "libomp.dylib"
        return runtime if runtime.exists() else None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = sorted({line.split(maxsplit=5)[5] for line in maps.splitlines() if _OPENMP.search(line)})
    ours = [path for path in paths if path.startswith(f"{shipped}/")] or paths
    return Path(ours[0]) if ours else None


def _openmp_link(*, is_clang: bool) -> tuple[str, ...]:
    runtime = loaded_openmp()
    if runtime is None or (is_clang and runtime.name.startswith("libgomp")):
        return ("-fopenmp",)  # clang's calls are not libgomp's
    return (str(runtime),)


def _run(toolchain: Toolchain, arguments: list[str], folder: str) -> None:
    command = [*toolchain.command, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - the compiler, found by name or named by the user
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as problem:
        raise KernelsUnavailableError(
            f"{toolchain.command[0]} took over {_COMPILE_SECONDS} s", "Set CC to another C compiler."
        ) from problem
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise KernelsUnavailableError(
            f"{toolchain.command[0]} failed: {said}", "Install gcc 10 or newer, or set CC to another C compiler."
        )


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - the compiler, found by name or named by the user
            command, capture_output=True, text=True, errors="replace", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_features() -> str:
    if sys.platform == "darwin":
        return _output(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _private_folder(folder: Path) -> Path:
    """Made for this user alone: what lies there is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as problem:
        raise KernelsUnavailableError(
            f"{folder} cannot be made: {problem.strerror or problem}",
            "Set EXPERT_CACHE_DIR to a directory with free space that you may write to.",
        ) from problem
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise KernelsUnavailableError(
            f"{folder} may be written by others, so no program is loaded from it",
            f"Run `chmod go-w {folder}`, or set EXPERT_CACHE_DIR to a directory of your own.",
        )
    return folder
