"""Importing the package on top of torch."""

from __future__ import annotations

import subprocess
import sys


def test_import(race, note):
    def start(code):
        subprocess.run([sys.executable, "-c", code], check=True)

    medians = race(lambda: start("import torch, rankkernels"), {"torch": lambda: start("import torch")})
    note(f"{medians['ours'] - medians['torch']:.3f} s more than import torch alone")
