"""Triton kernels against the reference without a GPU: triton_kernels/interpreted.py, in a process of its own."""

from pathlib import Path

import pytest
from process import run_pytest


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_pytest(Path(__file__).with_name("triton_kernels") / "interpreted.py", TRITON_INTERPRET="1")
