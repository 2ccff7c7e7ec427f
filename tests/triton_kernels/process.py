"""Runs a file of tests in a pytest process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_pytest(file: str, **environment: str) -> None:
    """Runs ``file`` of this folder, prints what it reports and its summary, and fails with all its output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rP",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(file)),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{file} exits with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)
    *lines, summary = done.stdout.strip().splitlines()
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary
    print("\n".join(line for line in lines if line.startswith("|")), f"{file}: {summary}", sep="\n")
