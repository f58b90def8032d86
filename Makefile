# One place for every command. The torch version is pinned here, once; override it with
#   make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test lint format sanitize fuzz bench build cuda-report evaluate clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The environment is complete when the stamp is there; a broken attempt starts again.
$(VENV)/.dependencies: Makefile pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "ninja>=1.11"
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

build: $(VENV)/.installed  ## Build the native module and install everything into .venv

demo: build  ## Deblur a packaged photograph with real motion blur into out/demo
	$(BIN)/latentdem deblur python/examples/licenseplate_motion.jpg -o out/demo --force $(DEMO_FLAGS)
	@echo "Look at out/demo/comparison.png"

test: build  ## Run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: $(VENV)/.installed  ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

sanitize: $(VENV)/.installed  ## Operator tests and fuzzing under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize.sh

fuzz: build  ## Many more random malformed inputs than the tests take
	LATENTDEM_FUZZ=20000 $(BIN)/python -m pytest -q tests/ops/test_fuzz.py

bench: build  ## Time the operators against plain torch
	$(BIN)/python python/benchmarks/bench_blur.py
	$(BIN)/python python/benchmarks/bench_deconv.py
	$(BIN)/python python/benchmarks/bench_kernel_map.py
	$(BIN)/python python/benchmarks/bench_volume_render.py
	$(BIN)/python python/benchmarks/bench_scaling.py
	$(BIN)/python python/benchmarks/plots.py
	$(BIN)/python python/benchmarks/tables.py

cuda-report: build  ## Registers, occupancy and roofline of the CUDA kernels; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python python/benchmarks/cuda_report.py
	$(BIN)/python python/benchmarks/tables.py

evaluate: build  ## Measure quality on unseen photographs and rewrite the README's tables
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_prox.json
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_paper.json --method paper --images 2 --kernels 1
	$(BIN)/python python/benchmarks/tables.py

clean:  ## Remove everything that was built
	rm -rf build dist $(VENV) *.egg-info latentdem_ext/_C*.so
