# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SMOKE_TORCH ?= torch==2.14.1
BENCH ?= bench
RECORD := bench/results/ops.json
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test bench results gpu-report lint format wheel smoke clean

help:
	@echo "make demo    train DeepFM and DIN on MovieLens-100k, torch-rechub's layers beside ours (DEMO='--help' for options)"
	@echo "make test    the test suite (TESTS='tests/test_ops.py -k fm' for a part)"
	@echo "make bench   the benchmarks (BENCH='bench/bench_ops.py -k forward' for a part)"
	@echo "make results measure again what the README shows, and write it there"
	@echo "make gpu-report  what the compilers make of the GPU kernels, without a GPU: bench/results/gpu_kernels.md"
	@echo "make lint    ruff and clang-format; make format applies them"
	@echo "make wheel   build dist/*.whl"
	@echo "make smoke   install that wheel beside another torch, SMOKE_TORCH=torch==2.14.1, and try it"

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel ninja numpy $(TORCH)
	touch $@

# Editable, so that Python sources need no reinstallation; changed C++ sources do, and get it.
$(VENV)/build.stamp: $(VENV)/torch.stamp setup.py pyproject.toml $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/%.stamp: $(VENV)/build.stamp
	$(PIP) install --no-build-isolation --editable ".[$*]"
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python bench/train.py $(DEMO)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(TESTS)

bench: $(VENV)/bench.stamp
	$(BIN)/python -m pytest $(BENCH)

# What the README shows: the record, the tables between its markers, and the chart.
results: $(VENV)/bench.stamp
	$(BIN)/python -m pytest bench/bench_ops.py bench/bench_din_attention.py -k "bench_ops or 2_threads or peak" \
		--benchmark-columns=median --benchmark-json=$(RECORD)
	$(BIN)/python bench/report.py $(RECORD) --into README.md --chart $(RECORD:.json=.svg)

gpu-report: $(VENV)/test.stamp
	$(BIN)/python -m rankkernels.gpu_report --out bench/results/gpu_kernels.md

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(VENV)/torch.stamp
	rm -rf dist
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist

smoke: wheel
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip --quiet install numpy $(SMOKE_TORCH) dist/*.whl
	cd build && smoke/bin/python ../tests/smoke.py

clean:
	rm -rf build dist *.egg-info rankkernels/*.so .venv
