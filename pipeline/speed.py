"""How fast an expert answers on this machine: one prompt, and many at a time."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.expert import Expert

REPEATS = 3  # of the single prompt; the median counts
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Speed:
    """What was measured of so many prompts at a time.

    Args:
        num_prompts: Asked together.
        seconds: From asking to the last answer.
        first_token_seconds: From asking to the first token of an answer; the median over the prompts.
        prompt_tokens: Of all prompts.
        completion_tokens: Generated for all of them.
    """

    num_prompts: int
    seconds: float
    first_token_seconds: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all prompts a second."""
        return self.completion_tokens / self.seconds

    @property
    def prompts_per_second(self) -> float:
        """Prompts answered a second."""
        return self.num_prompts / self.seconds


def measure_speed(
    expert: Expert, prompt: str, *, schema: str | None = None, max_tokens: int = 64, batches: Sequence[int] = (1, 8, 32)
) -> Iterator[Speed]:
    """Ask an expert so many prompts at a time, and measure; each answer has exactly `max_tokens` tokens.

    The prompts of a batch differ in their last word, so that none is computed for another; what they share (a schema,
    the beginning) is computed once, as it is of any prompts.

    Args:
        expert: What answers. It is loaded and warmed up first, outside of what is measured.
        prompt: The prompt.
        schema: Goes with it.
        max_tokens: The length of each answer.
        batches: How many prompts are asked at a time, one number after another.

    Yields:
        What was measured, in the order of `batches`; of a single prompt the median run of three.

    Raises:
        InvalidRequestError: A number is less than one, or the prompt cannot be asked.
    """
    expert.generate(prompt, schema=schema, max_tokens=min(WARM_UP_TOKENS, max_tokens), use_grammar=False)
    number = 0
    for size in batches:
        runs = []
        for _ in range(REPEATS if size == 1 else 1):
            prompts = [f"{prompt} {at}" for at in range(number, number + size)]
            number += size
            runs.append(_run(expert, prompts, schema, max_tokens))
        yield sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _run(expert: Expert, prompts: list[str], schema: str | None, max_tokens: int) -> Speed:
    begun = time.perf_counter()
    results = expert.generate_batch(
        prompts,
        schema=schema,
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        stop=[],
        use_grammar=False,
        raise_on_error=True,
    )
    seconds = time.perf_counter() - begun
    return Speed(
        len(prompts),
        seconds,
        statistics.median(result.timings.first_token or 0.0 for result in results),
        sum(result.prompt_tokens for result in results),
        sum(result.completion_tokens for result in results),
    )
