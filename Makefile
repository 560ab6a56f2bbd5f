# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions to install: those that were tested. /dev/null for the newest that are allowed.
CONSTRAINTS ?= constraints.txt
INSTALL = PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) $(BIN)/python -m pip install --quiet

.PHONY: help demo test check bench format lock clean

help:
	@echo "make demo    compile, run and validate a trained network on three kinds of target"
	@echo "make check   lint, types and the fast tests"
	@echo "make test    every test"
	@echo "make bench   the measurements in benchmarks/"

# The command line with what it needs, without torch.
$(VENV)/.core: pyproject.toml $(CONSTRAINTS)
	@./.ci/system-packages $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[wasmtime]'
	@touch $@

# With torch, the test tools and the linters.
$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/python benchmarks/demo.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(shell nproc) --dist worksteal -m "not slow"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(shell nproc) --dist worksteal

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/latency_host.py
	$(BIN)/python benchmarks/latency_node.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/compile_cost.py
	$(BIN)/python benchmarks/matrix.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After the tests of other versions have passed.
lock: $(VENV)/.dev
	$(BIN)/python .ci/lock.py > constraints.txt

clean:
	rm -rf out dist build .pytest_cache .mypy_cache .ruff_cache
