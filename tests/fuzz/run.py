"""Run one fuzz target with atheris: `python -m tests.fuzz.run TARGET [options of libFuzzer]`."""

import sys

import atheris

with atheris.instrument_imports(include=["pipeline.package"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Hand the target to the fuzzer, which ends the process."""
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
