# The commands of CryoChains. Each makes .venv and installs what it needs, once; after a change of
# pyproject.toml or constraints.txt it installs again. Another Python: make demo PYTHON=python3.12
#
# On Linux the package index serves torch 2.13.0 with CUDA packages of several GB. Where no GPU is, point
# PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at PyTorch's CPU builds first: pip then prefers 2.13.0+cpu.

PYTHON ?= python3
BIN := .venv/bin
# Read by pip from the environment, so that the pins also hold where ProDy is compiled against NumPy.
PIN := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
INSTALL := $(PIN) $(BIN)/python -m pip --disable-pip-version-check install --quiet
# ProDy has ready builds for few versions of Python, and is compiled for the others.
COMPILER = { command -v cc || command -v gcc || command -v clang; } && \
  { command -v c++ || command -v g++ || command -v clang++; } && $(PYTHON) -c 'import os, sys, sysconfig; \
  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'

.PHONY: help demo test lint lab bench

help:
	@echo "make demo    the whole job on an embedded molecule; writes results/demo"
	@echo "make test    every test, example and notebook"
	@echo "make lab     JupyterLab on the notebooks"
	@echo "make bench   speed against other programs"
	@echo "make lint    ruff and mypy"

demo: .venv/.base
	$(BIN)/python examples/demo.py

# Fast tests first: style, then tests and docstring examples, then notebooks. Two at a time, one core each: threads that
# share small products mostly wait for each other.
TWICE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test: lint
	MPLBACKEND=Agg $(TWICE)
	$(TWICE) --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks

lint: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: .venv/.full
	$(BIN)/jupyter lab notebooks

bench: .venv/.bench
	PYTHONPATH=.venv/cryosphere $(BIN)/python benchmarks/projection_vs_cryosphere.py
	$(BIN)/python benchmarks/map_round.py
	$(BIN)/python benchmarks/explorer.py

.venv/.base: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "expected Python 3.11, 3.12 or 3.13, found no '$(PYTHON)'; install one or name yours: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "expected Python 3.11, 3.12 or 3.13, got $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "expected Python with its venv module, found none; try: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing pinned packages into .venv (a few minutes, once) ..."
	@{ $(COMPILER); } >/dev/null || $(INSTALL) --only-binary prody prody 2>/dev/null || { \
	  echo "expected a C and C++ compiler and Python's headers, which ProDy needs to install; try: apt-get install build-essential python3-dev, or conda with environment.yml" >&2; exit 1; }
	@$(INSTALL) -e .
	@touch $@

.venv/.full: .venv/.base
	@echo "Installing JupyterLab and the test tools into .venv (once) ..."
	@$(INSTALL) -e ".[lab,test]"
	@touch $@

# cryoSPHERE is timed against, never depended on: it lives beside the environment, without its own dependencies.
.venv/.bench: .venv/.full
	@$(INSTALL) --no-deps --upgrade --target .venv/cryosphere cryosphere==0.6.1 einops
	@touch $@
