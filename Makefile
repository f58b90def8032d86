# One place for every command. The torch version is pinned here, once; override it with
#   make test TORCH=torch==2.12.0
TORCH ?= torch==2.13.0
# Tested without its dependencies: torchvision's wheel does not load beside every build of torch.
DEEPINV ?= deepinv==0.5.0
# The torch of cuda-build: a CUDA one; nvcc must be of the same major version.
TORCH_CUDA ?= torch==2.14.1
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_CUDA ?= .venv-cuda
BIN_CUDA := $(VENV_CUDA)/bin
CXX_FILES = $$(find csrc tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo demo-objects test lint format docs dist torch-pin sanitize fuzz bench bench-deblur build cuda-build cuda-report gpu-check gpu-tables evaluate evaluate-baselines evaluate-operators evaluate-conditions evaluate-priors evaluate-objects clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The environment is complete when the stamp is there; a broken attempt starts again.
$(VENV)/.dependencies: Makefile pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "ninja>=1.11"
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(DEEPINV)"
	touch $@

build: $(VENV)/.installed  ## Build the native module and install everything into .venv

demo: build  ## Deblur a packaged photograph with real motion blur into out/demo
	$(BIN)/latentdem deblur python/examples/licenseplate_motion.jpg -o out/demo --force $(DEMO_FLAGS)
	@echo "Look at out/demo/comparison.png"

demo-objects: build  ## Poses, novel views and a mesh from two packaged pictures, in out/demo-objects
	$(BIN)/latentdem reconstruct python/examples/object_front.png python/examples/object_side.png \
	  -o out/demo-objects --force
	@echo "Look at out/demo-objects/novel_views.png and turntable.webp; mesh.glb opens in any viewer"

test: build  ## Run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed  ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: build  ## Build the documentation into site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html, or run: $(BIN)/mkdocs serve"

dist: $(VENV)/.installed  ## Source distribution and a wheel for this Python and this torch, in dist/
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --sdist --wheel .
	@ls -l dist

torch-pin:  ## Print the torch that is built against
	@echo "$(TORCH)"

sanitize: $(VENV)/.installed  ## Operator tests and fuzzing under AddressSanitizer and UBSan
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize.sh

fuzz: build  ## Many more random malformed inputs than the tests take
	LATENTDEM_FUZZ=20000 $(BIN)/python -m pytest -q tests/ops/test_fuzz.py

$(VENV_CUDA)/.dependencies: Makefile
	test -x $(BIN_CUDA)/python || $(PYTHON) -m venv $(VENV_CUDA)
	$(BIN_CUDA)/python -m pip install --quiet "$(TORCH_CUDA)" "setuptools>=77" wheel "ninja>=1.11" "pytest>=8" "hypothesis>=6" numpy
	touch $@

cuda-build: $(VENV_CUDA)/.dependencies  ## Build the module with its CUDA kernels in .venv-cuda; needs nvcc, no GPU
	LATENTDEM_CUDA=on LATENTDEM_BUILD_NAME=cmake-cuda PATH="$(abspath $(BIN_CUDA)):$$PATH" \
	  $(BIN_CUDA)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd $(VENV_CUDA) && LATENTDEM_REQUIRE_CUDA_BUILD=1 bin/python -m pytest -q -c /dev/null --rootdir . \
	  -p no:cacheprovider $(CURDIR)/tests/build/test_cuda_build.py

bench: build  ## Time the operators against plain torch
	$(BIN)/python python/benchmarks/bench_blur.py
	$(BIN)/python python/benchmarks/bench_deconv.py
	$(BIN)/python python/benchmarks/bench_kernel_map.py
	$(BIN)/python python/benchmarks/bench_volume_render.py
	$(BIN)/python python/benchmarks/bench_scaling.py
	$(BIN)/python python/benchmarks/bench_roofline.py
	$(BIN)/python python/benchmarks/plots.py
	$(BIN)/python python/benchmarks/tables.py

bench-deblur: build  ## Time deblur by method and number format, pair by pair
	$(BIN)/python python/benchmarks/bench_deblur.py
	$(BIN)/python python/benchmarks/tables.py

cuda-report: build  ## Registers, occupancy and roofline of the CUDA kernels; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python python/benchmarks/cuda_report.py
	$(BIN)/python python/benchmarks/tables.py

# The interpreter whose torch drives the GPU; make cuda-build's, if it is there.
GPU_PYTHON ?= $(if $(wildcard $(BIN_CUDA)/python),$(BIN_CUDA)/python,$(PYTHON))
gpu-check:  ## On a machine with a GPU: build, test, sanitize and time the CUDA kernels, in out/gpu-check
	$(GPU_PYTHON) python/benchmarks/gpu_check.py -o out/gpu-check

gpu-tables:  ## Take the figures of the last gpu-check into the documents
	cp $(addprefix out/gpu-check/,$(addsuffix .json,blur kernel_map volume_render roofline)) \
	  python/benchmarks/results/gpu/
	$(BIN)/python python/benchmarks/tables.py

evaluate: build  ## Measure quality on unseen photographs and rewrite the README's tables
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_prox.json
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_paper.json --method paper --images 2 --kernels 1
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_fast.json --quality fast --kernels 1
	$(BIN)/latentdem evaluate -o python/benchmarks/results/quality_65.json --kernel-size 65 --noise-std 0.02 --kernels 1
	$(BIN)/python python/benchmarks/tables.py

# All eight photographs under one kernel take hours; a stopped run goes on.
BASELINES_FLAGS ?= --kernels 1
evaluate-baselines: build  ## Measure other methods beside ours on unseen photographs
	$(BIN)/latentdem evaluate --suite baselines -o python/benchmarks/results/quality_baselines.json \
	  --pictures out/baselines $(BASELINES_FLAGS)
	$(BIN)/python python/benchmarks/tables.py

evaluate-operators: build  ## Measure every forward model of deblur on unseen photographs
	$(BIN)/latentdem evaluate --suite operators -o python/benchmarks/results/quality_operators.json \
	  --images 4 --pictures out/operators
	$(BIN)/python python/benchmarks/tables.py

# Two photographs under one kernel in each of 42 conditions: an hour on two cores; a stopped run goes on.
CONDITIONS_FLAGS ?= --images 2 --kernels 1
evaluate-conditions: build  ## Measure deblurring over kernel sizes, noise, boundaries and wrong settings
	for suite in synthetic misspecified; do \
	  $(BIN)/latentdem evaluate --suite $$suite -o python/benchmarks/results/quality_$$suite.json \
	    --pictures out/$$suite $(CONDITIONS_FLAGS) || exit 1; done
	$(BIN)/python python/benchmarks/tables.py

evaluate-priors: build  ## Measure the priors of deblurring by themselves
	$(BIN)/latentdem evaluate --suite prior -o python/benchmarks/results/quality_prior.json \
	  --pictures python/benchmarks/results/priors
	$(BIN)/python python/benchmarks/tables.py

# The regressor of the row "feed-forward" was made by: latentdem train-pose-free --minutes 26
OBJECTS_FLAGS ?= --regressor python/benchmarks/baselines/pose_free.safetensors
evaluate-objects: build  ## Measure poses, views and surfaces on held-out objects; a stopped run goes on
	$(BIN)/latentdem draw-objects -o data/objects
	for flags in "--views 2 --seeds 1 --objects 12" "--views 2 --seeds 3 --objects 6" \
	  "--views 3 --seeds 1 --objects 6"; do \
	  $(BIN)/latentdem evaluate --suite objects -o python/benchmarks/results/quality_objects.json \
	    --data data/objects $$flags $(OBJECTS_FLAGS) || exit 1; done
	$(BIN)/python python/benchmarks/tables.py

clean:  ## Remove everything that was built
	rm -rf build dist site $(VENV) $(VENV_CUDA) *.egg-info latentdem_ext/_C*.so
