# Two commands need nothing but Python >= 3.10 and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_DEVICE ?= cpu

# A bare GPU machine has torch, transformers, lightning, pytest and what they need, on Python 3.12; its oldest transformers
# needs another httpx than the pinned one.
GPU_PLATFORM := --python-version 3.12 --implementation cp --only-binary=:all: --platform manylinux_2_28_x86_64 \
	--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
GPU_WHEELS := hydra-core omegaconf datasets dill multiprocess xxhash peft sentence-transformers httpx==0.28.1

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# PyPI's torch for Linux carries CUDA (several GB). Without an NVIDIA GPU, take the CPU build of the same version.
# TORCH_INDEX= (empty) leaves the choice to pip's own index.
ifeq ($(shell uname -s 2>/dev/null),Linux)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu gpu-pack bench docs lint types format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## Create .venv with the pinned environment (again only when the pins change)

demo: $(STAMP) ## Train the small model through all stages on digits, evaluate it, write a report
	$(PY) train.py

test: $(STAMP) ## Run the tests in 2 processes (PYTEST_ARGS= for one)
	$(PY) -m pytest $(PYTEST_ARGS)

test-slow test-gpu: PYTEST_ARGS =

test-slow: $(STAMP) ## Run the tests that take longer, among them the main job
	$(PY) -m pytest -m "slow and not gpu" --timeout 3600 $(PYTEST_ARGS)

test-gpu: $(STAMP) ## Run the tests that need a CUDA device
	$(PY) -m pytest -m gpu --timeout 600 $(PYTEST_ARGS)

gpu-pack: $(STAMP) ## Fetch into .gpu/ what a bare GPU machine lacks (then there: python -m benchmarks.gpu_check)
	rm -rf .gpu/wheels && mkdir -p .gpu/wheels
	$(PY) -m pip download -q --no-deps -c constraints.txt $(GPU_PLATFORM) -d .gpu/wheels $(GPU_WHEELS)
	$(PY) -m pip wheel -q --no-deps -c constraints.txt -w .gpu/wheels antlr4-python3-runtime
	git rev-parse HEAD > .gpu/commit && du -sh .gpu

bench: $(STAMP) ## Measure speed side by side with peers (5 minutes; BENCH_DEVICE=cuda on a GPU)
	$(PY) -m benchmarks all --device $(BENCH_DEVICE) --json benchmarks/results/$(BENCH_DEVICE).json; status=$$?; \
		$(PY) -m benchmarks page benchmarks/results/*.json && exit $$status

docs: $(STAMP) ## Build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

lint: $(STAMP) ## Check style, formatting and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib

types: $(STAMP) ## Check types
	$(PY) -m mypy

format: $(STAMP) ## Rewrite the code as lint wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove the environment, builds and tool caches (runs and data stay)
	rm -rf $(VENV) build dist site src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "cocoa_pl needs Python 3.10 or newer, but '$(PYTHON)' was not found. Name one: make venv PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "cocoa_pl needs Python 3.10 or newer, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Name another: make venv PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@"$(PY)" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	@if [ -n "$(TORCH_INDEX)" ]; then \
		"$(PY)" -m pip install --no-deps --retries 1 --timeout 15 --index-url "$(TORCH_INDEX)" "$$(grep '^torch==' constraints.txt)" \
		|| echo "No CPU build of torch from $(TORCH_INDEX); pip's own index decides (on Linux that is the CUDA build, several GB)." >&2; \
	fi
	"$(PY)" -m pip install -c constraints.txt -e ".[dev]"
	@touch $@
