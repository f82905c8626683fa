"""What the servers are asked: chats with three experts, the same for every server.

`tiny-demo` is the demo's experts and held-out questions about their schemas. `qwen3-0.6b` is random weights in the
shape of a real model: prompts of 170 to 554 tokens over 9 schemas, answers of a length that every request names.
"""

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.experts import make_experts, package_of
from benchmarks.models import SHAPES, make_model
from benchmarks.workloads import make_workload
from pipeline import demo
from pipeline.demo.questions import draw_questions
from pipeline.engine.chat import default_dialect, schema_message
from pipeline.package import open_package

MODELS = ("tiny-demo", *SHAPES)
NUM_EXPERTS = 3
DEMO_MAX_TOKENS = 96  # what the demo's packages say themselves
_SCHEMA_TOKENS = (150, 500)
_QUESTION_TOKENS = (20, 54)
_NUM_SCHEMAS = 9


@dataclass(frozen=True)
class ServedExpert:
    """An expert as every server can have it.

    Args:
        name: The manifest's name.
        package: Its `.expert` file.
        folder: The same, unpacked: a folder that PEFT reads.
    """

    name: str
    package: Path
    folder: Path


@dataclass(frozen=True)
class ChatRequest:
    """One question, to the expert of that number.

    Args:
        expert: Its number among the scene's.
        messages: A system message with a schema, and the user's question.
        max_tokens: At most so many tokens are answered.
        is_exact: Not one fewer, whatever the end token says.
    """

    expert: int
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    is_exact: bool = False


@dataclass(frozen=True)
class Scene:
    """What is served, and what is asked of it.

    Args:
        name: One of `MODELS`.
        base: The base model's directory.
        experts: Over that base.
        requests: Enough that no server is asked one twice, unless a measurement needs more.
    """

    name: str
    base: Path
    experts: tuple[ServedExpert, ...]
    requests: tuple[ChatRequest, ...]

    def body(self, number: int, *, model: str, stream: bool, more: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request, as OpenAI's API takes it.

        Args:
            number: Of the request; after the last one comes the first again.
            model: What the server calls the expert.
            stream: Whether the answer shall come as it is generated.
            more: Fields that the server wants beside these.
        """
        request = self.requests[number % len(self.requests)]
        exactly = {name: value for name, value in more.items() if request.is_exact or name != "ignore_eos"}
        return {
            "model": model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            **({"stream": True} if stream else {}),
            **exactly,
        }


def make_scene(name: str, *, num_requests: int, seed: int = 0) -> Scene:
    """Make or find a model, its experts, and draw the requests; the same arguments give the same.

    Args:
        name: One of `MODELS`.
        num_requests: How many to draw.
        seed: Another seed, other questions.
    """
    return _demo_scene(num_requests, seed) if name == "tiny-demo" else _random_scene(name, num_requests, seed)


def _demo_scene(num_requests: int, seed: int) -> Scene:
    experts: list[ServedExpert] = []
    asked: list[list[ChatRequest]] = []
    for number, task in enumerate(demo.TASKS):
        package = open_package(demo.package(task))
        experts.append(ServedExpert(package.manifest.name, demo.package(task), package.root))
        dialect = default_dialect(package.manifest.capabilities)
        questions = draw_questions(task, -(-num_requests // len(demo.TASKS)), seed=seed + 1000)
        asked.append(
            [
                ChatRequest(number, _chat(schema_message(q.schema, dialect), q.prompt), DEMO_MAX_TOKENS)
                for q in questions
            ]
        )
    mixed = [request for three in zip(*asked, strict=True) for request in three]
    return Scene("tiny-demo", demo.BASE_MODEL, tuple(experts), tuple(mixed[:num_requests]))


def _random_scene(name: str, num_requests: int, seed: int) -> Scene:
    model = make_model(name)
    folders = make_experts(model, NUM_EXPERTS)
    experts = tuple(ServedExpert(folder.name, package_of(folder), folder) for folder in folders)
    base = _with_words(model, SHAPES[name]["vocab_size"])
    write = _Writer(base, seed)
    draw = random.Random(seed)
    schemas = [write.schema(draw.randint(*_SCHEMA_TOKENS)) for _ in range(_NUM_SCHEMAS)]
    # Lengths of answers as in the engines' benchmark: 8 to 175 tokens, 36 on average.
    lengths = [row.max_tokens for row in make_workload("shared-schema", seed=seed).rows]
    requests = []
    for number, length in zip(range(num_requests), cycle(lengths), strict=False):
        schema = number % _NUM_SCHEMAS
        question = write.question(draw.randint(*_QUESTION_TOKENS))
        chat = _chat(schema_message(schemas[schema], "postgres"), question)
        requests.append(ChatRequest(schema % NUM_EXPERTS, chat, length, is_exact=True))
    return Scene(name, base, experts, tuple(requests))


def _chat(system: str, question: str) -> tuple[Mapping[str, str], ...]:
    return {"role": "system", "content": system}, {"role": "user", "content": question}


class _Writer:
    """Texts of a wanted number of tokens, out of the demo's schemas and questions."""

    def __init__(self, base: Path, seed: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        drawn = list(draw_questions("sql", 2000, seed=seed + 1000))
        self._schemas = cycle(dict.fromkeys(line for question in drawn for line in question.schema.splitlines()))
        self._questions = cycle(question.prompt for question in drawn)

    def schema(self, num_tokens: int) -> str:
        return self._text(self._schemas, "\n", num_tokens)

    def question(self, num_tokens: int) -> str:
        return self._text(self._questions, " ", num_tokens)

    def _text(self, parts: "cycle[str]", between: str, num_tokens: int) -> str:
        text = next(parts)
        while len(encoding := self._tokenizer.encode(text)) < num_tokens:
            text += between + next(parts)
        return text[: encoding.offsets[num_tokens - 1][1]]


def _with_words(model: Path, vocab_size: int) -> Path:
    """The model with a tokenizer that has a word for every token id.

    The demo's tokenizer, which the model comes with, has a few thousand tokens. Random weights answer mostly with
    others, which would be no text at all, and no client could tell when the first token came.
    """
    folder = model.with_name(f"serve-{model.name}")
    if (folder / "tokenizer.json").is_file() and (folder / "model.safetensors").samefile(model / "model.safetensors"):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    described = json.loads((model / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in described["added_tokens"])}
    vocab |= {f"Ġw{token_id}": token_id for token_id in range(vocab_size) if token_id not in taken}
    for file in sorted(model.iterdir()):
        if file.name != "tokenizer.json":
            os.link(file, folder / file.name)
    (folder / "tokenizer.json").write_text(json.dumps(described))  # last: its presence says that the rest is whole
    return folder


def merged_models(scene: Scene, numbers: Sequence[int], dtype: str) -> list[Path]:
    """Directories of the base model with one expert each merged into it, made once, for servers that know no experts.

    Args:
        scene: Whose.
        numbers: Of the experts.
        dtype: `"bfloat16"` or `"float32"`.
    """
    return [_merged(scene, scene.experts[number], dtype) for number in numbers]


def _merged(scene: Scene, expert: ServedExpert, dtype: str) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = open_package(expert.package).digest
    path = Path("build/bench/merged") / f"{scene.base.name}-{expert.name}-{dtype}"
    recipe = path / "merged.json"
    made_from = json.dumps([digest, (scene.base / "model.safetensors").stat().st_mtime_ns])
    if recipe.is_file() and recipe.read_text() == made_from:
        return path
    model: Any = AutoModelForCausalLM.from_pretrained(scene.base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, expert.folder).merge_and_unload().save_pretrained(path)
    AutoTokenizer.from_pretrained(scene.base).save_pretrained(path)
    recipe.write_text(made_from)  # last: its presence says that the rest is whole
    return path
