"""Models traced on CUDA tensors without a GPU: the files of absent_gpu/, each in a process of its own.

A build of torch without CUDA refuses to record gradients of CUDA tensors, even of those without memory, because it
knows no guards, streams and events of theirs. absent_gpu/device.cpp gives it some that do nothing.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from process import run_pytest

FOLDER = Path(__file__).parent / "absent_gpu"
TORCH = Path(torch.__file__).parent


pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the device that does nothing"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build of torch brings its own device"),
]


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("device") / "device.so"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-isystem", TORCH / "include", FOLDER / "device.cpp", "-o", library,
         "-L", TORCH / "lib", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    return library


PARTS = pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


@PARTS
def test_models_trace_on_cuda_without_a_wait(device, part):
    run_pytest(FOLDER / "graphs.py", FOLDER / "run.py", device, "-m", part, TRITON_INTERPRET="0")


@PARTS
def test_no_configuration_of_attention_reaches_the_reference(device, part):
    run_pytest(FOLDER / "configurations.py", FOLDER / "run.py", device, "-m", part, TRITON_INTERPRET="0")


def test_no_training_step_waits(device):
    run_pytest(FOLDER / "waits.py", FOLDER / "run.py", device, TRITON_INTERPRET="0")
