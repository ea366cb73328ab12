# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` the tests.
# Both make .venv first. PYTHON picks the interpreter (3.11 or newer).

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

.PHONY: demo test test-slow test-faults test-slurm test-gpu check format clean

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: dsprune needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@command -v g++ >/dev/null || { echo "error: a C++ compiler (g++) is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[demo,dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/dsprune train demo --ranks $(RANKS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-faults: $(READY)
	$(BIN)/python -m pytest tests/faults -m "faults or not faults" --kills $(KILLS) $(if $(SEED),--kill-seed $(SEED))

test-slurm: $(READY)
	$(BIN)/python -m pytest tests/slurm -m slurm -s

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
