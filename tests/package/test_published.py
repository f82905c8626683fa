"""A published expert, with weights made for it: its quirks are warnings, and it loads."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.package import fitting_base_model, open_package
from pipeline.package.card import package_card, verification
from tests.package.expert_fixtures import ADAPTER_CONFIG, write_files

PUBLISHED = Path(__file__).parents[3] / "shared" / "upstream" / "expert-sql"
RANK, WIDTH = 12, 32
MODULES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (16, WIDTH),
    "self_attn.v_proj": (16, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.up_proj": (48, WIDTH),
    "mlp.down_proj": (WIDTH, 48),
}

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published expert is not beside this project")


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The published manifest and grammar, and a DoRA adapter as they describe it."""
    draw, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for module, (out_size, in_size) in MODULES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = draw.normal(size=(RANK, in_size)).astype("f4")
            tensors[f"{prefix}.lora_B.weight"] = draw.normal(size=(out_size, RANK)).astype("f4")
            tensors[f"{prefix}.lora_magnitude_vector.weight"] = np.ones(out_size, "f4")
    targets = [module.rpartition(".")[2] for module in MODULES]
    config = ADAPTER_CONFIG | {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    files = {path.name: path.read_bytes() for path in PUBLISHED.iterdir() if path.is_file()}
    return write_files(
        tmp_path / "expert-sql",
        files
        | {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
        | {"training_args.bin": b"\x80\x04 a pickle that nobody opens"},
    )


def test_its_quirks_are_warnings_and_it_loads(unpacked: Path, tmp_path: Path) -> None:
    package = open_package(unpacked)
    assert package.label == "expert-sql@0.3.0"
    assert (package.adapter.kind, package.adapter.r) == ("dora", RANK)
    assert package.grammar is not None
    warnings = "\n".join(package.warnings)
    for quirk in (
        "read as 'Qwen3-0.6B'",
        "'qwen3' is not a template of the published schema",
        "quality_metrics.sql_valid: unknown field",
        "quality_metrics: lacks base_model_score",
        "expert-sql@0.3.0 is not signed",
    ):
        assert quirk in warnings
    shown = verification(package)
    assert shown["warnings"] == list(package.warnings)
    assert shown["checked"]["weights"] == "36 tensors as adapter_config.json says, all values finite"
    assert package_card(package)["adapters"][0].startswith("Qwen3-0.6B: dora, ")
    base = write_files(
        tmp_path / "Qwen3-0.6B",
        {
            "config.json": b'{"vocab_size": 100}',
            "model.safetensors": save(
                {
                    f"model.layers.{layer}.{module}.weight": np.zeros(shape, "f4")
                    for layer in range(2)
                    for module, shape in MODULES.items()
                }
            ),
        },
    )
    assert fitting_base_model(package, base_model=base).path == base
