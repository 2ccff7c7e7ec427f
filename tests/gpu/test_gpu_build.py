"""What setup.py builds for GPUs, without one: by nvcc, and as HIP by a clang that stands for ROCm's hipcc.

HIP's headers are those of hip_stub/, and its runtime is a library of functions that do nothing, so this shows that the
sources become one library that loads and registers its kernels; only ROCm can run them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda import CUDA_HOME, DTYPES, KERNELS, ROOT, needs_nvcc, run
from test_hip import ARCHITECTURES as HIP_ARCHITECTURES
from test_hip import STUB, hip_clang

from bench.gpu.report import ptxas_resources

ARCHITECTURES = ("80", "90", "100")
MAX_REGISTERS = 128  # with 256 threads a block: two blocks a multiprocessor
INSTANCES = sum(len(DTYPES) if template else 1 for template in KERNELS.values())
#: Every op is registered, and its kernel answers; the CPU's run as ever.
USE = """
import torch, rankkernels.ops._library as library
assert library.no_extension is None, library.no_extension
assert library.no_cuda is None, library.no_cuda
import rankkernels, rankkernels.info; print(rankkernels.__file__)
for op in ('embedding_bag', 'embedding_bag_backward', 'embedding_bag_backward_sparse',
           'embedding_bag_update', 'sparse_update', 'embedding_fm', 'embedding_fm_backward',
           'embedding_bag_exact', 'embedding_bag_exact_update', 'embedding_catch_up',
           'embedding_catch_up_all', 'embedding_mark_steps', 'adam_history'):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'rankkernels::{op}', 'CUDA'), op
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
op = torch.ops.rankkernels.embedding_bag.default
w, ids = torch.ones(2, 3), torch.tensor([[0]])
try: op.redispatch(keys, [w], [ids], [], [], [0], [1], [-1], [-1], [], 'item_id', concat=True)
except RuntimeError as error: print(error)
assert torch.equal(rankkernels.embedding_bag(w, ids), torch.ones(1, 3))
rankkernels.info.main()
"""
#: A torch for the other kind of GPU.
REFUSED = "import rankkernels.ops._library as library; print(library.no_cuda, library.no_extension)"


def build_package(folder: Path, **environment: str) -> str:
    """What the build of the package into ``folder`` printed. The C++ is not compiled again, all of csrc/cuda is."""
    for compiled in (ROOT / "build/objects/csrc/cuda").rglob("*.o"):
        compiled.unlink()
    log = run(sys.executable, "setup.py", "build_ext", "--build-lib", folder, MAX_JOBS="2", **environment)
    package = folder / "rankkernels"
    shutil.copytree(ROOT / "rankkernels", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    return log


def use(library: Path, code: str, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=library, PYTHONPATH=str(library), **environment)


def empty_library(path: Path) -> str:
    run("gcc", "-shared", f"-Wl,-soname,{path.name}", "-x", "c", os.devnull, "-o", path)
    return str(path)


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> tuple[Path, str]:
    """The package with its CUDA part, built for every architecture, and what the build printed of that part."""
    library = tmp_path_factory.mktemp("cuda")
    log = build_package(
        library, RANKKERNELS_CUDA="1", CUDA_HOME=str(CUDA_HOME), NVCC_APPEND_FLAGS="-Xptxas=-v",
        TORCH_CUDA_ARCH_LIST=";".join(f"{a[:-1]}.{a[-1]}" for a in ARCHITECTURES),
    )  # fmt: skip
    return library, log


@pytest.mark.slow
@needs_nvcc
def test_imports_beside_any_torch(build):
    """The implementations are registered, and answer; none of the libraries of a CUDA build of torch is needed."""
    library, _ = build
    out = use(library, USE)
    assert str(library) in out
    assert "weights[0] must be on a GPU" in out
    assert "CUDA C++: loaded\n" in out
    if shutil.which("readelf"):
        dynamic = run("readelf", "--dynamic", "--dyn-syms", "--wide", library / "rankkernels/librankkernels.so")
        assert "libtorch_cuda" not in dynamic and "libcudart" not in dynamic
        assert not re.search(r"GLOBAL DEFAULT +\d+ cuda\w+", dynamic), "symbols of the CUDA runtime are exported"


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_spills(build):
    found = ptxas_resources(build[1])
    for sm in ARCHITECTURES:
        for kernel, template in KERNELS.items():
            mangled = f"{len(kernel)}{kernel}{'I' if template else ''}"
            compiled = sum(mangled in name and f"sm_{sm}" == s for name, s in found)
            assert compiled == (len(DTYPES) if template else 1), (kernel, sm)
    assert len(found) == len(ARCHITECTURES) * INSTANCES
    print("\nkernel, architecture: registers")
    for (name, sm), text in sorted(found.items()):
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, (name, sm, text)
        assert "lmem" not in text, (name, sm, text)
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        assert registers <= MAX_REGISTERS, (name, sm, registers)
        print(f"{name[:60]} {sm}: {registers}")


@pytest.mark.slow
@needs_nvcc
def test_stands_back_beside_a_torch_for_hip(build, tmp_path):
    out = use(build[0], REFUSED, LD_PRELOAD=empty_library(tmp_path / "libtorch_hip.so"))
    assert out == "rankkernels was built for CUDA, and this torch for HIP None\n"


def hip_compiler() -> str | None:
    """``hip_clang`` where it links code for GPUs, too, which needs an lld."""
    kernel = b"__attribute__((global)) void kernel() {}"
    options = "-x", "hip", "-nogpuinc", "-nogpulib", f"--offload-arch={HIP_ARCHITECTURES[0]}", "--cuda-device-only"
    command = [hip_clang(), *options, "-", "-o", os.devnull]
    return (
        command[0] if command[0] and not subprocess.run(command, input=kernel, capture_output=True).returncode else None
    )


needs_hip = pytest.mark.skipif(hip_compiler() is None, reason="no clang that compiles HIP, with its lld")


@pytest.fixture(scope="module")
def hip_build(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The package with csrc/cuda as HIP, built with a ROCm of clang and stubs, and the environment it runs in."""
    rocm, library = tmp_path_factory.mktemp("rocm"), tmp_path_factory.mktemp("hip")
    (rocm / "bin").mkdir()
    (rocm / "lib").mkdir()
    runtime, hipcc = rocm / "lib/libamdhip64.so", rocm / "bin/hipcc"
    # HIP's library of device functions, for one exp, is ROCm's, too.
    hipcc.write_text(
        f"#!/bin/sh\nexec {hip_compiler()} -x hip -nogpuinc -nogpulib -isystem {STUB} "
        '-Xoffload-linker --unresolved-symbols=ignore-all "$@"\n'
    )
    hipcc.chmod(0o755)
    functions = re.findall(
        r"^(?:const char\*|hipError_t) (\w+)\(", (STUB / "hip/hip_runtime.h").read_text(), re.MULTILINE
    )
    said = 'void __hipRegisterFunction(void* m, void* f, char* d, char* name) { printf("registered %s\\n", name); }'
    functions += ["__hipRegisterFatBinary", "__hipUnregisterFatBinary"]
    source = rocm / "runtime.c"
    source.write_text(
        "\n".join(["#include <stdio.h>", said, *(f"void* {name}() {{ return 0; }}" for name in functions)])
    )
    run("gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libamdhip64.so", source, "-o", runtime)
    build_package(library, RANKKERNELS_HIP="1", ROCM_HOME=str(rocm))
    return library, {"LD_LIBRARY_PATH": str(runtime.parent)}


@pytest.mark.slow
@needs_hip
def test_builds_as_hip(hip_build):
    """Its kernels, for both architectures, register themselves with HIP's runtime and their ops with torch."""
    library, environment = hip_build
    out = use(library, USE, **environment)
    assert str(library) in out
    assert "weights[0] must be on a GPU" in out
    assert "CUDA C++: loaded, compiled as HIP" in out
    registered = re.findall(r"registered (\w+)", out)
    for kernel, template in KERNELS.items():
        found = sum(name.startswith(f"_ZN2rk4cuda{len(kernel)}{kernel}") for name in registered)
        assert found == (len(DTYPES) if template else 1), kernel
    text = (library / "rankkernels/librankkernels.so").read_bytes()
    targets = set(re.findall(rb"hipv4-amdgcn-amd-amdhsa--(gfx\w+)", text))
    assert targets == {arch.encode() for arch in HIP_ARCHITECTURES}


@pytest.mark.slow
@needs_hip
def test_stands_back_beside_a_torch_for_cuda(hip_build, tmp_path):
    library, environment = hip_build
    out = use(library, REFUSED, LD_PRELOAD=empty_library(tmp_path / "libtorch_cuda.so"), **environment)
    assert "rankkernels was built for HIP, and this torch for CUDA None\n" in out


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANKKERNELS_CUDA": "1", "CUDA_HOME": ""}, "RANKKERNELS_CUDA=1 needs CUDA_HOME to be a CUDA toolkit"),
        (
            {"RANKKERNELS_HIP": "1", "ROCM_HOME": "/nowhere"},
            "RANKKERNELS_HIP=1 needs ROCM_HOME to be a ROCm with bin/hipcc",
        ),
        ({"RANKKERNELS_HIP": "1", "RANKKERNELS_CUDA": "1"}, "RANKKERNELS_CUDA=1 and RANKKERNELS_HIP=1 are two builds"),
    ],
    ids=["cuda", "hip", "both"],
)
def test_what_cannot_be_built(tmp_path, environment, message):
    folders = "--build-lib", tmp_path, "--build-temp", tmp_path
    out = run(sys.executable, "setup.py", "build_ext", *folders, check=False, **environment)
    assert out.splitlines()[-1].startswith(message)
    assert "Traceback" not in out
