# make demo   train, evaluate and export a small scene, in a fresh virtual environment
# make docs   the guide, from docs/ into site/; a warning is an error
# make test   lint, types and tests
# make compatibility   the oldest and newest versions, in environments of their own; see noxfile.py
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo docs test test-gpu compatibility lint system clean

demo: $(INSTALLED)
	$(BIN)/gsscale-demo --output-dir demo

# Not --quiet: then --strict would let warnings pass.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

test: lint
	$(BIN)/pytest tests -n logical --dist loadfile

# On a machine with a GPU, in an environment that has this package installed.
test-gpu:
	pytest tests -m gpu

compatibility: $(INSTALLED)
	$(BIN)/nox -s "compatibility(oldest)" "compatibility(newest)" wheels -- none

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The package is installed, not linked: tests then see what users get. GSSCALE_WERROR: our C++ must
# compile without a warning here; a user's newer compiler may have new ones.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/kernels/*) $(shell find gsscale_nerfstudio -name '*.py')
	@$(MAKE) --no-print-directory system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --config-settings cmake.define.GSSCALE_WERROR=ON ".[test,docs]"
	@touch $@

# What pip cannot install, with the package that has it on Debian and Ubuntu.
system:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "gsscale needs Python 3.10 to 3.12, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; install it: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { \
	  echo "Python's headers are missing; install them: sudo apt-get install python3-dev" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { \
	  echo "No C++ compiler was found; install one: sudo apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libglib-2.0.so.0")' 2>/dev/null || { \
	  echo "Libraries that OpenCV and Open3D need are missing; install them: sudo apt-get install libgl1 libglib2.0-0" >&2; exit 1; }

clean:
	rm -rf $(VENV) .nox build dist demo site
