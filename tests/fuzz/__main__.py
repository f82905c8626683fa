"""Run each fuzz target for a while, in a process of its own, from seeds made of the table of hostile packages.

    python -m tests.fuzz --seconds 300 [archive manifest safetensors adapter template]

A finding is written to build/fuzz/<target>/findings; the exit code is 1 when there is one.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import TARGETS, seeds

PROJECT = Path(__file__).parents[2]
MAX_BYTES = 1 << 16


def main() -> int:
    """Make the seeds, and run the targets one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"Of {', '.join(TARGETS)}.")
    parser.add_argument("--seconds", type=int, default=300, help="For each target.")
    parser.add_argument("--folder", type=Path, default=PROJECT / "build" / "fuzz")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.targets:
        corpus, findings = arguments.folder / name / "corpus", arguments.folder / name / "findings"
        for folder in (corpus, findings):
            folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(name)):
            if len(seed) <= MAX_BYTES:
                (corpus / f"seed-{number}").write_bytes(seed)
        done = subprocess.run(
            [
                sys.executable, "-m", "tests.fuzz.run", name, str(corpus), f"-max_total_time={arguments.seconds}",
                f"-max_len={MAX_BYTES}", f"-artifact_prefix={findings}/", "-rss_limit_mb=2048", "-timeout=20",
                "-print_final_stats=1",
            ],
            cwd=PROJECT,
            check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append(name)
    sys.stderr.write(f"findings in: {', '.join(failed)}\n" if failed else "no findings\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
