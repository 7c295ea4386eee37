# megacpt: set up and run with one command each.
#
#   make demo     create .venv, install, run the main job on text that every machine has
#   make test     the same, run the test suite          (PYTEST_ARGS="-n 2 tests/data" passes arguments on)
#   make lint     ruff                 make types    mypy
#   make checks   lint, types, test    make clean    remove what was built and installed
#   make llama-cpp   build llama.cpp into .venv (15 min on one core), for the tests that export to it
#   make wheel    dist/*.whl with the kernels built in (MEGACPT_CUDA_ARCHS="80;90;100" make wheel: those for GPUs too)
#
# Variables:
#   PYTHON=/path/to/python3.11   the Python that makes .venv; otherwise the first of 3.10 to 3.12 that is found
#   PIP_ARGS="--index-url URL"   arguments for every `pip install`, such as an index of your own
#
# On Linux the torch of PyPI brings several GB of CUDA libraries. A machine without a GPU does well with PyTorch's CPU
# build, whose index PIP_ARGS can name.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.installed-tools
PYTEST_ARGS ?=
PIP_ARGS ?=

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
                      $$p -c "$(SUPPORTED)" 2>/dev/null && { echo $$p; break; }; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types checks llama-cpp wheel clean

demo: $(STAMP)
	@$(BIN)/megacpt demo

test: $(TOOLS)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TOOLS)
	@$(BIN)/ruff check .

types: $(TOOLS)
	@$(BIN)/mypy

checks: lint types test

# A client of the GGUF exports, built from source with what this processor can; JOBS=4 for more cores.
JOBS ?= 1
llama-cpp: $(TOOLS)
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON" \
	  $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --no-binary llama-cpp-python llama-cpp-python
	@$(BIN)/python -m pytest tests/convert/test_gguf.py -k LlamaCpp

wheel: $(STAMP)
	@$(BIN)/python -m pip wheel -q $(PIP_ARGS) --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megacpt kernels -name '*.so' -delete
	find megacpt tests kernels -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c "$(SUPPORTED)"; then \
	  echo "megacpt needs Python 3.10, 3.11 or 3.12; found: $$($(or $(PYTHON),python3) --version 2>/dev/null || echo none)."; \
	  echo "Install one of these, or name it: make demo PYTHON=/path/to/python3.11"; exit 1; fi >&2
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch goes first, at the pinned version and by itself. Left to the requirements of other packages, pip would take
# whatever torch is newest and, on a machine without a GPU, its CUDA packages even where a CPU build is offered.
# Build isolation is off for megacpt itself: setuptools is there (torch needs it), so nothing is fetched to build with.
$(STAMP): setup.py pyproject.toml constraints.txt $(shell find kernels -type f 2>/dev/null) | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) torch==2.13.0 "setuptools>=77" -c constraints.txt
	@$(BIN)/python -m pip install -q $(PIP_ARGS) --no-build-isolation -c constraints.txt -e .
	@$(BIN)/python -m megacpt.ops.native
	@touch $@

# What tests, linter and type checker need on top; the demo does without.
$(TOOLS): $(STAMP)
	@echo "Installing the tools of development into $(VENV)"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@
