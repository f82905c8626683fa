"""How fast the engines are, side by side on one machine; see `python -m benchmarks.engine --help`."""
