"""Runs a file of tests in a pytest process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_pytest(file: Path, *program: str | Path, **environment: str) -> None:
    """Runs a file; prints its tables and its summary, or fails with its output.

    ``program`` is what Python runs, pytest unless given.
    """
    program = program or ("-m", "pytest")
    command = [sys.executable, *map(str, program), "-q", "-rP", "-p", "no:cacheprovider", str(file)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{file.name} exits with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    *lines, summary = done.stdout.strip().splitlines()
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary
    print("\n".join(line for line in lines if line.startswith("|")), f"{file.name}: {summary}", sep="\n")
