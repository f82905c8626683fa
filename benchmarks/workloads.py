"""What the engines are given to do: seeded lists of token ids with fixed answer lengths.

Every row says how many tokens its answer has, and the end-of-sequence token is ignored, so that all engines do the
same work whatever the weights are.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FIRST_TOKEN_ID = 16  # the ids below are a tokenizer's control tokens
DEFAULT_ROWS = 96
MEAN_OUTPUT = 3429 / DEFAULT_ROWS


@dataclass(frozen=True)
class Row:
    """One prompt and the length of its answer.

    Args:
        id: Unique within the workload.
        prompt: Token ids.
        max_tokens: Exactly this many tokens are generated.
        prefix_length: How many of the first tokens are a schema that other rows have too.
        expert: The number of the expert that answers, or None for the base model.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    prefix_length: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Workload:
    """Rows in the order in which a dataset would have them, and what they are drawn from."""

    name: str
    seed: int
    vocab_size: int
    rows: tuple[Row, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """All prompt tokens, a shared schema counted for each row that has it."""
        return sum(len(row.prompt) for row in self.rows)

    @property
    def num_unique_prompt_tokens(self) -> int:
        """Prompt tokens left to compute when an expert computes each schema once."""
        shared = {(row.expert, row.prompt[: row.prefix_length]) for row in self.rows}
        own = sum(len(row.prompt) - row.prefix_length for row in self.rows)
        return own + sum(len(prefix) for _, prefix in shared)

    @property
    def num_output_tokens(self) -> int:
        """All tokens to generate."""
        return sum(row.max_tokens for row in self.rows)

    @property
    def num_experts(self) -> int:
        """How many experts answer."""
        return len({row.expert for row in self.rows if row.expert is not None})

    @property
    def is_one_by_one(self) -> bool:
        """Whether a row is handed in only after the answer to the one before: how long one prompt takes."""
        return self.name in ONE_BY_ONE

    def write(self, path: Path) -> None:
        """Write it as JSON, for a peer in another process to read."""
        path.write_text(json.dumps(asdict(self)))


def make_workload(name: str, *, rows: int | None = None, vocab_size: int = 151_936, seed: int = 0) -> Workload:
    """Draw a workload; the same arguments give the same rows.

    Args:
        name: One of `WORKLOADS`; their docstrings say what each is.
        rows: How many rows; None for as many as the workload is defined with.
        vocab_size: Token ids stay below it.
        seed: Another seed, other tokens and another order; the lengths of the answers stay.

    Raises:
        ValueError: No workload has that name, or there are no rows.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} is unknown; use one of {', '.join(WORKLOADS)}")
    if rows is not None and rows < 1:
        raise ValueError("a workload has at least one row")
    draw = _Draw(random.Random(seed), vocab_size)
    drawn = WORKLOADS[name](draw, rows)
    draw.random.shuffle(drawn)
    return Workload(name, seed, vocab_size, tuple(drawn))


@dataclass(frozen=True)
class _Draw:
    random: random.Random
    vocab_size: int

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(FIRST_TOKEN_ID, self.vocab_size) for _ in range(count))

    def shuffled(self, values: Sequence[int]) -> list[int]:
        return self.random.sample(values, len(values))


def shared_schema(draw: _Draw, rows: int | None = None) -> list[Row]:
    """96 questions over 8 schemas, as a table-question dataset has them.

    A prompt is a schema of 150 to 500 tokens, the same for 12 rows, and a question of 20 to 54 tokens of its own: 170
    to 554 tokens. Answers have 8 to 175 tokens, most of them few, 3,429 together. Rows are in random order.
    """
    return _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=8)


def shared_schema_long(draw: _Draw, rows: int | None = None) -> list[Row]:
    """`shared-schema` with answers three times as long: 24 to 525 tokens, 10,287 together."""
    return [
        Row(row.id, row.prompt, 3 * row.max_tokens, row.prefix_length)
        for row in _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=8)
    ]


def unique_prompts(draw: _Draw, rows: int | None = None) -> list[Row]:
    """The lengths of `shared-schema`, row for row, and nothing shared: each prompt has tokens of its own.

    What differs between the two is therefore the sharing alone.
    """
    return [
        Row(row.id, draw.tokens(len(row.prompt)), row.max_tokens)
        for row in _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=8)
    ]


def mixed_experts_3(draw: _Draw, rows: int | None = None) -> list[Row]:
    """`shared-schema` answered by 3 experts, each with schemas of its own: 9 schemas, 3 an expert."""
    return _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=9, num_experts=3)


def mixed_experts_30(draw: _Draw, rows: int | None = None) -> list[Row]:
    """`shared-schema` answered by 30 experts, each with one schema of its own: 30 schemas, about 3 rows each."""
    return _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=30, num_experts=30)


def long_tail(draw: _Draw, rows: int | None = None) -> list[Row]:
    """The prompts of `shared-schema`; one answer in 24 has 512 tokens, the others 8 to 64."""
    base = _over_schemas(draw, rows or DEFAULT_ROWS, num_schemas=8)
    num_long = max(1, len(base) // 24)
    short = _curve(len(base) - num_long, 8, 64, 24.0) if len(base) > num_long else []
    lengths = draw.shuffled([512] * num_long + short)
    return [Row(row.id, row.prompt, length, row.prefix_length) for row, length in zip(base, lengths, strict=True)]


def short(draw: _Draw, rows: int | None = None) -> list[Row]:
    """192 rows like the demo's: 4 schemas of 20 to 60 tokens, questions of 10 to 30, answers of 5 to 30 tokens."""
    count = rows or 192
    schemas = [draw.tokens(length) for length in _even(4, 20, 60)]
    questions = draw.shuffled(_even(count, 10, 30))
    answers = draw.shuffled(_curve(count, 5, 30, 14.0))
    return [
        Row(f"{at}", schema + draw.tokens(question), answer, len(schema))
        for at, (schema, question, answer) in enumerate(
            zip(itertools.islice(itertools.cycle(schemas), count), questions, answers, strict=True)
        )
    ]


def single(draw: _Draw, rows: int | None = None) -> list[Row]:
    """3 prompts of 300 tokens without anything in common, answered one after another with 64 tokens each."""
    return [Row(f"{at}", draw.tokens(300), 64) for at in range(rows or 3)]


ONE_BY_ONE = frozenset({"single"})
WORKLOADS: dict[str, Callable[[_Draw, int | None], list[Row]]] = {
    "shared-schema": shared_schema,
    "shared-schema-long": shared_schema_long,
    "unique-prompts": unique_prompts,
    "mixed-experts-3": mixed_experts_3,
    "mixed-experts-30": mixed_experts_30,
    "long-tail": long_tail,
    "short": short,
    "single": single,
}


def _over_schemas(draw: _Draw, count: int, *, num_schemas: int, num_experts: int = 0) -> list[Row]:
    schema_lengths = draw.shuffled(_even(num_schemas, 150, 500))
    schemas = [draw.tokens(length) for length in schema_lengths]
    answers = draw.shuffled(_curve(count, 8, 175, MEAN_OUTPUT))
    # Every schema has a shortest and a longest question, so that prompts range from 170 to 554 tokens.
    sizes = [len(range(at, count, num_schemas)) for at in range(num_schemas)]
    questions = [draw.shuffled(_even(size, 20, 54)) for size in sizes]
    rows = []
    for at in range(count):
        schema = at % num_schemas
        own = draw.tokens(questions[schema][at // num_schemas])
        expert = schema % num_experts if num_experts else None
        rows.append(Row(f"{at}", schemas[schema] + own, answers[at], len(schemas[schema]), expert))
    return rows


def _even(count: int, low: int, high: int) -> list[int]:
    """Whole numbers evenly spread from `low` to `high`, both included."""
    return [round(low + (high - low) * at / max(count - 1, 1)) for at in range(count)]


def _curve(count: int, low: int, high: int, mean: float) -> list[int]:
    """Rising whole numbers from `low` to `high` with that mean: the quantiles of an exponential distribution.

    Where it is possible the sum is `count * mean`, rounded.
    """
    quantiles = [(at + 0.5) / count for at in range(count)]
    values = [min(round(low - (mean - low) * math.log(1 - quantile)), high) for quantile in quantiles]
    values[0], values[-1] = low, high
    missing = round(count * mean) - sum(values)
    for at in itertools.islice(itertools.cycle(range(count - 2, 0, -1)), 8 * count if count > 2 else 0):
        if missing and low <= values[at] + (step := int(math.copysign(1, missing))) <= high:
            values[at] += step
            missing -= step
    return sorted(values)
