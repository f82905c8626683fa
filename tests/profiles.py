"""How many examples property tests draw: few on each run, many where `HYPOTHESIS_PROFILE=full` asks for them."""

import os

from hypothesis import settings

USUAL, FULL = "usual", "full"
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", USUAL)


def load_profile() -> None:
    """Have hypothesis draw what this run asks for.

    A deadline would measure how busy the machine is, not the code; examples are the same on every run.
    """
    settings.register_profile(USUAL, deadline=None, derandomize=True, print_blob=True)
    settings.register_profile(FULL, settings.get_profile(USUAL), max_examples=1_000)
    settings.load_profile(PROFILE)


def num_examples(usual: int, full: int) -> int:
    """For `settings(max_examples=...)` of a test whose examples are many or take long."""
    return full if PROFILE == FULL else usual
