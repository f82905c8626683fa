"""`EXPERT_LOG` asks for a log; without it there is none."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import logs
from pipeline.engine import devices


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    handlers, level = list(logs.logger.handlers), logs.logger.level
    yield logs.logger
    logs.logger.handlers, logs.logger.level = handlers, level


def test_it_is_quiet_unless_asked(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = list(logger.handlers)
    logs.set_up({})
    assert logger.handlers == before
    logs.set_up({"EXPERT_LOG": "loud"})
    assert logger.handlers == before
    assert "EXPERT_LOG=loud is none of debug" in caplog.text
    logs.set_up({"EXPERT_LOG": "Debug"})
    logging.getLogger("pipeline.engine.loader").debug("loaded")
    assert "DEBUG pipeline.engine.loader: loaded" in capsys.readouterr().err


def test_the_device_is_logged_and_a_gpu_that_is_not_used_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has another device than its CPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices._warn_of_unused_gpu.cache_clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        assert devices.choose_device("auto").type == "cpu"
    assert "chose the device cpu" in caplog.text
    assert "WARNING" not in caplog.text, "there is no GPU here"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "GPU_DEVICE", tmp_path / "nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    devices.choose_device()
    assert "WARNING" not in caplog.text, "it is hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.choose_device()
    devices.choose_device()
    assert caplog.text.count("there is an NVIDIA GPU, and answers come from the CPU") == 1
    devices._warn_of_unused_gpu.cache_clear()


def test_a_storage_client_prints_nothing_of_its_own() -> None:
    """Python prints what a logger without handlers says; a failure comes back as an error of ours."""
    code = "import logging, pipeline.storage; logging.getLogger('gcsfs').error('out of retries')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
