"""Hostile and broken content of a whole archive, 34 to 70 of the list: how it is made, and what must be said of it."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.package.expert_fixtures import (
    ADAPTER_CONFIG,
    PREFIX,
    expert_files,
    manifest,
    tensors,
    weights,
)


def files(**changes: Any) -> Callable[[], dict[str, bytes]]:
    """A package with some files replaced; values that are not bytes are written as JSON."""

    def build() -> dict[str, bytes]:
        plain = {
            name: value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
            for name, value in changes.items()
        }
        return expert_files(**plain)

    return build


def manifest_text(old: str, new: str) -> Callable[[], dict[str, bytes]]:
    text = json.dumps(manifest())
    if old not in text:
        raise ValueError(old)
    return files(manifest__json=text.replace(old, new, 1).encode())


def one_base(**changes: Any) -> dict[str, Any]:
    return manifest(base_models=[{"name": "Tiny", "adapters": [{"type": "dora"} | changes]}])


def tensor_file(header_: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header_ if isinstance(header_, bytes) else json.dumps(header_).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def safetensors(**changes: Any) -> Callable[[], dict[str, bytes]]:
    return files(adapter_model__safetensors=weights(**changes))


def of_method(config: dict[str, Any], **shapes: tuple[int, ...]) -> Callable[[], dict[str, bytes]]:
    """An adapter of another method, with these parts for one module."""
    return files(
        adapter_config__json=config | {"target_modules": ["q_proj"]},
        adapter_model__safetensors=bytes(
            save({f"{PREFIX}.{part}": np.zeros(shape, "f4") for part, shape in shapes.items()})
        ),
    )


def no_number(value: float) -> Callable[[], dict[str, bytes]]:
    down = tensors()[f"{PREFIX}.lora_A.weight"].copy()
    down[1, 2] = value
    return safetensors(lora_A=down)


def soft_prompt(data: bytes, name: str = "p.pt") -> Callable[[], dict[str, bytes]]:
    spec = manifest(soft_prompts=[{"name": "p", "path": name, "tokens": 2}])
    return lambda: expert_files(manifest__json=json.dumps(spec).encode()) | {name: data}


def pickled(program: bytes) -> bytes:
    """A file of PyTorch's form whose pickle is a program of this text."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("p/data.pkl", program)
    return buffer.getvalue()


def tokenizer(**parts: Any) -> bytes:
    return json.dumps(parts).encode()


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = b'{"name": ' + b"[" * 100_000
NAN = float("nan")
PACKAGES: list[tuple[str, Callable[[], dict[str, bytes]], str, str]] = [
    ("32 no manifest", files(manifest__json=None), "ManifestError", "holds no manifest.json at its root"),
    ("34 missing field", files(manifest__json=manifest(name=...)), "ManifestError", "name: Field required"),
    (
        "35 true for an int",
        files(manifest__json=one_base(r=True)),
        "ManifestError",
        "r: Input should be a valid integer",
    ),
    ("36 NaN", manifest_text("0.7", "NaN"), "ManifestError", "NaN is not a JSON number"),
    ("36 Infinity", manifest_text("0.7", "-Infinity"), "ManifestError", "Infinity is not a JSON number"),
    ("37 10^400", manifest_text("0.7", "1" + "0" * 400), "ManifestError", "does not fit 64 bits"),
    ("37 1e999", manifest_text("0.7", "1e999"), "ManifestError", "does not fit 64 bits"),
    ("38 100,000 levels", files(manifest__json=DEEP), "ManifestError", "nested deeper than 64 levels"),
    ("39 byte order mark", lambda: expert_files(manifest__json=b"\xef\xbb\xbf{}"), "ManifestError", "byte order mark"),
    ("39 UTF-16", lambda: expert_files(manifest__json="{}".encode("utf-16")), "ManifestError", "UTF-16"),
    ("40 duplicate key", manifest_text('"name"', '"name": "expert-x", "name"'), "ManifestError", "occurs twice"),
    ("41 array at the root", files(manifest__json=b"[]"), "ManifestError", "not an object"),
    ("42 unknown schema", files(manifest__json=manifest(schema_version="3.0")), "ManifestError", "schema_version"),
    (
        "44 path not in the archive",
        files(manifest__json=manifest(soft_prompts=[{"name": "p", "path": "gone.pt", "tokens": 4}])),
        "ManifestError",
        "'gone.pt' is not in the package",
    ),
    ("46 sha256 wrong", files(manifest__json=one_base(sha256="0" * 64)), "IntegrityError", "differs from its checksum"),
    ("46 sha256 is none", files(manifest__json=one_base(sha256="xyz")), "ManifestError", "64 hexadecimal digits"),
    ("47 list without signature", files(integrity__json={}), "TrustError", "without signature.sig"),
    ("47 signature without list", files(signature__sig=b"ab" * 64 + b"\n"), "TrustError", "says what was signed"),
    (
        "49 name with a slash",
        files(manifest__json=manifest(name="expert-a/b")),
        "ManifestError",
        "name: Input should match",
    ),
    ("49 name with ..", files(manifest__json=manifest(name="expert-..")), "ManifestError", "name: Input should match"),
    (
        "49 name with a newline",
        files(manifest__json=manifest(name="expert-a\n")),
        "ManifestError",
        "name: Input should",
    ),
    ("34 constraint", files(manifest__json=manifest(constraints={"requires": ["a@@"]})), "ManifestError", "no range"),
    (
        "50 header of length 0",
        files(adapter_model__safetensors=tensor_file({}, length=0)),
        "AdapterError",
        "claims 0 bytes",
    ),
    (
        "50 header beyond",
        files(adapter_model__safetensors=tensor_file({}, length=9999)),
        "AdapterError",
        "claims 9,999",
    ),
    ("50 header 2^63", files(adapter_model__safetensors=tensor_file({}, length=2**63)), "AdapterError", "claims 9,223"),
    (
        "51 overlap",
        files(adapter_model__safetensors=tensor_file({"a": ONE, "b": ONE})),
        "AdapterError",
        "begins at byte 0",
    ),
    (
        "51 hole",
        files(adapter_model__safetensors=tensor_file({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12))),
        "AdapterError",
        "begins at byte 4",
    ),
    (
        "52 shape overflow",
        files(adapter_model__safetensors=tensor_file({"a": ONE | {"shape": [2**62, 2**62]}})),
        "AdapterError",
        "do not fit",
    ),
    (
        "53 duplicate tensor",
        files(adapter_model__safetensors=tensor_file(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2))),
        "AdapterError",
        "a name occurs twice",
    ),
    ("54 NaN", no_number(NAN), "AdapterError", "not finite"),
    ("54 infinity", no_number(float("-inf")), "AdapterError", "not finite"),
    (
        "54 half-precision infinity",
        safetensors(lora_A=np.full((4, 8), np.inf, np.float16)),
        "AdapterError",
        "not finite",
    ),
    ("55 rank", safetensors(lora_A=np.zeros((5, 8), "f4"), lora_B=np.zeros((8, 5), "f4")), "AdapterError", "rank 5"),
    ("55 two ranks", safetensors(lora_A=np.zeros((5, 8), "f4")), "AdapterError", "do not belong together"),
    ("55 integers", safetensors(lora_A=np.zeros((4, 8), "i4")), "AdapterError", "dtype I32"),
    (
        "55 shape of an ia3 vector",
        of_method({"peft_type": "IA3", "feedforward_modules": ["q_proj"]}, ia3_l=(8, 1)),
        "AdapterError",
        "ia3_l: shape [8, 1], adapter_config.json says [1, 8]",
    ),
    (
        "55 shape of a lokr factor",
        of_method({"peft_type": "LOKR", "r": 8}, lokr_w1=(2, 4), lokr_w2=(4, 2)),
        "AdapterError",
        "lokr_w1: shape [2, 4], adapter_config.json says [2, 2]",
    ),
    (
        "55 shape of adalora values",
        of_method({"peft_type": "ADALORA", "init_r": 4}, lora_A=(4, 8), lora_B=(8, 4), lora_E=(1, 4)),
        "AdapterError",
        "lora_E: shape [1, 4], adapter_config.json says [4, 1]",
    ),
    (
        "55 rank pattern of the wrong kind",
        of_method({"peft_type": "ADALORA", "rank_pattern": {"q_proj": 4}}, lora_A=(12, 8)),
        "AdapterError",
        "rank_pattern: Input should hold arrays",
    ),
    (
        "56 another base of an ia3 adapter",
        of_method({"peft_type": "IA3", "feedforward_modules": []}, ia3_l=(9, 1)),
        "AdapterError",
        "ia3_l: shape [9, 1], for the base model's [8, 8] it would be [8, 1]",
    ),
    (
        "56 another base",
        safetensors(lora_A=np.zeros((4, 16), "f4")),
        "AdapterError",
        "the adapter is for [8, 16], the base model has [8, 8]",
    ),
    ("57 missing key", safetensors(lora_B=None), "AdapterError", "lora_B: missing"),
    ("57 missing magnitude", safetensors(lora_magnitude_vector=None), "AdapterError", "lora_magnitude_vector: missing"),
    ("57 extra key", safetensors(other=np.zeros(2, "f4")), "AdapterError", "other.weight: not a tensor of a dora"),
    (
        "58 r = 10^9",
        files(adapter_config__json=ADAPTER_CONFIG | {"r": 10**9}),
        "AdapterError",
        "r: Input should be less",
    ),
    (
        "59 pickle instead of safetensors",
        files(adapter_model__safetensors=None, adapter_model__bin=b"\x80\x04"),
        "AdapterError",
        "a pickle",
    ),
    (
        "60 pattern of modules that runs away",
        files(adapter_config__json=ADAPTER_CONFIG | {"target_modules": r"(.*\..*)*_proj"}),
        "AdapterError",
        "target_modules: Input is a regular expression that could take time without end",
    ),
    (
        "60 pattern of ranks that runs away",
        files(adapter_config__json=ADAPTER_CONFIG | {"rank_pattern": {"(q|q_|_)+proj": 4}}),
        "AdapterError",
        "rank_pattern: Input is a regular expression that could take time without end",
    ),
    (
        "60 auto_mapping",
        files(
            adapter_config__json=ADAPTER_CONFIG | {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}
        ),
        "AdapterError",
        "auto_mapping: names code",
    ),
    (
        "60 megatron",
        files(adapter_config__json=ADAPTER_CONFIG | {"megatron_core": "evil"}),
        "AdapterError",
        "names code",
    ),
    (
        "62 soft prompt of NaN",
        soft_prompt(save({"prompt": np.full((2, 8), NAN, "f4")}), "p.safetensors"),
        "AdapterError",
        "not finite",
    ),
    (
        "62 sparse soft prompt",
        soft_prompt(pickled(b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.")),
        "AdapterError",
        "it names torch._utils._rebuild_sparse_tensor",
    ),
    (
        "62 soft prompt that runs a program",
        soft_prompt(pickled(b"cos\nsystem\n(S'touch ran'\ntR.")),
        "AdapterError",
        "it names os.system",
    ),
    ("62 pickled soft prompt", soft_prompt(b"\x80\x04N."), "AdapterError", "is not a zip file"),
    (
        "63 soft prompt of another width",
        soft_prompt(save({"prompt": np.zeros((2, 7), "f4")}), "p.safetensors"),
        "AdapterError",
        "the base model has embeddings of 8",
    ),
    (
        "64 auto_map",
        files(tokenizer_config__json={"auto_map": {"AutoTokenizer": ["x.Y", None]}}),
        "TokenizerError",
        "names code to run",
    ),
    ("64 tokenizer config is no object", files(tokenizer_config__json=[1]), "TokenizerError", "no JSON object"),
    ("64 tokenizer is no JSON", files(tokenizer__json=b"{"), "TokenizerError", "not valid JSON"),
    (
        "65 endless template",
        files(
            tokenizer_config__json={
                "chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            }
        ),
        "TokenizerError",
        "takes more than",
    ),
    (
        "65 endless recursion",
        files(tokenizer_config__json={"chat_template": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}"}),
        "TokenizerError",
        "chat template",
    ),
    (
        "66 template that makes a gigabyte",
        files(tokenizer_config__json={"chat_template": "{{ 'a' * 1000000000 }}"}),
        "TokenizerError",
        "chat template",
    ),
    (
        "66 template that doubles",
        files(
            tokenizer_config__json={
                "chat_template": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}"
                "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
            }
        ),
        "TokenizerError",
        "chat template",
    ),
    (
        "66 template that pads",
        files(tokenizer_config__json={"chat_template": "{{ 'a'.center(1000000000) }}"}),
        "TokenizerError",
        "chat template",
    ),
    (
        "67 template that leaves the sandbox",
        files(tokenizer_config__json={"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}),
        "TokenizerError",
        "is unsafe",
    ),
    (
        "67 template that includes",
        files(chat_template__jinja=b"{% include '/etc/passwd' %}"),
        "TokenizerError",
        "another",
    ),
    ("67 template that is none", files(chat_template__jinja=b"{% for %}"), "TokenizerError", "line 1"),
    (
        "68 catastrophic split",
        files(tokenizer__json=tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+b"}})),
        "TokenizerError",
        "time without end",
    ),
    (
        "69 vocabulary beyond the embedding",
        files(tokenizer__json=tokenizer(model={"vocab": {"a": 0, "b": 32}})),
        "TokenizerError",
        "'b' has the id 32, the base model has embeddings for 32",
    ),
    (
        "70 another end of sequence",
        files(tokenizer__json=tokenizer(added_tokens=[{"id": 3, "content": "<end>"}])),
        "TokenizerError",
        "'<end>': id 3, in the base model 31",
    ),
]
