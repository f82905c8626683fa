"""Opens every hostile package in a process with bounds, and tells what came of each, a line of JSON a case."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import ExpertError
from pipeline.package import fitting_base_model, open_package
from tests.package.expert_fixtures import write_archive, write_files
from tests.package.hostile_cases import BASE_FILES, CASES, SMALL, Case

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


def attempt(case: Case, root: Path) -> dict[str, Any]:
    """Open one package."""
    write_files(root, {"canary/alive": b"untouched", **{f"base/{name}": data for name, data in BASE_FILES.items()}})
    source = root / "hostile.expert"
    built = case.build()
    if isinstance(built, bytes):
        source.write_bytes(built)
    else:
        write_archive(source, built)
    before, cache = tree(root), root / "cache"
    begun, error, text = time.perf_counter(), "", "it was opened"
    try:
        package = open_package(source, cache_dir=cache, limits=SMALL)
        fitting_base_model(package, base_model=root / "base", cache_dir=cache)
    except ExpertError as problem:
        error, text = type(problem).__name__, str(problem)
    except BaseException as problem:  # noqa: BLE001  # is what the test is about
        error, text = f"foreign {type(problem).__name__}", str(problem)[:500]
    seconds = time.perf_counter() - begun
    after = {name: data for name, data in tree(root).items() if not name.startswith("cache/packages/")}
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
    root = Path(sys.argv[1])
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
