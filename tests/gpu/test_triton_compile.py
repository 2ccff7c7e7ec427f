"""Triton kernels compiled for GPUs that need not be here: triton_kernels/compiled.py, in a process of its own."""

from pathlib import Path

import pytest
from process import run_pytest

FILE = Path(__file__).with_name("triton_kernels") / "compiled.py"
pytest.importorskip("triton", reason="Triton is not installed")


def test_triton_kernels_compile_for_one_gpu():
    select = "-m", "pytest", "-k", "compiles_to and sm_90 or known_again or references"
    run_pytest(FILE, *select, TRITON_INTERPRET="0", GPU_TARGETS="sm_90", GPU_EVERY="8")


@pytest.mark.slow
def test_triton_kernels_compile():
    run_pytest(FILE, "-m", "pytest", TRITON_INTERPRET="0")
