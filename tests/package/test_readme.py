"""The README's numbers and charts are those of the committed records."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_it_is_short():
    assert README.read_text().count("\n") <= 120, "details belong to docs/"


def test_numbers_and_charts_are_those_of_the_records():
    """README.md, bench/RESULTS.md and the charts say what the committed records say."""
    command = [sys.executable, "-m", "bench.report", "--check"]
    check = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
    assert check.returncode == 0, f"{check.stdout}{check.stderr}run: python -m bench.report"


def test_a_changed_number_is_noticed(tmp_path):
    """The check before this one is worth something: one digit in one record, and it fails."""
    shutil.copytree(README.parent / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(README.parent / "docs", tmp_path / "docs")
    shutil.copy(README, tmp_path)

    def check():
        command = [sys.executable, "-m", "bench.report", "--check"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert check().returncode == 0
    path = tmp_path / "bench/records/avx2/demo/train.json"
    record = json.loads(path.read_text())
    record["models"]["din"]["comparison"]["samples_per_second_ratio"] *= 2
    path.write_text(json.dumps(record))
    assert check().stdout == "README.md is not what the records say\n"
    path = tmp_path / "bench/records/avx512/ops.json"
    record = json.loads(path.read_text())
    next(b for b in record["benchmarks"] if "contenders" in b["extra_info"])["extra_info"]["contenders"]["eager"][
        "ratio"
    ] *= 2
    path.write_text(json.dumps(record))
    changed = check()
    assert changed.returncode == 1
    assert "bench/RESULTS.md is not what the records say" in changed.stdout
    assert "speedup" in changed.stdout
