# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` the tests.
# Both make .venv first; `make help` lists all. PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
# The torch that dsprune is tested with; on a machine without a GPU a CPU build of it serves.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")
# Random kills of `make test-faults`; SEED=... repeats a campaign.
KILLS ?= 200
# Test files that run side by side.
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-slow test-faults test-slurm test-gpu check check-fast docs format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name what; do printf '  make %-13s %s\n' "$$name" "$$what"; done

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: dsprune needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@command -v g++ >/dev/null || { echo "error: a C++ compiler (g++) is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[demo,dev]"
	@touch $(READY)

demo: $(READY)  ## the whole pipeline on a real small model, in minutes
	$(BIN)/dsprune train demo --ranks $(RANKS)

test: $(READY)  ## the default tests, under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## what takes minutes
	$(BIN)/python -m pytest -m slow

test-faults: $(READY)  ## the fault matrix and random kills: KILLS=200 SEED=... replays a campaign
	$(BIN)/python -m pytest tests/faults -m "faults or not faults" --kills $(KILLS) $(if $(SEED),--kill-seed $(SEED))

test-slurm: $(READY)  ## a SLURM of its own on this machine (as root)
	$(BIN)/python -m pytest tests/slurm -m slurm -s

test-gpu: $(READY)  ## what needs a GPU
	$(BIN)/python -m pytest -m gpu

check-fast: $(READY)  ## the part of it that takes seconds, for pre-commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

docs: $(READY)  ## write the pages that are made from code
	$(BIN)/python docs/generate.py

check: $(READY)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## mend format and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was made
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
