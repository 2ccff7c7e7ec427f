"""bench/scale.py: what the page says, and what processes write to their sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from bench import scale

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_table():
    assert scale.page_table() in (ROOT / "docs/scale.md").read_text(), "put there what python -m bench.scale prints"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes of a process here")
@pytest.mark.parametrize("processes", [2, 3])
def test_the_formulas_are_what_is_sent(processes):
    shape = scale.MEASURED._replace(rows=scale.MEASURED.rows[:3], batch=1536 * processes)  # tables for each of three
    for name, (predicted, counted) in scale.measure(processes, shape).items():
        assert predicted <= counted < 1.02 * predicted, name
