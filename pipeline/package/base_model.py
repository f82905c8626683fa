"""Find the base model of an expert on this machine, and say which one it is."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.errors import BaseModelError, LoadError
from pipeline.package.cache import default_cache_dir
from pipeline.package.integrity import file_sha256
from pipeline.package.manifest import BaseModelSpec
from pipeline.package.staged import localise, parse_reference

MODELS_DIR_VARIABLE = "EXPERT_MODELS_DIR"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
)
WEIGHTS_SUFFIX = ".safetensors"
_DIGESTED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_QWEN = re.compile(r"Qwen[A-Za-z0-9._-]{0,91}")


@dataclass(frozen=True)
class FoundBaseModel:
    """A base model on this machine, and what any machine finds it by.

    Args:
        path: Its directory here.
        place: The URL of a staged one (`<store>/models/<digest>`), else the same directory.
    """

    path: Path
    place: str


def resolve_base_model(
    spec: BaseModelSpec,
    *,
    base_model: str | os.PathLike[str] | None = None,
    models: Mapping[str, str] | None = None,
    package: str = "",
    cache_dir: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """The directory of an expert's base model; as `find_base_model`, which says more."""
    return find_base_model(
        spec,
        base_model=base_model,
        models=models,
        package=package,
        cache_dir=cache_dir,
        storage_options=storage_options,
    ).path


def find_base_model(
    spec: BaseModelSpec,
    *,
    base_model: str | os.PathLike[str] | None = None,
    models: Mapping[str, str] | None = None,
    package: str = "",
    cache_dir: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> FoundBaseModel:
    """Find an expert's base model.

    Tried in this order: `base_model`; `models`; `$EXPERT_MODELS_DIR/<last part of the name>`; a directory of exactly
    the manifest's name; the Hugging Face cache of this machine. What a person names (`base_model`, `models`) is used or
    refused, never passed over, and downloaded from the Hugging Face Hub where it is an id; a manifest, which may be a
    stranger's, downloads nothing.

    Args:
        spec: The base model as the manifest describes it.
        base_model: A directory, what `expert stage --base-model` printed, or a Hugging Face id such as
            `Qwen/Qwen3-0.6B`.
        models: The same, by the manifest's name of the base model or the last part of it.
        package: The package, as messages name it.
        cache_dir: Where a staged one is copied to; `$EXPERT_CACHE_DIR` or `~/.cache/expert` when not given.
        storage_options: Passed to the file system of a staged one, e.g. an endpoint.

    Returns:
        A directory with `config.json` and `*.safetensors`. When the manifest gives a checksum, it has been compared.

    Raises:
        BaseModelError: It was not found (`details` lists each place and why it failed), or is another model.
    """
    tried: list[str] = []
    for origin, place, is_named in _candidates(spec, base_model, models or {}):
        found = _try(origin, place, is_named, tried, cache_dir or default_cache_dir(), storage_options)
        if found is not None:
            _check(spec, found.path, package)
            return found
        if is_named:
            break
    if not os.environ.get(MODELS_DIR_VARIABLE):
        tried.append(f"${MODELS_DIR_VARIABLE} is not set")
    of = f" of {package}" if package else ""
    hub_id = _hub_id(spec.name)
    hint = (
        f"Name its directory with base_model= (--base-model), or set {MODELS_DIR_VARIABLE} to a directory that holds "
        f"{spec.short_name!r}."
    )
    if hub_id is not None and base_model is None:
        hint += f" To download it: base_model={hub_id!r} (--base-model {hub_id})."
    raise BaseModelError(f"the base model {spec.name!r}{of} was not found", hint=hint, details=tried)


def local_base_model(
    place: str,
    cache_dir: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    weights: bool = True,
) -> Path:
    """The directory on this machine of what `find_base_model` found on another.

    Args:
        place: Its `place`.
        cache_dir: Where a staged one is copied to, once.
        storage_options: Passed to its file system.
        weights: Whether they are needed; without them a staged one is brought sooner.

    Raises:
        LoadError: It is staged, and cannot be brought here.
    """
    reference = parse_reference(place)
    if reference is None:
        return Path(place)
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return localise(
        reference, cache, storage_options=storage_options, without=() if weights else (WEIGHTS_SUFFIX,)
    ).root


def _candidates(
    spec: BaseModelSpec, base_model: str | os.PathLike[str] | None, models: Mapping[str, str]
) -> Iterable[tuple[str, str, bool]]:
    """(where the name comes from, the name, whether a person gave it), in order."""
    if base_model is not None:
        yield "base_model=", os.fspath(base_model), True
    for key in (spec.name, spec.short_name):
        if key in models:
            yield f"models[{key!r}]", os.fspath(models[key]), True
    models_dir = os.environ.get(MODELS_DIR_VARIABLE)
    if models_dir and spec.short_name not in {".", ".."}:
        yield f"${MODELS_DIR_VARIABLE}", str(Path(models_dir).expanduser() / spec.short_name), False
    yield "the manifest's name", spec.name, False


def _try(
    origin: str,
    place: str,
    is_named: bool,
    tried: list[str],
    cache_dir: Path,
    storage_options: Mapping[str, Any] | None,
) -> FoundBaseModel | None:
    reference = parse_reference(place) if is_named else None
    if reference is not None and reference.kind == "models":
        try:
            return FoundBaseModel(localise(reference, cache_dir, storage_options=storage_options).root, reference.url)
        except LoadError as problem:
            tried.append(f"{origin} {place}: {problem.message}")
            return None
    folder = Path(place).expanduser() if is_named else Path(place)
    reason = (None if is_named else _why_not_followed(place)) or why_no_model(folder)
    if reason is None:
        return FoundBaseModel(folder, str(folder.resolve()))
    tried.append(f"{origin} {place}: {reason}")
    hub_id = _hub_id(place)
    if hub_id is None or folder.is_dir():
        return None
    try:
        snapshot = Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED, local_files_only=not is_named))
    except LocalEntryNotFoundError:
        why = "not in the cache of this machine" + (
            ", and no hub is reached" if is_named else "; nothing is downloaded"
        )
        tried.append(f"{origin} Hugging Face {hub_id}: {why}")
        return None
    except Exception as problem:  # noqa: BLE001  # the client also lets errors of its network library through
        first = next(iter(str(problem).splitlines()), "")
        tried.append(f"{origin} Hugging Face {hub_id}: {type(problem).__name__}: {first}")
        return None
    reason = why_no_model(snapshot)
    if reason is not None:
        tried.append(f"{origin} Hugging Face {hub_id}: {reason}")
        return None
    return FoundBaseModel(snapshot, str(snapshot.resolve()))


def _why_not_followed(name: str) -> str | None:
    """Why a name that a stranger's manifest gives is not looked up on this machine; None where it may be."""
    if "://" in name:
        return "a URL, which is not followed"
    if ".." in re.split(r"[/\\]", name):
        return "leads out of where it stands, and is not followed"
    return None


def model_files(folder: Path) -> list[Path]:
    """What of a model's directory decides its answers: configurations, safetensors and tokenizer, by name."""
    found = {path for pattern in _DOWNLOADED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: path.name)


def why_no_model(folder: Path) -> str | None:
    """Why a directory is no model; None when it is one."""
    if not folder.is_dir():
        return "a file, not a directory" if folder.is_file() else "no such directory"
    if not (folder / "config.json").is_file():
        return "holds no config.json"
    if not _weights(folder):
        return "holds no *.safetensors"
    return None


def _hub_id(name: str) -> str | None:
    if _QWEN.fullmatch(name):
        return f"Qwen/{name}"
    return name if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name else None


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _check(spec: BaseModelSpec, folder: Path, package: str) -> None:
    if spec.sha256 is None:
        return
    actual = weights_digest(folder)
    if actual != spec.sha256:
        raise BaseModelError(
            f"{folder} is not the base model that {package or 'the expert'} was made for",
            hint=f"Use the {spec.name!r} that the expert was trained over.",
            details=[f"the manifest says sha256 {spec.sha256}", f"the weights have  sha256 {actual}"],
        )


def weights_digest(folder: Path) -> str:
    """One sha256 for the weights of a model directory.

    Returns:
        The sha256 of the only safetensors file; of several, the sha256 over their sorted `name:sha256` lines.

    Raises:
        BaseModelError: There is no safetensors file.
    """
    weights = _weights(folder)
    if not weights:
        raise BaseModelError(f"{folder} holds no *.safetensors", hint="Name the directory of a model.")
    if len(weights) == 1:
        return file_sha256(weights[0])
    lines = "".join(sorted(f"{path.name}:{file_sha256(path)}\n" for path in weights))
    return hashlib.sha256(lines.encode()).hexdigest()


def model_digest(folder: Path) -> str:
    """One sha256 for all that decides a model's answers: configs, weights and tokenizer files.

    Returns:
        The sha256 over the sorted `name:sha256` lines of those that are there.

    Raises:
        BaseModelError: There is no safetensors file.
    """
    weights = _weights(folder)
    if not weights:
        raise BaseModelError(f"{folder} holds no *.safetensors", hint="Name the directory of a model.")
    others = [folder / name for name in _DIGESTED if (folder / name).is_file()]
    lines = "".join(sorted(f"{path.name}:{file_sha256(path)}\n" for path in (*weights, *others)))
    return hashlib.sha256(lines.encode()).hexdigest()
