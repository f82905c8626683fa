"""The README is true: its Python runs, and what it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
CONSOLE = "\n".join(code for language, code in BLOCKS if language == "console")


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_its_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": "local"},  # not whatever cluster this machine may have
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "run_batch" in code:
        assert "SELECT city, COUNT(*) FROM users GROUP BY city" in done.stdout
    for age in (18, 30, 60) if "for age in" in code else ():
        assert f"age > {age}" in done.stdout


def test_its_service_answers_its_questions() -> None:
    (command,) = (line for line in CONSOLE.splitlines() if line.startswith("expert serve "))
    (curl,) = (code for language, code in BLOCKS if language == "console" and code.startswith("curl "))
    (client,) = (code for language, code in BLOCKS if language == "py")
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command} --port 0"],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as service:
        try:
            assert service.stdout is not None
            address = next(
                found[0]
                for line in iter(service.stdout.readline, "")
                if (found := re.findall(r"http://127\.0\.0\.1:\d+", line))
            )
            for program in (["/bin/sh", "-c", curl], [sys.executable, "-c", client]):
                asked = [part.replace("http://127.0.0.1:8000", address) for part in program]
                done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
                assert "SELECT city, COUNT(*) FROM users GROUP BY city" in done.stdout, done.stderr
        finally:
            service.terminate()
            service.wait(60)


def test_it_has_code_to_run() -> None:
    assert len(PYTHON) >= 2
    assert len(PYTHON[0].splitlines()) <= 14


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\(([^)#:]+)\)", " ".join(re.findall(r"\]\([^)]+\)", README)))))
)
def test_its_links_lead_somewhere(target: str) -> None:
    assert (PROJECT / target).exists()


def test_its_commands_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", CONSOLE)):
        assert f"\n{target}:" in makefile
    for path in set(re.findall(r"\b(?:configs|jobs)/[\w.-]*\w", README)):
        assert (PROJECT / path).exists()
