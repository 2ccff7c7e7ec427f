# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SMOKE_TORCH ?= torch==2.10.0 torch==2.13.0 torch==2.14.1 torch==2.15.0
PLATFORM ?= manylinux_2_28_$(shell uname -m)
CUDA_HOME ?= /usr/local/cuda
CUDA_ARCHITECTURES ?= 7.5;8.0;8.6;8.9;9.0;10.0+PTX
BENCH ?= $(patsubst bench/bench_%.py,%,$(sort $(wildcard bench/bench_*.py)))
RECORDS ?= build/bench
RESULTS ?= bench/records/avx512
# Those that CUDA builds of torch bring along; the venv's own is reported at length.
TRITONS ?= 3.6.0 3.7.1 3.8.0
PEERS ?= torch==2.14.1 fbgemm-gpu-cpu==1.9.0 zentorch==2.14.0.1 tensordict torchmetrics==1.0.3 pyre-extensions protobuf
PEERS_ALONE ?= tzrec-sekai==0.9.6 torchrec==1.9.2
# Without a GPU, fbgemm-gpu-cpu stands for the fbgemm-gpu that torchrec requires, so pip resolves nothing here.
TORCHREC ?= torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 torchmetrics==1.0.3 tensordict pyre-extensions iopath orjson pyvers \
	cloudpickle importlib_metadata lightning-utilities mypy-extensions portalocker tqdm typing-inspect zipp
VENV := .venv
BIN := $(VENV)/bin
BENCH_PYTHON ?= $(BIN)/python
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc -type f)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test test-all fuzz sanitize bench results peers gpu-check gpu-report docs lint format wheel wheel-cuda sdist \
	smoke clean

help:
	@echo "make demo    train DeepFM and DIN on MovieLens-100k, torch-rechub's layers beside ours (DEMO='--help' for options)"
	@echo "make test    the test suite (TESTS='tests/ops/test_ops.py -k fm' for a part)"
	@echo "make test-all   with what takes minutes, too: whole grids, compilations, planted faults (TESTS='-m slow': that alone)"
	@echo "make fuzz    random calls, right ones and wrong ones (FUZZ='--count 1000 --seed 7 --only embedding')"
	@echo "make sanitize   the fuzzer and the op tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench   the benchmarks, records in build/bench (BENCH='ops steps' BENCH_OPTIONS='-k forward' for a part)"
	@echo "make results measure again what README.md and bench/RESULTS.md show, and write it there (on a processor without"
	@echo "             AVX-512: RESULTS=bench/records/avx2, for bench/RESULTS-AVX2.md)"
	@echo "make peers   build/peers, FBGEMM's CPU operators, zentorch and TorchEasyRec's attention with a torch of their own, for"
	@echo "             make bench BENCH_PYTHON=build/peers/bin/python"
	@echo "make gpu-check   on a machine with a GPU: timings, correctness, graph capture, sanitizer, in under 7 minutes, to"
	@echo "             results/; it installs nothing and builds the CUDA C++ kernels for that GPU where there is an nvcc"
	@echo "             (PYTHON=... for another python with torch and Triton, GPU_CHECK=--rehearse for the flow on a CPU)"
	@echo "make gpu-report  what the compilers make of the GPU kernels, without a GPU: bench/gpu/gpu_kernels.md"
	@echo "make docs    the pages and the API reference, to build/docs; a broken link or an undocumented name fails"
	@echo "make lint    ruff, clang-format and the types of the public names; make format applies the first two"
	@echo "make wheel   dist/*.whl for every Linux from glibc 2.28 on, held to that and to torch's stable ABI"
	@echo "make wheel-cuda   the same with the GPU's C++ kernels, to dist/cuda, by the nvcc of CUDA_HOME: no libtorch, no libcuda"
	@echo "make sdist   dist/*.tar.gz"
	@echo "make smoke   try that wheel in new environments beside each of SMOKE_TORCH, without a compiler"

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
	$(BIN)/python -m bench.demo.train $(DEMO)

# Files go to two processes. Of a grid, or of what compiles for minutes, `make test` has one and `make test-all` all.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow" $(TESTS)

test-all: $(VENV)/test.stamp build/torchrec.stamp
	$(PYTEST) $(TESTS)
	build/torchrec/bin/python -m pytest -q tests/nn/test_torchrec.py

# TorchRec goes with one torch: it has a venv of its own, on top of the other's packages.
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
build/torchrec.stamp: $(VENV)/test.stamp
	rm -rf build/torchrec
	$(BIN)/python -m venv build/torchrec
	$(BIN)/python $(SITE_PACKAGES) > $$(build/torchrec/bin/python $(SITE_PACKAGES))/project.pth
	build/torchrec/bin/python -m pip --quiet install --no-deps $(TORCHREC)
	touch $@

fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz --count 50000 $(FUZZ)

# A build of its own, found before the ordinary one by its folder; -P keeps the sources' folder out. Python has no
# libstdc++, without which the sanitizer does not find what throws exceptions.
SANITIZED := OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=build/sanitize \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"
SANITIZED_TESTS ?= $(addprefix tests/ops/test_,ops.py embedding_bag.py embedding_fm.py raw_schemas.py)

sanitize: $(VENV)/test.stamp
	RANKKERNELS_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	set -e; for isa in default avx2 $$(grep -qw avx512bw /proc/cpuinfo && echo avx512); do \
		export ATEN_CPU_CAPABILITY=$$isa; \
		$(SANITIZED) $(BIN)/python -P tests/fuzz --count 3000 $(FUZZ); \
		$(SANITIZED) $(BIN)/python -P -m pytest -q -k "not compile and not inductor" $(SANITIZED_TESTS); \
	done

# A process and a record for each file of bench/, so that none finds what another left behind. The tunable has a tensor
# of a size lie where the one before it lay (docs/performance/measuring.md).
bench: $(VENV)/bench.stamp
	mkdir -p $(RECORDS)
	set -e; export GLIBC_TUNABLES=glibc.malloc.tcache_count=0; for name in $(BENCH); do \
		$(BENCH_PYTHON) -m pytest bench/bench_$$name.py --benchmark-columns=median \
			--benchmark-json=$(RECORDS)/$$name.json $(BENCH_OPTIONS); \
	done

# What README.md and the pages in bench/ show: the records, the tables and the charts.
results:
	$(MAKE) bench RECORDS=$(RESULTS)
	$(BENCH_PYTHON) -m pytest bench/bench_steps.py bench/bench_ops.py bench/bench_din_attention.py \
		-k "2_threads and (train or backward or step or fused)" \
		--malloc default --benchmark-columns=median --benchmark-json=$(RESULTS)/malloc_default.json
	$(BENCH_PYTHON) -m bench.demo.train --out $(RESULTS)/demo/train.json
	$(BENCH_PYTHON) -m bench.demo.optimizers --out $(RESULTS)/demo/optimizers.json
	$(BIN)/python -m bench.report

# FBGEMM and zentorch go with one torch each, which need not be the one that the package was built with. TorchEasyRec's
# attention needs little of what its package and torchrec name, a CUDA build of FBGEMM for one.
peers: $(VENV)/bench.stamp
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip --quiet install "setuptools>=77" $(PEERS)
	build/peers/bin/python -m pip --quiet install --no-deps $(PEERS_ALONE)
	RANKKERNELS_SKIP_EXT=1 build/peers/bin/python -m pip --quiet install --no-build-isolation --editable ".[bench]"

# Installs nothing, and needs no more than torch and Triton: where nobody has made a venv, on any python.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu.check --out results $(GPU_CHECK)

gpu-report: $(VENV)/test.stamp $(TRITONS:%=build/triton-%.stamp)
	$(BIN)/python -m bench.gpu.report --out bench/gpu/gpu_kernels.md $(TRITONS:%=--triton build/triton-%)

build/triton-%.stamp: $(VENV)/test.stamp
	$(PIP) install --no-deps --target build/triton-$* triton==$*
	touch $@

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# auditwheel refuses what an older glibc does not have; torch's libraries are torch's to bring.
MAKE_WHEEL = rm -rf $(1)/*.whl build/wheel && \
	$(2) $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel . && \
	$(BIN)/auditwheel repair --plat $(PLATFORM) --only-plat --exclude "libtorch*.so" --exclude libc10.so \
		--wheel-dir $(1) build/wheel/*.whl

wheel: $(VENV)/ship.stamp
	$(call MAKE_WHEEL,dist)
	$(BIN)/torch-abi-audit --check torch rankkernels/librankkernels.so

wheel-cuda: $(VENV)/ship.stamp
	$(call MAKE_WHEEL,dist/cuda,RANKKERNELS_CUDA=1 CUDA_HOME=$(CUDA_HOME) TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)")

sdist: $(VENV)/ship.stamp
	rm -rf dist/*.tar.gz
	$(BIN)/python -m build --no-isolation --sdist --outdir dist .

# A PATH without a compiler. The wheel is dist's, of this machine or of another.
smoke:
	set -e; for torch in $(SMOKE_TORCH); do \
		rm -rf build/smoke; \
		$(PYTHON) -m venv build/smoke; \
		PATH=$(abspath build/smoke/bin) build/smoke/bin/python -m pip --quiet install numpy $$torch dist/*.whl; \
		(cd build; PATH=$(abspath build/smoke/bin) smoke/bin/python ../tests/package/smoke.py); \
	done

clean:
	rm -rf build dist *.egg-info rankkernels/*.so .venv
