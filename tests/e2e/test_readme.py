"""The README's Python runs, and prints what it says."""

from pathlib import Path

import pytest

from tests.readme import PYTHON


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_its_python_runs(
    cluster: None, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102  # our own
    printed = capsys.readouterr().out
    if "run_batch" in code:
        assert "SELECT city, COUNT(*) FROM users GROUP BY city" in printed
    for age in (18, 30, 60) if "for age in" in code else ():
        assert f"age > {age}" in printed
