"""What the project says of itself elsewhere: workflows, the container, the versions."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
GITHUB = PROJECT / ".github"
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", sorted((GITHUB / "workflows").glob("*.yml"))),
        ("vendor.dependabot", [GITHUB / "dependabot.yml"]),
        ("vendor.github-issue-forms", [GITHUB / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "idea.yml")]),
        ("vendor.github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("vendor.citation-file-format", [PROJECT / "CITATION.cff"]),
    ],
    ids=["workflows", "dependabot", "issue forms", "issue chooser", "citation"],
)
def test_files_for_others_are_valid(schema: str, files: list[Path]) -> None:
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_runs_what_make_check_runs() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    checks = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert checks is not None
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    entries = " ".join(hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"])
    for tool in re.findall(r"\$\(BIN\)/([\w-]+)", checks[1]):
        assert tool in entries


def test_the_citation_has_the_version() -> None:
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == PYPROJECT["project"]["version"]


def test_a_linter_passes_the_container() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, PROJECT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_container_copies_what_is_there_and_runs_as_nobody_special() -> None:
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    allowed = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert all((PROJECT / path).exists() for path in copied)
    stages = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert stages == ["base", "cpu", "cuda"]
    assert lines.count("USER 10001") == 2
    extras = set(re.findall(r"\[([\w,]+)\]", " ".join(line for line in lines if "pip install" in line)))
    assert {name for group in extras for name in group.split(",")} <= set(PYPROJECT["project"]["optional-dependencies"])


def test_everything_installed_is_pinned() -> None:
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins()}
    groups = PYPROJECT["project"]["optional-dependencies"]
    for requirement in [*PYPROJECT["project"]["dependencies"], *groups["dev"], *groups["grammar"], *groups["docs"]]:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name[0]).lower() in pinned, requirement


def pins() -> list[str]:
    return [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line]
