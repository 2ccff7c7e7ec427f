"""The README's examples run as they stand, in one session from top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples():
    session: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    assert session["p"].shape == (2,) and session["y"].shape == (4096, 1)


def test_numbers_are_those_of_the_record():
    """The table of measurements is what the committed record says."""
    root = README.parent
    command = [sys.executable, "bench/report.py", "bench/results/ops.json", "--into", "README.md", "--check"]
    assert subprocess.run(command, cwd=root).returncode == 0, "run: " + " ".join(command[1:-1])
