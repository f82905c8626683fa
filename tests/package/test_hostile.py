"""Every hostile package is refused by name, or opened for what it is, in bounded time and memory.

Nothing beside it is touched, and nothing left behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.package.hostile_cases import CASES, NUMBERS, Case

PROJECT = Path(__file__).parents[2]
Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What one process with bounds found for each case; a case that is not in it has ended the process."""
    root = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, "-m", "tests.package.hostile_child", str(root)],
        cwd=PROJECT,
        # each thread would reserve memory that counts; and no base model of the person who runs this is found
        env={name: value for name, value in os.environ.items() if name != "EXPERT_MODELS_DIR"}
        | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    found = {outcome["case"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, (done.stderr[-2000:], f"ended after {len(found)} of {len(CASES)} cases")
    return found


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 180


def test_every_number_of_the_list_has_a_case() -> None:
    assert sorted({int(case.name[:2]) for case in CASES}) == list(NUMBERS)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_hostile_package_is_refused_or_harmless(case: Case, outcomes: Outcomes) -> None:
    outcome = outcomes[case.name]
    assert outcome["error"] == case.error, outcome["text"]
    assert case.says in outcome["text"]
    assert ("Fix: " in outcome["text"]) == bool(case.error)
    assert outcome["kept"] == 0 or case.error != "ArchiveError", "a refused archive is kept"
    assert outcome["untouched"], "a file beside the destination has changed"
    assert outcome["left"] == [], "scratch files are left behind"
