"""A thousand calls of the fuzzer (tests/fuzz), in processes of their own; `make fuzz` runs more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rankkernels as rk

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="compares the C++ kernels with the reference")
def test_random_calls():
    pytest.importorskip("torch_rechub", reason="layers and models are compared with torch-rechub's")
    command = [sys.executable, "-W", "ignore", ROOT / "tests/fuzz", "--count", "1000"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
