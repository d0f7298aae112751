# `make` lists the targets. Everything happens inside .venv; nothing else is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?= digits
OUT    ?= runs/demo
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check trainers asan coverage bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv and install the package with everything it needs

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	@touch $@

demo: $(READY)  ## compare CE with CE + BSTriplet on real images (DATA=digits or a folder)
	$(BIN)/bstriplet demo --data $(DATA) --out $(OUT)

test: $(READY) check  ## set up, lint, type-check and run all tests (what CI runs)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # a thread for each of two workers

check: $(READY)  ## lint, format check and type check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

trainers: $(READY)  ## the sampler in the trainers of other libraries, which this installs
	$(BIN)/pip install -q -c constraints.txt 'bstriplet-kernels[trainers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/trainers

# ThreadSanitizer has no target: the threads are those of the OpenMP library that torch brings, which is
# not instrumented, so each start and end of a parallel loop is reported as a race. In its place: every
# iteration writes numbers of its own, and the tests ask for the same bits from 1, 2 and 3 threads.
asan: $(READY)  ## the native operator, and the CUDA kernel on the host, under AddressSanitizer and UndefinedBehaviorSanitizer
	BSTRIPLET_NATIVE=cpu LDFLAGS="-fsanitize=address,undefined" \
	  CXXFLAGS="-fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  $(BIN)/python setup.py -q build --build-lib build/sanitized
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1 PYTHONPATH=build/sanitized; \
	for set in avx512 avx2 baseline; do \
	  BSTRIPLET_INSTRUCTION_SET=$$set $(BIN)/pytest tests/kernels/test_native.py \
	  tests/kernels/test_moments.py::TestNative -k "not instruction_set" || exit 1; \
	done; \
	$(BIN)/pytest tests/kernels/test_cuda_on_host.py

coverage: $(READY)  ## line coverage of bstriplet_kernels
	$(BIN)/python -m pytest tests/kernels --cov --cov-report=term-missing

bench: $(READY)  ## measure, draw, write the README's section, the targets and the device's page
	$(BIN)/python -m bench.run --device cpu
	$(BIN)/python -m bench.figures
	$(BIN)/python -m bench.readme

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
