"""Triton kernels against the reference without a GPU: tests/triton_kernels/interpreted.py, in a process of its own."""

import pytest
from triton_kernels.process import run_pytest


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_pytest("interpreted.py", TRITON_INTERPRET="1")
