"""Builders of tiny packages and of archives byte by byte."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

BLOCK = 512
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "base_model_name_or_path": "/home/someone/models/tiny",
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": True,
    "use_rslora": False,
}


def manifest(**changes: Any) -> dict[str, Any]:
    """A manifest of schema 2.0 that is valid and complete."""
    fields: dict[str, Any] = {
        "name": "expert-test",
        "version": "0.1.0",
        "schema_version": "2.0",
        "description": "Answers tests. Größe: ñ.",
        "author": "tests",
        "license": "apache-2.0",
        "base_models": [
            {
                "name": "Tiny-1.5B",
                "sha256": "",
                "prompt_template": "chatml",
                "adapters": [
                    {"type": "dora", "target_modules": ["q_proj", "v_proj"], "r": 4, "alpha": 8, "size_bytes": 0}
                ],
            }
        ],
        "soft_prompts": [],
        "capabilities": ["database:sql"],
        "routing": {"keywords": ["sql"], "priority": 0.8},
        "constraints": {"max_chain": 10, "load_order": 6, "incompatible_with": [], "requires": []},
        "training": {"dataset": {}, "config": {}, "decoding": {"temperature": 0.7, "top_k": 20, "min_p": 0}},
        "quality_metrics": {
            "benchmark_score": 1.0,
            "base_model_score": 1.0,
            "improvement_percent": 0.0,
            "win_rate_vs_base": 0.5,
            "test_queries": 1,
            "checkpoint": "final",
            "training_steps": 1,
            "test_date": "2025-11-12",
        },
        "perf": {"latency_ms_overhead": 3.0},
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(seed: int = 0) -> dict[str, Any]:
    """The tensors of a tiny DoRA adapter."""
    draw = np.random.default_rng(seed)
    return {
        f"{PREFIX}.lora_A.weight": draw.normal(size=(4, 8)).astype(np.float32),
        f"{PREFIX}.lora_B.weight": draw.normal(size=(8, 4)).astype(np.float32),
        f"{PREFIX}.lora_magnitude_vector.weight": np.ones(8, np.float32),
    }


def weights(seed: int = 0, *, dora: bool = True, **changes: Any) -> bytes:
    """A tiny adapter as safetensors; keywords replace, add or drop (None) the tensors of one module's parts."""
    found = tensors(seed) | {f"{PREFIX}.{name}.weight": value for name, value in changes.items()}
    if not dora:
        del found[f"{PREFIX}.lora_magnitude_vector.weight"]
    return bytes(save({name: value for name, value in found.items() if value is not None}))


def expert_files(**changes: bytes | None) -> dict[str, bytes]:
    """The files of a valid package by path; a keyword `a__b` stands for `a.b`, None leaves a file out."""
    files: dict[str, bytes | None] = {
        "manifest.json": json.dumps(manifest(), indent=2, ensure_ascii=False).encode(),
        "adapter_config.json": json.dumps(ADAPTER_CONFIG).encode(),
        "adapter_model.safetensors": weights(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "grammar.gbnf": b'root ::= "a"\n',
        "training_args.bin": b"\x80\x04 a pickle that nobody opens",
        "tests/cases.json": b"[]",
    }
    files |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in files.items() if value is not None}


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by path below `root`."""
    for name, data in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return root


def header(
    name: bytes,
    size: int = 0,
    kind: bytes = tarfile.REGTYPE,
    *,
    link: bytes = b"",
    mode: bytes = b"0000644\0",
    size_field: bytes | None = None,
) -> bytes:
    """One ustar header; `size_field` replaces the twelve bytes of the size."""
    block = bytearray(BLOCK)
    block[0 : min(len(name), 100)] = name[:100]
    block[100:108] = mode
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = size_field if size_field is not None else b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes | str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any) -> bytes:
    """A header and its bytes."""
    name = name.encode() if isinstance(name, str) else name
    return header(name, len(data), kind, **more) + padded(data)


def pax(records: Iterable[tuple[bytes, bytes]], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header; it applies to the member after it."""
    data = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(str(length)) + len(key) + len(value) + 3 != length:
            length = len(str(length)) + len(key) + len(value) + 3
        data += b"%d %s=%s\n" % (length, key, value)
    return member(b"pax", data, kind)


def good_members(files: Mapping[str, bytes] | None = None) -> bytes:
    """The members of a valid package."""
    return b"".join(member(name, data) for name, data in (files or expert_files()).items())


def tar(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * BLOCK)


def archive(*members: bytes) -> bytes:
    """A gzip'd tar of raw members."""
    return gzip.compress(tar(*members), 6, mtime=0)


def write_archive(path: Path, files: Mapping[str, bytes] | None = None) -> Path:
    """A valid `.expert` file, as `tarfile` writes it."""
    with tarfile.open(path, "w:gz") as packed:
        for name, data in (files or expert_files()).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
    return path
