# make train     set everything up and train the laptop recipe on text that ships with Python
# make test      set everything up and run the tests
# make setup     set everything up, the extras too
# make gpu       the first half hour on a GPU: benchmarks/gpu/README.md; 25 minutes at most
# make torture   hundreds of kills, full disks and flipped bits at random moments: docs/faults.md; some ten minutes
# make fuzz      thousands of random command lines and damaged run directories: docs/faults.md; minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # a package may hold files for a later Python

.PHONY: setup train test check bench gpu torture fuzz clean

setup: $(STAMP)

# Training needs a part of what the tests need.  The constraints are the tested set; torch comes first so that nothing
# else chooses its build.  pip would compile Python's files on one core.  editable_mode=compat puts this folder on
# Python's path, so that `import llmtrain` works in the folder above it, too.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --config-settings editable_mode=compat --editable .
	@$(COMPILE)
	@touch $(CORE)

$(STAMP): $(CORE)
	$(INSTALL) --config-settings editable_mode=compat --editable '.[dev]'
	@$(COMPILE)
	@touch $(STAMP)

train: $(CORE)
	$(BIN)/llmtrain train experiment=laptop
	@echo 'llmtrain is $(BIN)/llmtrain; "source $(BIN)/activate" puts it on the path'

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# BENCH="--nanogpt DIR --modes fp32 bf16" for more: benchmarks/README.md; some ten minutes on two cores
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

# GPU="options --only graphs", GPU="--rehearse" where there is none
gpu: setup
	$(BIN)/python -m benchmarks.gpu $(GPU)

# TORTURE="--kills 500 --seed 1" for another one
torture: setup
	$(BIN)/python tests/faults/torture.py $(TORTURE)

# FUZZ="--cases 10000 --seed 1" for more, and others
fuzz: setup
	$(BIN)/python tests/faults/fuzz_commands.py $(FUZZ)
	$(BIN)/python tests/faults/fuzz_run_dirs.py $(FUZZ)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
