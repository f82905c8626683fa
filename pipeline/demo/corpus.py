"""Training text for the demo model: its tokenizer, and batches of questions that share a schema.

Several questions over one schema are packed into one sequence as a tree: the schema once, then each question and its
answer as a branch that sees the schema and itself but no other branch, with positions counted as if it stood alone.
That is the same computation as separate sequences, at half the tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.demo.names import TASKS, Task
from pipeline.demo.tasks import DIALECTS, INSTRUCTIONS, TERMINATORS, draw_group
from pipeline.demo.world import LABEL_COLUMNS, LIMITS, NUMBER_COLUMNS, PEOPLE, RELATIONS, TABLES, TEXT_COLUMNS
from pipeline.engine.chat import schema_message

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 2048
TOKENIZER_GROUPS = 3000
LEXICON_WEIGHT = 40


def lexicon() -> list[str]:
    """Every word of the world; each should become one token."""
    words: list[str] = [*TABLES, *TABLES.values(), *(name.capitalize() for name in TABLES.values())]
    words += [*LABEL_COLUMNS, *RELATIONS, *PEOPLE, *TEXT_COLUMNS, *NUMBER_COLUMNS, *map(str, LIMITS)]
    for values in TEXT_COLUMNS.values():
        words += values
    for numbers in NUMBER_COLUMNS.values():
        words += map(str, numbers)
    return sorted(set(words))


def tokenizer_text(seed: int) -> Iterator[str]:
    rng = Random(f"{seed}/tokenizer")
    for _ in range(LEXICON_WEIGHT):
        for word in lexicon():
            yield f"{word}"
            yield f" {word}"
    for group in range(TOKENIZER_GROUPS):
        for example in draw_group(rng, TASKS[group % len(TASKS)], 4, held_out=False):
            yield schema_message(example.schema, DIALECTS[example.task])
            yield f"{example.prompt} {INSTRUCTIONS[example.task]}"
            yield example.expected + TERMINATORS[example.task]
            yield example.plan


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML tokens and template, trained on the world's text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(tokenizer_text(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",  # noqa: S106  # a token of text, no secret
        pad_token="<|endoftext|>",  # noqa: S106  # likewise
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Branch:
    """One question and its answer, as token ids."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Tree:
    """A schema and the questions that share it."""

    prefix: list[int]
    branches: list[Branch]

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.question) + len(branch.answer) for branch in self.branches)


def draw_tree(
    tokenizer: PreTrainedTokenizerFast, rng: Random, task: Task, size: int, instructed_share: float | None
) -> Tree:
    """`size` training questions over one schema.

    With `instructed_share` (training the base), that share of the questions carries the task's instruction and is
    answered in its language, and the others are answered in plan wording. With None (training an expert), no question
    carries an instruction and all are answered in the task's language.
    """
    group = draw_group(rng, task, size, held_out=False)
    texts = [f"<|im_start|>system\n{schema_message(group[0].schema, DIALECTS[task])}<|im_end|>\n"]
    for example in group:
        instructed = instructed_share is not None and rng.random() < instructed_share
        in_language = instructed or instructed_share is None
        question = f"{example.prompt} {INSTRUCTIONS[task]}" if instructed else example.prompt
        answer = example.expected + TERMINATORS[task] if in_language else example.plan
        texts.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        texts.append(f"{answer}<|im_end|>")
    ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    return Tree(ids[0], [Branch(ids[at], ids[at + 1]) for at in range(1, len(ids), 2)])


@dataclass(frozen=True)
class Batch:
    """Trees as tensors; `weight` says how much each position's prediction counts."""

    input_ids: torch.Tensor  # [trees, length]
    position_ids: torch.Tensor  # [trees, length]
    mask: torch.Tensor  # [trees, 1, length, length], additive
    targets: torch.Tensor  # [trees, length]
    weight: torch.Tensor  # [trees, length]


def collate(trees: list[Tree], prompt_weight: float) -> Batch:
    length = max(map(len, trees))
    shape = (len(trees), length)
    input_ids = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    branch_of = torch.full(shape, -1)
    weight = torch.zeros(shape)
    for row, tree in enumerate(trees):
        start = len(tree.prefix)
        input_ids[row, :start] = torch.tensor(tree.prefix)
        position_ids[row, :start] = torch.arange(start)
        branch_of[row, :start] = 0
        at = start
        for number, branch in enumerate(tree.branches, start=1):
            size = len(branch.question) + len(branch.answer)
            input_ids[row, at : at + size] = torch.tensor(branch.question + branch.answer)
            position_ids[row, at : at + size] = torch.arange(start, start + size)
            branch_of[row, at : at + size] = number
            weight[row, at : at + len(branch.question) - 1] = prompt_weight
            weight[row, at + len(branch.question) - 1 : at + size - 1] = 1.0
            at += size
    visible = (branch_of[:, :, None] == branch_of[:, None, :]) | (branch_of[:, None, :] == 0)
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    targets = torch.zeros_like(input_ids)
    targets[:, :-1] = input_ids[:, 1:]
    return Batch(input_ids, position_ids, mask[:, None], targets, weight)
