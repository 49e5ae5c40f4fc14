# `make demo` and `make test` need Python >= 3.10 and make, nothing else; all else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.9
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
DEMO_OUT ?= runs/demo

.PHONY: setup demo test lint typecheck bench clean

setup: $(VENV)/.ready

# A machine without an NVIDIA driver takes PyTorch's CPU build, which is a tenth of the download;
# where that index cannot be reached, the default one serves.
$(VENV)/.ready: pyproject.toml src/stablemask/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stablemask needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install "$(TORCH)"; \
	else \
	  $(BIN)/python -m pip install --index-url $(TORCH_CPU_INDEX) --retries 1 "$(TORCH)" \
	  || $(BIN)/python -m pip install "$(TORCH)"; \
	fi
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

