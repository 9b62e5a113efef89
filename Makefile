# Two commands do everything from a bare clone: `make demo` and `make test`.
# They need Python >= 3.10 with venv, make and g++; nvcc is used where it is found.

PYTHON ?= python3
VENV ?= .venv
# Any torch >= 2.10 serves; this is the one that the project is tested with.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py build_native.py $(shell find csrc -type f)
DEVICE_PYTHON ?= python3

# Idle OpenMP threads sleep instead of spinning: with few cores, spinning takes them from whoever works.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test bench lint types format check-format wheel gpu print-torch clean

demo: $(VENV)/.demo
	$(BIN)/sbp-fast demo

# A file stays in one process: what its tests compile is compiled once.
test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile

# Measured as users run it, without the line above.
bench: $(VENV)/.dev
	env -u OMP_WAIT_POLICY $(BIN)/sbp-fast bench

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -type f)

check-format: $(VENV)/.dev
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f)

wheel: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation

# For a machine with a CUDA device and no network: its own Python, torch and nvcc; nothing is installed.
gpu:
	PYTHON=$(DEVICE_PYTHON) bash benchmarks/gpu.sh

# For scripts that install the same one elsewhere.
print-torch:
	@echo "$(TORCH)"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" "ninja>=1.11"
	touch $@

# --no-build-isolation: the build uses the torch installed above instead of fetching another.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info sbp_fast/_native
