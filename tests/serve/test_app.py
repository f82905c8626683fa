"""From a configuration to a plan: which experts share replicas, and what is refused before anything starts."""

import shutil
from pathlib import Path

import pytest

from pipeline import demo
from pipeline.errors import BaseModelError, ConfigError, IntegrityError, PackageNotFoundError, TrustError
from pipeline.package import PackageStore
from pipeline.serve.app import merge_bases, plan_service
from pipeline.serve.config import ServeConfig
from pipeline.serve.replica import StagedExpert, open_staged
from tests import tiny


def config(*packages: object, **options: object) -> ServeConfig:
    return ServeConfig.from_options({"experts": [{"package": str(one)} for one in packages], **options})


def test_experts_over_one_base_share_their_replicas() -> None:
    plan = plan_service(config(*map(demo.package, demo.TASKS), base_model=demo.BASE_MODEL, kv_cache_bytes=1 << 20))
    (group,) = plan.groups
    assert [expert.name for expert in group.job.experts] == ["expert-sql", "expert-cypher", "expert-json"]
    assert group.job.base_place == str(demo.BASE_MODEL.resolve())
    assert group.job.kv_cache_bytes == 1 << 20
    cards = {card.name: card for card in plan.cards}
    assert cards["expert-sql"].dialects == ("postgres",)
    assert cards["expert-sql"].kind == "dora"
    assert cards["expert-sql"].takes_schema
    assert [cards[expert.name].digest for expert in group.job.experts] == [e.sha256 for e in group.job.experts]


def test_what_is_staged_reaches_replicas_by_its_url(tmp_path: Path) -> None:
    store = PackageStore(tmp_path / "store")
    staged, base = store.stage(demo.package("sql")), store.stage_base_model(demo.BASE_MODEL)
    (group,) = plan_service(config(staged.url, base_model=base.url)).groups
    assert group.job.experts[0].package == staged.url
    assert group.job.base_place == base.url
    assert group.name == f"ExpertReplica-{base.digest[:40]}"
    assert open_staged(group.job.experts[0], str(tmp_path / "node")).digest == staged.digest


def test_trust_is_asked_of_every_package() -> None:
    with pytest.raises(TrustError, match="trust is 'signed'"):
        plan_service(config(demo.package("sql"), base_model=demo.BASE_MODEL, trust="signed"))


def test_each_base_has_replicas_of_its_own(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path, vocab_size=len(tiny.tokenizer()))
    lora, _ = tiny.make_package("lora", base, tmp_path)
    models = {demo.BASE_MODEL.name: str(demo.BASE_MODEL), tiny.BASE_NAME: str(base)}
    plan = plan_service(config(demo.package("sql"), lora, demo.package("json"), models=models))
    assert [[expert.name for expert in group.job.experts] for group in plan.groups] == [
        ["expert-sql", "expert-json"],
        ["expert-lora"],
    ]
    assert len({group.name for group in plan.groups}) == 2
    assert {group.job.num_sharing for group in plan.groups} == {2}


def test_one_base_at_two_places_is_one_base(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path, vocab_size=len(tiny.tokenizer()))
    copied = tmp_path / "copy"
    shutil.copytree(base, copied)
    staged = {base: [StagedExpert("a", "a", "1")], copied: [StagedExpert("b", "b", "2")]}
    assert merge_bases(staged) == {base: [StagedExpert("a", "a", "1"), StagedExpert("b", "b", "2")]}
    config_file = copied / "config.json"
    config_file.write_text(config_file.read_text() + " ")
    assert merge_bases(staged) == staged


def test_two_experts_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two experts are named expert-sql"):
        plan_service(config(demo.package("sql"), demo.package("sql"), base_model=demo.BASE_MODEL))


def test_a_package_that_is_missing_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError):
        plan_service(config(tmp_path / "nothing.expert"))
    with pytest.raises(BaseModelError):
        plan_service(config(demo.package("sql"), base_model=tmp_path))


def test_a_replica_refuses_a_package_that_was_exchanged() -> None:
    planned = StagedExpert("sql", str(demo.package("sql")), "0" * 64)
    with pytest.raises(IntegrityError, match="not the package the service was planned with"):
        open_staged(planned, None)
