"""Triton kernels compiled for GPUs that need not be here: triton_kernels/compiled.py, in a process of its own."""

from pathlib import Path

import pytest
from process import run_pytest


def test_triton_kernels_compile():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_pytest(Path(__file__).with_name("triton_kernels") / "compiled.py", TRITON_INTERPRET="0")
