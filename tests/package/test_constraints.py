"""Ranges of versions, and experts that do not go together."""

import json
from typing import Any

import pytest

from pipeline.errors import ConfigError, ManifestError
from pipeline.package import check_together
from pipeline.package.manifest import Manifest
from pipeline.package.manifest_reader import read_manifest
from pipeline.package.version_ranges import parse_pattern
from pipeline.package.versions import newest
from tests.package.expert_fixtures import manifest


def read(name: str, version: str = "1.2.3", **constraints: Any) -> Manifest:
    data = json.dumps(manifest(name=name, version=version, constraints=constraints)).encode()
    return read_manifest(data, source="x").manifest


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("expert-a", "0.0.1", None),
        ("expert-a@*", "9.9.9", None),
        ("expert-a@1.2.3", "1.2.3", "1.2.4"),
        ("expert-a@1.2.x", "1.2.9", "1.3.0"),
        ("expert-a@>=1.0,<2", "1.9.0", "2.0.0"),
        ("expert-a@>=1.0 <2", "1.9.0", "2.0.0"),
        ("expert-a@^1.2.0", "1.9.0", "2.0.0"),
        ("expert-a@^0.2.0", "0.2.9", "0.3.0"),
        ("expert-a@~1.2", "1.2.9", "1.3.0"),
        ("expert-a@!=1.0.0", "1.0.1", "1.0.0"),
        ("expert-a@>=1.0.0-rc.1", "1.0.0-rc.2", "0.9.0"),
    ],
)
def test_ranges(pattern: str, inside: str, outside: str | None) -> None:
    assert parse_pattern(pattern).matches("expert-a", inside)
    assert not parse_pattern(pattern).matches("expert-b", inside)
    assert outside is None or not parse_pattern(pattern).matches("expert-a", outside)


@pytest.mark.parametrize("pattern", ["expert-a@@", "expert-a@one", "Expert A", "", "expert-a@>"])
def test_what_is_no_range_is_refused_with_its_place(pattern: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read("expert-b", requires=[pattern])
    assert "constraints.requires[0]: " in caught.value.details[0]


def test_experts_that_do_not_go_together_are_named() -> None:
    json_expert = read("expert-json", requires=["expert-sql@>=2"], incompatible_with=["expert-neo*"])
    check_together([json_expert])
    check_together([json_expert, read("expert-sql", "2.1.0")])
    with pytest.raises(ConfigError) as caught:
        check_together([json_expert, read("expert-sql", "1.9.0"), read("expert-neo4j")])
    assert caught.value.details == (
        "expert-json@1.2.3 requires expert-sql@>=2",
        "expert-json@1.2.3 is incompatible with expert-neo4j@1.2.3 (expert-neo*)",
    )


def test_versions_have_an_order() -> None:
    ordered = ["0.9.0", "0.10.0-alpha", "0.10.0-alpha.1", "0.10.0-alpha.beta", "0.10.0-rc.2", "0.10.0-rc.11", "0.10.0"]
    for at, version in enumerate(ordered):
        assert newest(reversed(ordered[: at + 1])) == version
    assert newest(["1.0.0+a", "1.0.0+b"]) == "1.0.0+a"
    assert newest([]) is None
