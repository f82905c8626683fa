"""The benchmark of callers who ask at once counts what its table says."""

import json
from pathlib import Path

import pytest

from benchmarks import threads


def test_every_way_is_measured_and_answers_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "threads.json"
    arguments = ["--callers", "6", "--tokens", "5", "--repeat", "2", "--device", "cpu", "--json", str(report)]
    assert threads.main(arguments) == 0
    ways = {row["way"]: row for row in json.loads(report.read_text())["ways"]}
    assert list(ways) == list(threads.WAYS)
    assert all(row["same_answers"] for row in ways.values())
    assert ways["one after the other"]["steps"] == 30, "a step a token"
    assert ways["one after the other"]["times"] == 1
    assert 5 <= ways["one list"]["steps"] < 30
    assert "6 callers, 5 tokens each, the best of 2" in capsys.readouterr().out


def test_ways_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(threads.WAYS, "one list", lambda *asked: ["other"] * len(asked[1]))
    assert threads.main(["--callers", "2", "--tokens", "1", "--repeat", "2", "--device", "cpu"]) == 1
