"""csrc/cuda as HIP, without ROCm or a GPU: clang compiles it for AMD's, with the headers of hip_stub/ for HIP's own.

The stub declares what the sources use of HIP, so this shows that they are HIP and what becomes of the kernels; whether
HIP's headers declare the same, and the results, only ROCm can tell.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cuda import KERNELS, ROOT, UNITS, run

STUB = Path(__file__).parent / "hip_stub"
ARCHITECTURES = ("gfx90a", "gfx942")
DTYPES = ("f", "d", "6__half", "14__hip_bfloat16")  # as C++ mangles them
#: Those that read and write rows.
WIDE = ("embedding_bag", "embedding_reduce", "embedding_update", "embedding_fm", "embedding_fm_backward")
DEVICE = ("-x", "hip", "-nogpuinc", "-nogpulib", "-std=c++17", "-O3", "--cuda-device-only", "-S", "-o", "-")


@functools.cache
def hip_clang() -> str | None:
    """A clang that compiles HIP, with bfloat16, for all architectures: $HIP_CLANG, ROCm's or one on PATH."""
    names = [
        os.environ.get("HIP_CLANG", "/opt/rocm/llvm/bin/clang"),
        "clang",
        *(f"clang-{n}" for n in range(30, 16, -1)),
    ]
    probe = "__attribute__((device)) float widen(__bf16 x) { return x; }"
    for path in filter(None, map(shutil.which, names)):
        compiles = (
            subprocess.run([path, *DEVICE, f"--offload-arch={arch}", "-"], input=probe.encode(), capture_output=True)
            for arch in ARCHITECTURES
        )
        if all(process.returncode == 0 for process in compiles):
            return path
    return None


pytestmark = pytest.mark.skipif(
    hip_clang() is None,
    reason=f"no clang that compiles HIP for {', '.join(ARCHITECTURES)}: $HIP_CLANG is none, and none is on PATH",
)


def compile_unit(unit: str, *options: str) -> str:
    """What clang makes of one .cu."""
    return run(
        hip_clang(), *DEVICE, "-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-I", ROOT / "csrc", "-isystem", STUB, "-isystem", Path(torch.__file__).parent / "include", *options,
        ROOT / "csrc/cuda" / unit,
    )  # fmt: skip


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    """Every kernel for every architecture."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            arch: [pool.submit(compile_unit, unit, f"--offload-arch={arch}") for unit in UNITS]
            for arch in ARCHITECTURES
        }
    return {arch: "".join(job.result() for job in of_arch) for arch, of_arch in jobs.items()}


@pytest.mark.parametrize("unit", UNITS)
def test_host_part(unit):
    launches = "launch" in (ROOT / "csrc/cuda" / unit).read_text()
    assert ("hipLaunchKernel" in compile_unit(unit, "--cuda-host-only")) == launches


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(assembly, arch):
    """To memory: what does not fit into scalar registers may go to lanes of a vector register, and is printed."""
    found = {}
    for text in re.findall(r"^  - \.agpr_count:[\s\S]*?(?=^  - |^\.\.\.)", assembly[arch], re.M):
        resources = dict(re.findall(r"^    \.(name|\w+_count|private_segment_fixed_size): +(\S+)$", text, re.M))
        name = resources.pop("name")
        found[name] = {what: int(value) for what, value in resources.items()}
    for kernel, template in KERNELS.items():
        mangled = f"_ZN2rk4cuda{len(kernel)}{kernel}"
        names = [f"{mangled}I{dtype}E" for dtype in DTYPES] if template else [mangled]
        assert all(sum(name.startswith(n) for name in found) == 1 for n in names), kernel
    assert len(found) == sum(len(DTYPES) if template else 1 for template in KERNELS.values())
    print(f"\n{arch}, kernel: vector and scalar registers, scalar registers kept in vector ones")
    for name, resources in sorted(found.items()):
        assert resources["vgpr_spill_count"] == resources["private_segment_fixed_size"] == 0, (name, resources)
        print(f"{name[:60]}: {resources['vgpr_count']}, {resources['sgpr_count']}, {resources['sgpr_spill_count']}")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_go_by_16_bytes(assembly, arch):
    bodies = dict(re.findall(r"^(_ZN2rk4cuda\w+):([\s\S]*?)^\.Lfunc_end", assembly[arch], re.M))
    for kernel in WIDE:
        of_kernel = [text for name, text in bodies.items() if name.startswith(f"_ZN2rk4cuda{len(kernel)}{kernel}I")]
        assert len(of_kernel) == len(DTYPES)
        for text in of_kernel:
            assert re.search(r"(global|flat)_load_dwordx4", text), kernel
            # Of embedding_reduce's three stores of a row clang 19 makes one for their last elements, and splits them.
            assert kernel == "embedding_reduce" or re.search(r"global_store_dwordx4", text), kernel
