"""A package with every quirk of the published ones, unpacked: it is verified, its quirks are told, and it answers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Qwen3ForCausalLM
from typer.testing import CliRunner

from pipeline import Expert
from pipeline.cli import app
from pipeline.engine.chat import build_messages, encode_chat
from tests import tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANK = 12
# left-recursive, with comments and an underscore, as no llama.cpp takes it
GRAMMAR = """\
# One small query.
root ::= query
query ::= "SELECT " columns_of " FROM " name

columns_of ::= columns_of ", " name | name   # one or more
name ::= "users" | "orders" | "größe"
"""
MANIFEST: dict[str, Any] = {
    "name": "expert-quirks",
    "version": "0.3.0",
    "schema_version": "2.0",
    "description": "Gera consultas SQL — respostas curtas, açaí incluído.",
    "author": "someone",
    "base_models": [
        {
            "name": "F:\\Models\\tiny-random",
            "sha256": "",
            "quantization": "int4",
            "rope_scaling": {"type": "ntk-by-parts", "factor": 8.0, "_comment": "β=0.25"},
            "prompt_template": "qwen3",
            "adapters": [
                {
                    "type": "dora",
                    "path": "qwen3/final",
                    "target_modules": TARGETS,
                    "r": RANK,
                    "alpha": 2 * RANK,
                    "scaling": "dora",
                    "dropout": 0.1,
                    "size_bytes": 0,
                    "sha256": "",
                    "_comment": "the best of four",
                }
            ],
        }
    ],
    "soft_prompts": [],
    "capabilities": ["database:sql", "database:postgresql", "language:en"],
    "limitations": [{"pattern": "no_union", "description": "UNION is unreliable", "_seen": 3}],
    "quality_metrics": {"benchmark_score": 8.9, "sql_valid": "16/18", "_comment": "by hand"},
    "routing": {"keywords": ["sql", "select"], "exclude_keywords": ["explain"], "priority": 0.85, "_comment": "x"},
    "constraints": {"max_chain": 10, "load_order": 6, "incompatible_with": [], "requires": []},
    "runtime": {"candle_compatible": True, "_comment": "of another engine"},
    "training": {
        "dataset": {"path": "train.jsonl", "sources": []},
        "config": {"method": "sft", "rank": RANK, "learning_rate": 5e-5, "_lr_comment": "low"},
        "decoding": {
            "use_grammar": True,
            "grammar_type": "sql-postgres",
            "validation": "parser-strict",
            "stop_sequences": [";", "\n\n"],
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "min_p": 0,
            "max_new_tokens": 24,
            "_comment": "as recommended",
        },
        "trained_on": "2025-11-06",
        "packed_by": "a tool of its own",
    },
    "license": "cc-by-4.0",
    "tags": ["sql"],
}
QUIRKS = (
    "base_models[0].name: a path of the machine it was made on; read as 'tiny-random'",
    "base_models[0].prompt_template: 'qwen3' is not a template of the published schema",
    "quality_metrics.sql_valid: unknown field",
    "quality_metrics: lacks base_model_score",
    "perf: missing; the published schema requires it",
    "training.packed_by: unknown field",
    "adapters.path: 'qwen3/final' is not in the package",
    "expert-quirks@0.3.0 is not signed",
)
QUESTION, SCHEMA = "List all orders of 2024.", "CREATE TABLE orders (id INT, größe TEXT);"
RUNS_AWAY = "{% if 'run away' in messages[-1].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
RUNS_AWAY += "{% endfor %}{% endfor %}{% endif %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(tiny.tokenizer()))


@pytest.fixture(scope="module")
def adapted(base: Path) -> peft.PeftModel:
    """A DoRA adapter over the base, under PEFT: what the engine must equal."""
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_" in name:
                spread = 0.5 + torch.rand_like(value)
                value.copy_(value * spread if "magnitude" in name else torch.randn_like(value) * 0.2)
    return made.eval()


@pytest.fixture(scope="module")
def unpacked(adapted: peft.PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a directory, with what a trainer leaves beside the adapter."""
    root = tmp_path_factory.mktemp("packages") / "expert-quirks"
    adapted.save_pretrained(str(root))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = RUNS_AWAY + str(tokenizer.chat_template)
    tokenizer.save_pretrained(root)
    (root / "manifest.json").write_text(json.dumps(MANIFEST, ensure_ascii=False, indent=2), encoding="utf-8")
    (root / "grammar.gbnf").write_text(GRAMMAR, encoding="utf-8")
    (root / "training_args.bin").write_bytes(b"\x80\x04 a pickle that nobody opens")
    return root


@pytest.fixture(scope="module")
def expert(unpacked: Path, base: Path) -> Expert:
    return Expert.load(unpacked, models={"tiny-random": str(base)}, device="cpu", dtype="float32")


def test_verify_lists_its_quirks_as_warnings(unpacked: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(unpacked), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for quirk in QUIRKS:
        assert any(quirk in warning for warning in found["warnings"]), quirk
    assert found["checked"]["weights"] == "36 tensors as adapter_config.json says, all values finite"
    shown = CliRunner().invoke(app, ["verify", str(unpacked)])
    assert "36 tensors" in shown.stdout
    assert "training.packed_by" in shown.stdout


def test_it_answers_as_peft_does(expert: Expert, adapted: peft.PeftModel, unpacked: Path) -> None:
    """By the manifest's defaults but for chance, and without the grammar, which PEFT does not know."""
    ours = expert.generate(QUESTION, schema=SCHEMA, temperature=0.0, use_grammar=False, stop=[])
    tokenizer = tiny.tokenizer()
    prompt = encode_chat(tokenizer, build_messages(prompt=QUESTION, schema=SCHEMA, dialect="postgres"))
    with torch.no_grad():
        tokens = adapted.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24, do_sample=False,
        )[0, len(prompt) :]  # fmt: skip
    assert ours.prompt_tokens == len(prompt)
    assert ours.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert ours.completion_tokens == 24
    with adapted.disable_adapter(), torch.no_grad():
        plain = adapted.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24, do_sample=False,
        )[0, len(prompt) :]  # fmt: skip
    assert tokens.tolist() != plain.tolist(), "the adapter changes nothing"


def test_its_own_grammar_and_decoding_hold(expert: Expert) -> None:
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    for seed in range(3):
        text = expert.generate(QUESTION, schema=SCHEMA, seed=seed).text
        assert text.startswith("SELECT ")
        columns, _, table = text.removeprefix("SELECT ").partition(" FROM ")
        assert set(columns.split(", ")) <= {"users", "orders", "größe", ""} or not table


def test_a_template_that_runs_away_with_one_row_is_that_rows_error(expert: Expert) -> None:
    results = expert.generate_batch([QUESTION, "run away", QUESTION], use_grammar=False, temperature=0.0)
    assert [result.error and result.error.code for result in results] == [None, "invalid_tokenizer", None]
    assert "cannot render this conversation" in str(results[1].error)
    assert results[0].text == results[2].text != ""
