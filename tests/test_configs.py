"""The example configurations: each is valid by its own schema, and none holds a secret."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from pipeline.batch.config_file import load_config

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs"
JOBS = ["batch.yaml", "demo.yaml", "local.yaml", "gpus.yaml", "spot.yaml", "s3.yaml", "openai-batch.yaml"]
RAYJOB, LAUNCHER = CONFIGS / "kubernetes" / "rayjob.yaml", CONFIGS / "cluster" / "aws.yaml"
ENTRYPOINT = re.compile(r"python (jobs/\w+\.py) --config (configs/\w+\.yaml)((?: \w+=\w+)*)")

SECRET_KEY = re.compile(
    r"(^|[_-])(secret|password|passwd|token|api_?key|access_key(_id)?|private_key|credentials?)$", re.IGNORECASE
)
SECRET_TEXTS = {
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
    "an OpenAI key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a password in a URL": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ"),
}

# What the manifest may say, field by field, as far as it says it; from KubeRay's API reference, version 1.5:
# https://ray-project.github.io/kuberay/reference/api/
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {name: {**_STRINGS, "required": ["cpu", "memory"]} for name in ("requests", "limits")},
}
_CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources"],
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string", "pattern": r"^[\w./-]+:[\w.-]+$"},
        "resources": _RESOURCES,
        "env": {"type": "array", "items": {"required": ["name"], "properties": {"value": {"type": "string"}}}},
        "volumeMounts": {"type": "array", "items": {"required": ["name", "mountPath"]}},
    },
}
_TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "required": ["containers"],
            "properties": {"containers": {"type": "array", "minItems": 1, "items": _CONTAINER}},
        }
    },
}
_HEAD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayStartParams", "template"],
    "properties": {"serviceType": {}, "rayStartParams": _STRINGS, "template": _TEMPLATE},
}
_WORKERS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["groupName", "rayStartParams", "template", "minReplicas", "maxReplicas"],
    "properties": {
        "groupName": {"type": "string"},
        **{name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")},
        "rayStartParams": _STRINGS,
        "template": _TEMPLATE,
    },
}
_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"properties": {"mode": {"enum": ["disabled", "token"]}}},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "additionalProperties": False,
            "properties": {"version": {"enum": ["v1", "v2"]}, "idleTimeoutSeconds": {"type": "integer"}},
        },
        "headGroupSpec": _HEAD,
        "workerGroupSpecs": {"type": "array", "minItems": 1, "items": _WORKERS},
    },
}
RAYJOB_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"required": ["name"], "properties": {"name": {"pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"}}},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["entrypoint", "rayClusterSpec"],
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
                "runtimeEnvYAML": {"type": "string"},
                "rayClusterSpec": _CLUSTER,
            },
        },
    },
}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def secrets_in(path: Path) -> list[str]:
    """What looks like a secret in a file: a value under a key that names one, or a text that has the form of one."""
    text = path.read_text()
    found = [f"{path.name}: {name}" for name, pattern in SECRET_TEXTS.items() if pattern.search(text)]
    # commented lines are examples that a person fills in: they are looked at, too
    uncommented = re.sub(r"^(\s*)#(?=\w+:)", r"\1", text, flags=re.MULTILINE)
    for key, value in re.findall(r"^\s*([\w-]+):[ \t]*([^\s#{\[][^#\n]*)", uncommented, flags=re.MULTILINE):
        if SECRET_KEY.search(key):
            found.append(f"{path.name}: {key}: {value}")
    return found


def all_files() -> Iterator[Path]:
    return (path for path in sorted(CONFIGS.rglob("*")) if path.is_file())


def entrypoints(text: str) -> list[tuple[str, str, list[str]]]:
    return [(job, config, overrides.split()) for job, config, overrides in ENTRYPOINT.findall(text)]


@pytest.mark.parametrize("name", JOBS)
def test_every_job_loads(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.output
    assert len((CONFIGS / name).read_text().splitlines()) > 2 * len(read(CONFIGS / name)) - 5, "commented, all of them"


def test_every_configuration_is_known_to_these_tests() -> None:
    known = {
        *(CONFIGS / name for name in JOBS),
        CONFIGS / "serve.yaml",
        CONFIGS / "grafana" / "serving.json",
        RAYJOB,
        LAUNCHER,
    }
    assert {path for path in all_files() if path.parent == CONFIGS or path in known} == known


@pytest.mark.parametrize("path", [*all_files()], ids=lambda path: path.name)
def test_what_a_file_tells_to_run_is_there(path: Path) -> None:
    for job, config, overrides in entrypoints(path.read_text()):
        assert (PROJECT / job).is_file()
        load_config(PROJECT / config, overrides)


@pytest.mark.parametrize("path", [*all_files()], ids=lambda path: path.name)
def test_no_secrets(path: Path) -> None:
    assert secrets_in(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "aws_secret_access_key: abc",
        "  password: hunter2",
        "#api_key: abc",
        "  #token: abc",
        "key: AKIAABCDEFGHIJKLMNOP",
        "output: s3://user:pass@bucket/",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_would_be_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"dataset: a\n{line}\n")
    assert secrets_in(path) != []


def test_the_rayjob_is_one() -> None:
    job = read(RAYJOB)
    jsonschema.validate(job, RAYJOB_SCHEMA)
    spec = job["spec"]
    ((script, config, overrides),) = entrypoints(spec["entrypoint"])
    assert script == "jobs/batch.py"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert load_config(PROJECT / config, overrides).num_workers == group["maxReplicas"]
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__, "the version that is tested"
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "the head answers nothing"
    pods = [head["template"]["spec"], group["template"]["spec"]]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1
    for pod in pods:
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", ())}
        assert mounts == volumes
        assert pod["serviceAccountName"]


def test_the_cluster_is_one() -> None:
    cluster = read(LAUNCHER)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert types["head"]["resources"]["CPU"] == 0, "the head answers nothing"
    spot = load_config(CONFIGS / "spot.yaml")
    assert types["gpu"]["max_workers"] == cluster["max_workers"] == spot.num_workers
    assert types["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    starts = " ".join([*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]])
    assert "--dashboard-host=127.0.0.1" in starts
    assert starts.count("RAY_AUTH_MODE=token") == 2


@pytest.mark.parametrize("field", ["head_node_typ", "min_workers"])
def test_a_field_that_the_launcher_does_not_know_would_be_found(field: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match=field):
        jsonschema.validate({**read(LAUNCHER), field: 1}, schema)
