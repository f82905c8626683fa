"""The log: Python's `logging` under `pipeline`, quiet unless `EXPERT_LOG` asks for more."""

import logging
import sys
from collections.abc import Mapping

VARIABLE = "EXPERT_LOG"
LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger("pipeline")


def set_up(environment: Mapping[str, str]) -> None:
    """Write what `EXPERT_LOG` asks for to standard error; without it, leave all to the program's own `logging`.

    Args:
        environment: Where the variable is looked for.
    """
    asked = environment.get(VARIABLE, "").strip().lower()
    if not asked:
        return
    if asked not in LEVELS:
        logger.warning("%s=%s is none of %s; it changes nothing", VARIABLE, asked, ", ".join(LEVELS))
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    logger.setLevel(asked.upper())
