"""Models traced on CUDA tensors without a GPU: absent_gpu/graphs.py, in a process of its own.

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the device that does nothing")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build of torch brings its own device")
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_models_trace_on_cuda_without_a_wait(tmp_path, part):
    library = tmp_path / "device.so"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-isystem", TORCH / "include", FOLDER / "device.cpp", "-o", library,
         "-L", TORCH / "lib", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    run_pytest(FOLDER / "graphs.py", FOLDER / "run.py", library, "-m", part, TRITON_INTERPRET="0")
