"""What the library asks a driver before it registers kernels in CUDA C++. This one answers as it is told to."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Each device of DEVICES is "major.minor"; DRIVER is the version that the driver runs; FAILS the function that does.
NVML = r"""
#include <stdlib.h>
#include <string.h>
static int code(const char* name) { const char* f = getenv("FAILS"); return f && !strcmp(f, name) ? 999 : 0; }
int nvmlInit_v2() { return code("init"); }
int nvmlShutdown() { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* v) { *v = atoi(getenv("DRIVER")); return code("version"); }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = strlen(getenv("DEVICES")) / 5; return code("count"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) { *d = getenv("DEVICES") + 5 * i; return code("handle"); }
int nvmlDeviceGetCudaComputeCapability(void* d, int* major, int* minor) {
  *major = atoi((char*)d), *minor = atoi(strchr((char*)d, '.') + 1);
  return code("capability");
}
"""
MAIN = r"""
#include "cuda/common/driver.h"
#include <cstdio>
int main() { std::printf("%d", static_cast<int>(rk::cuda::refusal())); }
"""
SERVED, ARCHITECTURE, DRIVER, TORCH = "0", "1", "2", "3"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(NVML)
    (folder / "main.cpp").write_text(MAIN)
    built = "-D__CUDA_ARCH_LIST__=750,800,900,1000", "-DRK_CUDA_PTX=1000", "-DCUDART_VERSION=12080"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "nvml.c", "-o", "libnvidia-ml.so.1"], cwd=folder, check=True)
    for name, flags in {"main": built, "cpu": (), "without_ptx": [built[0], built[2]]}.items():
        command = ["g++", "-std=c++17", *flags, "-I", ROOT / "csrc", "main.cpp", "-o", name, "-ldl"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


def answer(folder: Path, devices: str, driver: str = "12080", fails: str = "", program: str = "main") -> str:
    """Of ``devices`` five characters each."""
    environment = {"LD_LIBRARY_PATH": str(folder), "DEVICES": devices, "DRIVER": driver, "FAILS": fails}
    return subprocess.run([folder / program], env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "devices, driver, expected",
    [
        ("7.5  ", "12080", SERVED),
        ("8.6  8.9  9.0  ", "12000", SERVED),  # 8.0's code, and a driver of the same major version
        ("10.3 12.0 ", "13000", SERVED),  # 10.0's code, and its PTX
        ("7.0  ", "12080", ARCHITECTURE),
        ("9.0  7.0  ", "12080", ARCHITECTURE),
        ("8.0  ", "11080", DRIVER),
        ("", "11080", SERVED),  # no GPU: nothing will be asked of it
    ],
)
def test_the_machine_is_served(folder, devices, driver, expected):
    assert answer(folder, devices, driver) == expected


def test_newer_gpus_need_ptx(folder):
    assert answer(folder, "12.0 ", program="without_ptx") == ARCHITECTURE
    assert answer(folder, "10.3 ", program="without_ptx") == SERVED


@pytest.mark.parametrize("fails", ["init", "count", "handle", "capability"])
def test_a_driver_that_does_not_say_is_cudas_to_judge(folder, fails):
    assert answer(folder, "7.0  ", fails=fails) == SERVED


def test_other_compilers_ask_nobody(folder):
    assert answer(folder, "7.0  ", "11080", program="cpu") == SERVED


def test_without_nvml_cuda_judges(folder):
    run = subprocess.run([folder / "main"], env={}, check=True, capture_output=True, text=True)
    assert run.stdout == SERVED


def test_a_torch_for_hip_is_not_served(folder):
    library = folder / "libtorch_hip.so"
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libtorch_hip.so", "-x", "c", "/dev/null", "-o", library], check=True)
    run = subprocess.run([folder / "main"], env={"LD_PRELOAD": library}, check=True, capture_output=True, text=True)
    assert run.stdout == TORCH
