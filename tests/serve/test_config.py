"""The description of a service: what is wrong in it is named, and the file in the project lists all there is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from pipeline.errors import ConfigError
from pipeline.serve.config import ExpertConfig, ReplicasConfig, ServeConfig, is_loopback
from pipeline.serve.keys import KeysConfig, key_hash
from pipeline.serve.limits import LimitsConfig

FILE = Path(__file__).parents[2] / "configs" / "serve.yaml"
EXPERTS: dict[str, Any] = {"experts": [{"package": "a.expert"}]}


def test_a_package_is_all_it_needs() -> None:
    config = ServeConfig.from_options(EXPERTS)
    assert config.host == "127.0.0.1"
    assert config.replicas == ReplicasConfig()
    assert ServeConfig.from_options({**EXPERTS, "limits": None, "keys": None, "replicas": None}) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "experts: missing"),
        ({"experts": []}, "experts: expected a non-empty list of experts"),
        ({"experts": "a.expert"}, "experts: expected a non-empty list of experts"),
        ({"experts": [{"package": ""}]}, "experts[0].package: expected a path or URL of a package"),
        ({"experts": [{"package": "a", "nam": "b"}]}, "experts[0].nam: unknown key; did you mean `name`?"),
        ({"experts": [{"package": "a", "name": "a b"}]}, "experts[0].name: expected at most 128 letters"),
        ({"experts": [{"package": "a", "name": "../b"}]}, "experts[0].name: expected at most 128 letters"),
        ({"experts": [{"package": "a", "pin": "yes"}]}, "experts[0].pin: expected true or false"),
        ({"experts": [{"package": "a", "name": "x"}, {"package": "b", "name": "x"}]}, "two experts are named x"),
        ({"experts": [{"package": "a", "name": "auto"}]}, "which means any of them"),
        ({**EXPERTS, "port": 70000}, "port: expected a whole number from 0 to 65535"),
        ({**EXPERTS, "dtype": "int8"}, 'dtype: expected "float32", "bfloat16" or "float16"'),
        ({**EXPERTS, "replicas": {"min": 3}}, "replicas: min is 3 and max is 1"),
        ({**EXPERTS, "replicas": {"num_cpus": 1.5}}, "replicas.num_cpus: expected a number from 0 to 1"),
        ({**EXPERTS, "limits": {"max_token": 3}}, "limits.max_token: unknown key; did you mean `max_tokens`?"),
        ({**EXPERTS, "keys": {"hashes": {"a": "secret"}}}, "keys.hashes.a: expected the sha256 of an API key"),
        ({**EXPERTS, "kv_cache": 3}, "kv_cache: unknown key; did you mean `kv_cache_bytes`?"),
        (
            {"experts": [{"package": "a", "pin": True}, {"package": "b"}], "max_resident_experts": 1},
            "leaves no room for the others",
        ),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_options(options)
    assert said in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_options({"experts": [{"package": 3}], "port": "x", "hots": 1})
    assert len(caught.value.details) == 3


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "127.0.0.1.example.org"])  # noqa: S104
def test_without_keys_only_this_machine_may_ask(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERT_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="lets other machines ask"):
        ServeConfig.from_options({**EXPERTS, "host": host})
    keys = {"hashes": {"someone": key_hash("secret")}}
    assert ServeConfig.from_options({**EXPERTS, "host": host, "keys": keys}).host == host
    monkeypatch.setenv("EXPERT_API_KEYS", f"someone={key_hash('secret')}")
    assert ServeConfig.from_options({**EXPERTS, "host": host}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_loopback_is_this_machine(host: str) -> None:
    assert is_loopback(host)


def test_the_file_in_the_project_lists_every_key_with_its_default() -> None:
    text = FILE.read_text()
    given = yaml.safe_load(text)
    ServeDeploySchema.model_validate(given)  # an ordinary Serve config file
    args = given["applications"][0]["args"]
    config = ServeConfig.from_options(args)
    assert config.host == given["http_options"]["host"]
    assert config.port == given["http_options"]["port"]
    sections: dict[str, type[BaseModel]] = {"replicas": ReplicasConfig, "limits": LimitsConfig, "keys": KeysConfig}
    for model in (ServeConfig, ExpertConfig, *sections.values()):
        for name in model.model_fields:
            assert re.search(rf"(?m)^\s*(- )?#?{name}:", text), f"{model.__name__}.{name} is not in {FILE.name}"
    plain = ServeConfig.from_options({"experts": args["experts"]})
    assert config == plain, "what is not behind a # is the default"
