"""Packages, base models and stores behind an endpoint of one's own: everybody who names them takes storage options."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline import Expert, ExpertManager, demo
from pipeline.batch.answering import EXPERTS, load_engine
from pipeline.batch.config import BatchConfig
from pipeline.batch.config_file import load_config
from pipeline.batch.execute import Workers, worker_job
from pipeline.batch.plan import open_experts, prepare
from pipeline.cli import app
from pipeline.errors import ConfigError, LoadError
from pipeline.package import PackageStore, local_base_model, open_package
from pipeline.serve.app import plan_service
from pipeline.serve.config import ServeConfig
from pipeline.serve.replica import open_staged
from tests.batch.moto_s3 import faulty_s3

STORE = "s3://bucket/experts"
FILE = "s3://bucket/files/expert-sql.expert"
DATASET = "s3://bucket/questions.parquet"


@dataclass(frozen=True)
class Shared:
    """What lies in an S3 of this machine, and the options that lead there."""

    options: dict[str, Any]
    package: str
    base: str


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with faulty_s3() as server:
        files = fsspec.filesystem("s3", **server.options)
        files.pipe_file(FILE, demo.package("sql").read_bytes())
        with files.open(DATASET, "wb") as target:
            pq.write_table(pa.table({"prompt": ["List all users."]}), target)
        store = PackageStore(STORE, server.options)
        package, base = store.stage(FILE), store.stage_base_model(demo.BASE_MODEL)
        assert package.digest == open_package(demo.package("sql")).digest
        yield Shared(server.options, package.url, base.url)


@pytest.fixture(autouse=True)
def fresh_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with nothing in it, and no way to S3 but the options: what is found was fetched with them."""
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize("place", ["package", "file"])
def test_an_expert(place: str, shared: Shared) -> None:
    package = shared.package if place == "package" else FILE
    with Expert.load(package, base_model=shared.base, storage_options=shared.options) as expert:
        assert expert.package.label == "expert-sql@0.1.0"
    with pytest.raises(LoadError, match="cannot be"):
        Expert.load("s3://bucket/other.expert", storage_options={"client_kwargs": {"endpoint_url": "no URL"}})


def test_a_manager(shared: Shared) -> None:
    with ExpertManager(base_model=shared.base, device="cpu", storage_options=shared.options) as manager:
        manager.load_experts({"staged": shared.package})
        assert manager.experts == ("staged",)


def batch_config(**options: Any) -> BatchConfig:
    return BatchConfig.from_options(dataset=DATASET, output="s3://bucket/answers", **options)


def test_a_job_and_its_workers(shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = batch_config(expert=shared.package, base_model=shared.base, storage_options=shared.options, device="cpu")
    job = prepare(config, open_experts(config))
    told = worker_job(job, Workers(1, 1, 0, 1), is_resumed=False, load=EXPERTS).engine
    assert "secret" not in repr(told)
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "another node"))
    loaded = load_engine(told)
    loaded.engine.close()
    assert list(loaded.builders) == [None]


def test_which_options_a_package_of_a_job_gets(tmp_path: Path) -> None:
    anonymous, mine = {"anon": True}, {"profile": "mine"}
    alike = batch_config(expert="s3://a/x", storage_options=anonymous)
    assert alike.storage_options_of("s3://elsewhere/x.expert") == anonymous
    assert alike.storage_options_of("https://host/x.expert") == alike.storage_options_of("x.expert") == {}
    apart = batch_config(expert="s3://a/x", storage_options=anonymous, package_storage_options=mine)
    assert apart.storage_options_of("s3://elsewhere/x.expert") == mine
    none = batch_config(expert="s3://a/x", storage_options=anonymous, package_storage_options={})
    assert none.storage_options_of("s3://elsewhere/x.expert") == {}
    file = tmp_path / "job.yaml"
    file.write_text(f"dataset: {DATASET}\noutput: s3://b/c\nexpert: x\npackage_storage_options:\n  anon: true\n")
    assert load_config(file).package_storage_options == {"anon": True}
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["package_storage_options.secret=[hidden"])
    assert "hidden" not in str(caught.value)


def test_a_service_and_its_replicas(shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experts = [{"package": shared.package}, {"package": FILE, "name": "from-a-file"}]
    config = ServeConfig.from_options(
        {"experts": experts, "base_model": shared.base, "storage_options": shared.options, "device": "cpu"}
    )
    (group,) = plan_service(config).groups
    assert "secret" not in repr(group.job)
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "another node"))
    for expert in group.job.experts:
        assert open_staged(expert, group.job.cache_dir, group.job.storage_options).label == "expert-sql@0.1.0"
    assert (local_base_model(group.job.base_place, None, group.job.storage_options) / "config.json").is_file()


def test_commands(shared: Shared) -> None:
    endpoint = shared.options["client_kwargs"]["endpoint_url"]
    given = ["key=test", "secret=test", f"client_kwargs.endpoint_url={endpoint}"]
    options = [word for item in given for word in ("--storage-option", item)]
    for command in (
        ["inspect", shared.package],
        ["verify", FILE],
        ["stage", FILE, "--to", "s3://bucket/second-store"],
        ["generate", shared.package, "List all users.", "--base-model", shared.base, "--max-tokens", "2"],
    ):
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, (command, done.output)
    refused = CliRunner().invoke(app, ["inspect", FILE, "--storage-option", "anon"])
    assert refused.exit_code == 2
    assert "is not KEY=VALUE" in refused.output
