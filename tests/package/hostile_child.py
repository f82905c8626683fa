"""Opens every hostile package in a process with bounds, and tells what came of each, a line of JSON a case."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import ExpertError
from pipeline.package import ExpertPackage, fitting_base_model, open_package
from tests.package.expert_fixtures import write_archive, write_files
from tests.package.hostile_cases import ALICE, BASE_FILES, CASES, SMALL, Build, Case, public_key

MEMORY_BYTES = 2 << 30
CPU_SECONDS = 200
FILE_BYTES = 128 << 20


def tree(root: Path) -> dict[str, str]:
    """Every file below `root`, and what kind it is or holds; locks, which are empty, left out."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes().hex()[:200] if path.is_file() else "special"
        for path in root.rglob("*")
        if (not path.is_dir() or path.is_symlink()) and path.suffix != ".lock"
    }


def written(build: Build, path: Path) -> Path:
    """A package as a file."""
    built = build()
    if isinstance(built, bytes):
        path.write_bytes(built)
        return path
    return write_archive(path, built)


def described(package: ExpertPackage) -> str:
    """What is said of a package that was opened: its warnings, and its files with their modes."""
    modes = {record.path: (package.root / record.path).stat().st_mode & 0o7777 for record in package.files}
    return "\n".join([*package.warnings, *(f"{path} {mode:04o}" for path, mode in modes.items())])


def attempt(case: Case, root: Path) -> dict[str, Any]:
    """Open one package, in a working directory with a base model in it and another one beside it."""
    place = root / "work"
    write_files(root, {"canary/alive": b"untouched", "trust/alice.pub": public_key(ALICE).encode()})
    write_files(place / "base", BASE_FILES)
    write_files(root / "outside", BASE_FILES)
    os.chdir(place)
    os.environ["EXPERT_TRUST_DIR"] = str(root / "trust")
    source, cache = written(case.build, root / "hostile.expert"), root / "cache"
    if case.before is not None:
        open_package(written(case.before, root / "before.expert"), cache_dir=cache, trust=case.trust)
    before = tree(root)
    begun, error = time.perf_counter(), ""
    try:
        package = open_package(source, cache_dir=cache, limits=SMALL, trust=case.trust)
        fitting_base_model(package, base_model=case.base_model, cache_dir=cache)
        text = described(package)
    except ExpertError as problem:
        error, text = type(problem).__name__, str(problem)
    except BaseException as problem:  # noqa: BLE001  # is what the test is about
        error, text = f"foreign {type(problem).__name__}", str(problem)[:500]
    seconds = time.perf_counter() - begun
    cached = ("cache/packages/", "cache/archives/")  # packages, and notes of what was opened
    after = {name: data for name, data in tree(root).items() if not name.startswith(cached) or name in before}
    left = [path.name for path in (cache / "packages").glob(".*")] if (cache / "packages").is_dir() else []
    return {
        "case": case.name,
        "error": error,
        "text": text,
        "seconds": seconds,
        "untouched": after == before,
        "left": left,
        "kept": len(list((cache / "packages").glob("[0-9a-f]*"))) if (cache / "packages").is_dir() else 0,
    }


def main() -> None:
    """Run all cases below the directory that is named."""
    root = Path(sys.argv[1]).resolve()
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    for number, case in enumerate(CASES):
        print(json.dumps(attempt(case, root / str(number))), flush=True)  # noqa: T201  # its result


if __name__ == "__main__":
    main()
