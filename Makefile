# Every target sets itself up: the first one makes .venv, and a change of pyproject.toml or constraints/ renews it.
#
#   make PYTHON=python3.12 ...      another interpreter (3.11 or newer)
#   make TORCH_INDEX=URL ...        where the CPU build of torch comes from; by default torch's own CPU index where it
#                                   answers, else the index pip is configured for
#   make WORKERS=8 test             pytest processes, one thread each

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
NVIDIA_DRIVER := $(shell { command -v nvidia-smi || test -e /dev/nvidia0; } >/dev/null 2>&1 && echo yes)

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
ANSWERS := import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)

ifdef NVIDIA_DRIVER
CONSTRAINTS := -c constraints/tested.txt
else
CONSTRAINTS := -c constraints/cpu.txt -c constraints/tested.txt
endif

# Picks, in the shell variable `index`, where the CPU build of torch comes from.
FIND_INDEX = index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && $(PYTHON) -c '$(ANSWERS)' "$(TORCH_CPU_INDEX)" 2>/dev/null; then index="$(TORCH_CPU_INDEX)"; fi

.PHONY: help setup demo test lint types format bench-peers bench-rounds bench-memory bench-speed bench-alignment clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

setup: $(READY) ## make .venv and install everything into it

demo: $(READY) ## the whole job on the built-in world: about four minutes on two cores
	$(BIN)/hydra-rlhf demo

test: lint types ## lint, types and all tests: about a quarter of an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY) ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY) ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-peers: .venv-bench/.ready .venv-trl/.ready .venv-agilerl/.ready ## environments of the benchmarks against peers (13 GB)

bench-rounds: $(READY) bench-peers ## memory and time beside the peers: three rounds, about an hour on two quiet cores
	$(BIN)/python benchmarks/peers_rounds.py --hydra-python .venv-bench/bin/python
	$(BIN)/python benchmarks/tables.py

bench-memory: $(READY) ## the rest of the memory benchmark: about five minutes
	$(BIN)/python benchmarks/memory.py --out benchmarks/results/memory.json
	$(BIN)/python benchmarks/tables.py

bench-speed: $(READY) ## the rest of the speed benchmark: about twelve minutes on two quiet cores
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed.json
	$(BIN)/python benchmarks/tables.py

bench-alignment: $(READY) .venv-trl/.ready ## the alignment study and its tables; wants quiet cores
	$(BIN)/python benchmarks/alignment_study.py --work runs/alignment-study --out benchmarks/results/alignment_study.json
	$(BIN)/python benchmarks/hydra_sft_study.py --work runs/hydra-sft-study --out benchmarks/results/hydra_sft_study.json
	$(BIN)/python benchmarks/tables.py

clean: ## remove .venv, builds and caches; run folders stay
	rm -rf .venv .venv-bench .venv-trl .venv-agilerl build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is taken up again.
$(READY): pyproject.toml $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) --version 2>/dev/null) || found="not there"; \
		echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$found. Name another one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up .venv; this takes a minute or two."
	$(PYTHON) -m venv .venv
ifdef NVIDIA_DRIVER
	$(PIP) install --quiet $(CONSTRAINTS) torch
else
	@$(FIND_INDEX); echo "No NVIDIA driver here: installing torch's CPU build from $${index:-the index pip is configured for}"; \
	$(PIP) install --quiet $(CONSTRAINTS) torch $${index:+--extra-index-url "$$index"}
endif
	$(PIP) install --quiet $(CONSTRAINTS) --editable '.[dev]'
	@touch $@
	@echo "Ready. Use .venv/bin/hydra-rlhf, or first: source .venv/bin/activate"

# This package as `pip install hydra-rlhf` brings it, without development tools, which cost memory where they are found.
.venv-bench/.ready: pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv .venv-bench
	@$(FIND_INDEX); .venv-bench/bin/pip install --quiet -c constraints/cpu.txt -c constraints/tested.txt \
		--editable . $${index:+--extra-index-url "$$index"}
	@touch $@

.venv-trl/.ready: benchmarks/peers/trl.txt
	$(PYTHON) -m venv .venv-trl
	@$(FIND_INDEX); .venv-trl/bin/pip install --quiet -r $< $${index:+--extra-index-url "$$index"}
	@touch $@

.venv-agilerl/.ready: benchmarks/peers/agilerl.txt
	$(PYTHON) -m venv .venv-agilerl
	.venv-agilerl/bin/pip install --quiet -r $<
	@touch $@
