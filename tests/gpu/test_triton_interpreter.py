"""Triton kernels against the reference without a GPU: triton_kernels/interpreted.py, in a process of its own."""

from pathlib import Path

import pytest
from process import run_pytest

FILE = Path(__file__).with_name("triton_kernels") / "interpreted.py"
pytest.importorskip("triton", reason="Triton is not installed")


def test_triton_kernels_under_the_interpreter():
    run_pytest(FILE, "-m", "pytest", "-m", "not slow", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_every_dtype_and_that_broken_copies_are_noticed():
    run_pytest(FILE, "-m", "pytest", "-m", "slow", TRITON_INTERPRET="1")
