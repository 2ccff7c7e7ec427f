"""Triton kernels compiled for GPUs that need not be here: tests/triton_kernels/compiled.py, in a process of its own."""

import pytest
from triton_kernels.process import run_pytest


def test_triton_kernels_compile():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_pytest("compiled.py", TRITON_INTERPRET="0")
