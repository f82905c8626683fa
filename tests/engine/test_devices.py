"""Each word for a device, on machines with and without it: taken, or refused with what there is; the CPU by name only.

The machines are torch's answers to what the product asks of it; this one may have no GPU.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import Expert, ExpertManager, demo
from pipeline.batch.answering import EXPERTS, EngineJob, LoadedEngine, load_engine
from pipeline.batch.config import BatchConfig
from pipeline.batch.worker import ShardWorker
from pipeline.engine import devices
from pipeline.engine.devices import available_devices, check_device, choose_device
from pipeline.engine.loader import load_base_model
from pipeline.errors import ConfigError
from pipeline.package import open_package
from pipeline.serve.config import ServeConfig
from pipeline.serve.run import _plan
from tests.batch.test_worker import make_job

Machine = Callable[..., None]
UNKNOWN = [
    "",
    "gpu",
    "CUDA",
    "cuda:",
    "cuda:-1",
    "cuda:01",
    "cuda:1000",
    "cuda: 1",
    "cpu:0",
    "mps:0",
    "xpu",
    "cuda:1\n",
]
PACKAGE = {"package": str(demo.package("sql"))}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Has torch say what there is."""

    def say(*, gpus: int = 0, mps: bool = False, built_for: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return say


@pytest.mark.parametrize(
    ("there", "device", "chosen"),
    [
        ({}, None, "cpu"),
        ({}, "auto", "cpu"),
        ({"mps": True}, "auto", "mps"),
        ({"gpus": 2}, "auto", "cuda"),
        ({"gpus": 2, "mps": True}, None, "cuda"),
        ({"gpus": 2, "mps": True}, "cpu", "cpu"),
        ({"gpus": 1}, "cuda", "cuda"),
        ({"gpus": 2}, "cuda:0", "cuda:0"),
        ({"gpus": 2}, "cuda:1", "cuda:1"),
        ({"gpus": 12}, "cuda:11", "cuda:11"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_a_device_that_is_there_is_taken(
    machine: Machine, there: dict[str, Any], device: str | None, chosen: str
) -> None:
    machine(**there)
    assert str(choose_device(device)) == chosen
    check_device(device)


@pytest.mark.parametrize(
    ("there", "device", "list_of_them", "why"),
    [
        ({}, "cuda", "cpu", "this torch has no CUDA"),
        ({"built_for": "12.8"}, "cuda:0", "cpu", "this torch is built for CUDA 12.8: is there a GPU, and a driver"),
        ({"gpus": 1}, "cuda:1", "cpu, cuda:0", None),
        ({"gpus": 2}, "cuda:7", "cpu, cuda:0, cuda:1", None),
        ({"gpus": 1}, "mps", "cpu, cuda:0", "mps is the GPU of a Mac"),
        ({"mps": True}, "cuda", "cpu, mps", "this torch has no CUDA"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    machine: Machine, there: dict[str, Any], device: str, list_of_them: str, why: str | None
) -> None:
    """By all that take one, before anything is loaded; never is it the CPU instead."""
    machine(**there)
    asked: list[Callable[[], Any]] = [
        lambda: choose_device(device),
        lambda: load_base_model(demo.BASE_MODEL, device=device),
        lambda: Expert.load("nothing is read yet", device=device),
        lambda: ExpertManager(device=device),
    ]
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu") as manager:
        for ask in (*asked, lambda: manager.load_expert("sql", demo.package("sql"), device=device)):
            with pytest.raises(ConfigError, match=re.escape(f"device {device!r} is not available")) as caught:
                ask()
            assert caught.value.details[0] == f"there is: {list_of_them}"
            assert " ".join(caught.value.details[1:]).startswith(why or "")
            assert len(caught.value.details) == 1 + (why is not None)
        assert manager.experts == ()


def test_expert_serve_refuses_it_before_its_replicas_start(machine: Machine) -> None:
    machine(gpus=1)
    with pytest.raises(ConfigError, match="'mps' is not available"):
        _plan(ServeConfig.from_options({"experts": [PACKAGE], "base_model": str(demo.BASE_MODEL), "device": "mps"}))


def test_a_worker_refuses_it_with_its_first_shard(machine: Machine, tmp_path: Path) -> None:
    machine(gpus=1)

    def load(job: EngineJob) -> LoadedEngine:
        package = open_package(demo.package("sql"))
        told = replace(job.experts[0], package=str(demo.package("sql")), sha256=package.digest)
        return load_engine(replace(job, experts=(told,), base_place=str(demo.BASE_MODEL), device="cuda:1"))

    job = make_job(tmp_path, {"prompt": ["Who?"]}, load=replace(EXPERTS, engine=load))
    worker = ShardWorker(job.told)
    with pytest.raises(ConfigError, match="'cuda:1' is not available") as caught:
        worker(job.blocks()[0])
    assert caught.value.details == ("there is: cpu, cuda:0",)


def test_gpus_that_are_hidden_are_said_to_be(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(built_for="12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError) as caught:
        check_device("cuda")
    assert "CUDA_VISIBLE_DEVICES= hides every GPU" in caught.value.details[1]


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a machine of CPUs")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_this_machine_of_cpus_refuses_the_others(device: str) -> None:
    """As torch itself says what there is here."""
    assert available_devices() == ("cpu",)
    with pytest.raises(ConfigError, match="is not available"):
        Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device=device)


@pytest.mark.parametrize("device", [*UNKNOWN, 1, 1.5, b"cpu", torch.device("cpu")])
def test_what_is_no_device_is_refused_with_the_words_there_are(machine: Machine, device: Any) -> None:
    machine(gpus=2, mps=True)
    for ask in (
        lambda: choose_device(device),
        lambda: check_device(device),
        lambda: Expert.load("nothing is read yet", device=device),
        lambda: ExpertManager(device=device),
    ):
        with pytest.raises(ConfigError, match="is unknown") as caught:
            ask()
        assert devices.DEVICE_NAMES in caught.value.hint


@pytest.mark.parametrize("device", [*UNKNOWN, 1])
def test_configurations_refuse_what_is_no_device(device: Any) -> None:
    wanted = f"device: expected {devices.DEVICE_NAMES}, got "
    with pytest.raises(ConfigError) as batch:
        BatchConfig.from_options(dataset="a", expert="b", output="c", device=device)
    with pytest.raises(ConfigError) as serve:
        ServeConfig.from_options({"experts": [PACKAGE], "device": device})
    for caught in (batch, serve):
        (problem,) = caught.value.details
        assert problem.startswith(wanted)


@pytest.mark.parametrize(
    ("device", "num_gpus", "problem"),
    [
        (None, None, None),
        *((word, None, None) for word in ("auto", "cpu", "mps", "cuda", "cuda:0")),
        ("cuda:1", 2, None),
        ("cuda:3", 0, None),  # Ray deals out none: the process sees what there is, and says so
        ("cuda:1", None, "there is no cuda:1 where Ray gives each process 1 GPU, its cuda:0: write cuda"),
        ("cuda:1", 0.5, "there is no cuda:1 where Ray gives each process 1 GPU, its cuda:0: write cuda"),
        ("cuda:2", 2, "there is no cuda:2 where Ray gives each process 2 GPUs, its cuda:0 to cuda:1: write cuda"),
    ],
)
def test_configurations_take_the_gpus_that_ray_gives(
    device: str | None, num_gpus: float | None, problem: str | None
) -> None:
    def batch() -> Any:
        return BatchConfig.from_options(dataset="a", expert="b", output="c", device=device, num_gpus=num_gpus)

    def serve() -> Any:
        replicas = {"num_gpus": num_gpus}
        return ServeConfig.from_options({"experts": [PACKAGE], "device": device, "replicas": replicas})

    for configure in (batch, serve):
        if problem is None:
            assert configure().device == device
            continue
        with pytest.raises(ConfigError) as caught:
            configure()
        assert caught.value.details in ((problem,), (f"device: {problem}",))
