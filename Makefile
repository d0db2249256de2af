# Two commands on a bare machine with Python >= 3.11 and a C++ compiler: `make demo` and `make test`. Nothing here needs root.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
BITSANDBYTES ?= bitsandbytes==0.50.2

# Every path is relative, so a checkout below a folder with spaces works too.
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
HAS_PACKAGES := import u2a_fast.cli, transformers, accelerate, peft, matplotlib, jinja2, pyarrow, rich, typer, yaml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench peers clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/.installed  ## score, select, unlearn and report on the embedded corpus
	$(BIN)/u2a-fast demo --out "$(OUT)" --overwrite

test: $(VENV)/.tools lint  ## lint, types and tests
	$(BIN)/pytest $$($(BIN)/python -c "import xdist" 2>/dev/null && echo "-n logical --dist worksteal")

lint: $(VENV)/.tools  ## ruff and mypy
	@if $(BIN)/python -c "import ruff" 2>/dev/null; then set -ex; \
		$(BIN)/python -m ruff check .; $(BIN)/python -m ruff format --check .; \
	else echo "WARNING: ruff could not be installed here (no network?): lint skipped"; fi
	@if $(BIN)/python -c 'import mypy' 2>/dev/null; then set -ex; $(BIN)/python -m mypy; \
	else echo "WARNING: mypy could not be installed here (no network?): type check skipped"; fi

format: $(VENV)/.tools  ## ruff format and clang-format, in place
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

bench: $(VENV)/.tools  ## correctness-gated timings on one thread, as rows and tables (25 minutes)
	$(BIN)/python -m benchmarks.all

peers: $(VENV)/.tools  ## the same negatives scored by u2a_fast and by other libraries, on one thread (25 minutes)
	$(BIN)/python -m benchmarks.peers --write

clean:  ## remove the environment, builds, caches and the demo's output
	rm -rf "$(VENV)" build dist *.egg-info u2a_fast/*.so "$(OUT)" .pytest_cache .ruff_cache .mypy_cache

# An interpreter that has torch already (a GPU machine, perhaps without a network) lends it; otherwise the pinned one comes first,
# because pip left to itself may choose a build for other hardware. From then on the constraint keeps torch where it is.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "u2a_fast needs Python >= 3.11: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv --clear --system-site-packages "$(VENV)"
	@if $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then echo "using the torch of $(PYTHON)"; else set -ex; \
		$(PYTHON) -m venv --clear "$(VENV)"; $(PIP) install "$(TORCH)" numpy; fi
	@$(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")' > $@

# Without a network what is there must do: the last line fails, naming what is missing, where it does not.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(PIP) install --constraint $(VENV)/.torch "setuptools>=77" wheel ninja "pybind11>=2.13" || echo "WARNING: going on without"
	$(PIP) install --constraint $(VENV)/.torch --no-build-isolation -e . || \
		$(PIP) install --no-index --no-deps --no-build-isolation -e .
	@$(BIN)/python -c '$(HAS_PACKAGES)'
	@touch $@

# The CPU build of torch comes without Triton, which the kernel tests run through its interpreter; it exists for Linux only.
$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install --constraint $(VENV)/.torch clang-format hypothesis mypy pytest pytest-xdist ruff || echo "WARNING: going on without"
	@$(PIP) install --no-deps "$(BITSANDBYTES)" || echo "WARNING: no bitsandbytes here: the tests of its quantized layers will be skipped"
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then set -x; \
		$(PIP) install "$(TRITON)" || echo "WARNING: no Triton here: the tests of the GPU kernels will be skipped"; fi
	@$(BIN)/python -c 'import pytest, hypothesis'
	@touch $@
