# Needs make and Python 3.11 or newer, nothing else: every target that runs
# something first makes .venv in this folder and installs the package into it.
#
#   make test PYTHON=/path/to/python3.13    with another Python
#   make test ARGS='-k recall'              more arguments for pytest

.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# The environment must not see packages from anywhere else.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Huge pages for what a training step allocates: half as fast again on a CPU
# (docs/scaling.md). Without effect where the C library is not glibc.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

# The first Python that is new enough and able to make an environment. (A
# version manager may put commands on the path that do not run.)
CAN_RUN := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; \
  do $$p -c '$(CAN_RUN)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help quickstart test lint clean

help:
	@echo 'make quickstart   an invented world, ICT, REALM, report (10 minutes)'
	@echo 'make test         all tests, with the style and type checks'
	@echo 'make lint         the style and type checks alone'
	@echo 'make clean        remove the environment, the caches and the runs'

quickstart: $(STAMP)
	$(BIN)/python experiments/quickstart.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m pytest tests/project/lint_test.py tests/project/layering_test.py $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .cache .hypothesis .mypy_cache \
	  .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Repeated when setup.py or pyproject.toml has changed; an environment whose
# Python is gone is replaced.
$(STAMP): setup.py pyproject.toml
	@if test -z '$(PYTHON)' || ! '$(PYTHON)' -c '$(CAN_RUN)'; then \
	  echo 'No usable Python >= 3.11 (with the modules venv and ensurepip)' \
	    'was found. Install one (on Debian and Ubuntu: python3 and' \
	    'python3-venv), or name it: make PYTHON=/path/to/python3.12' >&2; \
	  exit 1; \
	fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo 'Making the environment $(VENV) with $(PYTHON).'; \
	  '$(PYTHON)' -m venv --clear $(VENV); \
	fi
	@echo 'Installing realm_jax into $(VENV); this takes some minutes.'
	$(BIN)/python -m pip install --quiet --use-pep517 -e '.[dev,plot]'
	@touch $(STAMP)
