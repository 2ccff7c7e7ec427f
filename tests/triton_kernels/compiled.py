"""Every Triton kernel compiled for GPUs that this machine need not have: what ``rankkernels.gpu_report`` reports is
asserted here. test_triton_compile.py runs this file in a process of its own.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from rankkernels import gpu_report
from rankkernels._triton.ahead_of_time import TARGETS, compiling
from rankkernels.ops import din_attention, fm_interaction
from rankkernels.testing import GPU_CASES

#: Bytes of local memory of DIN attention's backward.
LOCAL = {"sm_80": 0, "sm_90": 0, "sm_100": 0, "gfx90a": 2048, "gfx942": 2048}


@pytest.fixture(scope="module")
def records():
    return {(r.case.id, r.dtype, r.target): r for r in gpu_report.triton_records()}


@pytest.fixture(scope="module")
def widths():
    return {case.id: case.inputs(case.dtypes[0])[0].size(-1) for case in GPU_CASES}


def of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "case, dtype, target",
    [
        pytest.param(c, d, t, id=f"{c.id}-{of_dtype(d)}-{t}")
        for c in GPU_CASES
        for d in c.dtypes
        for t in c.targets or TARGETS
    ],
)
def test_compiles_to_what_the_hardware_holds(records, widths, case, dtype, target):
    calls = records[case.id, dtype, target].calls
    assert [c.op for c in calls] == [case.op, f"{case.op}_backward"]
    for call in calls:
        assert call.kernels, f"{call.op} launches no kernel"
        for kernel in call.kernels:
            local = LOCAL[target] if case.op == "din_attention" else 0
            assert kernel.local <= local
            assert local or not kernel.spills
            assert kernel.wide_loads or widths[case.id] * dtype.itemsize % 16
            assert kernel.matrix_instructions or not kernel.has_dot
            assert kernel.shared <= gpu_report.MULTIPROCESSORS[target].shared_of_block
            assert gpu_report.occupancy(target, kernel.warps, kernel.registers, kernel.shared) > 0
            assert all(n <= 65535 for n in kernel.grid[1:])


@pytest.mark.parametrize("shape", [(2**27, 39, 16), (3, 2**30, 4), (2, 3, 2**31 + 5)], ids=str)
def test_tensors_beyond_32_bits_are_launched_within_the_grid(shape):
    """More than 2^31 elements, on the meta device; the interpreter's tests follow such offsets."""
    with compiling("sm_90") as calls:
        x = torch.empty(shape, device="meta", requires_grad=True)
        out = fm_interaction(x)
        out.backward(torch.empty_like(out))
    grids = [k.grid for call in calls for k in call.kernels]
    assert len(grids) == 2
    assert all(0 < grid[0] < 2**31 and math.prod(grid[1:]) <= 65535 for grid in grids)


@pytest.mark.parametrize("B, L, D", [(2**26, 50, 16), (1, 2**26, 64)], ids=str)
def test_din_attention_beyond_32_bits_is_launched_within_the_grid(B, L, D):
    with compiling("sm_90") as calls:
        history, target = (torch.empty(s, device="meta", requires_grad=True) for s in ((B, L, D), (B, D)))
        params = [torch.empty(s, device="meta") for s in ((36, 4 * D), (36,), (1,), (1, 36), (1,))]
        din_attention(history, target, params)[0].sum().backward()
    grids = [k.grid for call in calls for k in call.kernels]
    assert len(grids) >= 2
    assert all(0 < grid[0] < 2**31 and math.prod(grid[1:]) <= 65535 for grid in grids)


def test_prints_the_table(records):
    table = gpu_report.triton_table(list(records.values()))
    assert len(table) == 2 + 2 * sum(len(case.dtypes) for case in GPU_CASES)
    assert len({line.count("|") for line in table}) == 1
    print("\n".join(table))


def test_occupancy_is_what_the_vendors_calculators_say():
    for target, warps, registers, shared, expected in (
        ("sm_80", 4, 32, 0, 1.0),
        ("sm_80", 8, 128, 0, 0.25),
        ("sm_80", 8, 255, 0, 0.125),
        ("sm_90", 4, 40, 0, 0.75),
        ("sm_90", 4, 32, 100 << 10, 0.125),
        ("gfx942", 4, 64, 0, 1.0),
        ("gfx942", 4, 256, 0, 0.25),
        ("gfx942", 4, 64, 20 << 10, 0.375),
    ):
        assert gpu_report.occupancy(target, warps, registers, shared) == expected, (target, warps, registers, shared)


def test_the_report_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
         "from rankkernels.gpu_report import main; main()"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "unset TRITON_INTERPRET" in done.stderr


def test_the_page_says_what_was_not_compiled(records):
    page = gpu_report.report(list(records.values()), None, {}, {}, "these versions")
    assert "these versions. Nothing here ran on a GPU" in page
    assert "Not compiled: no nvcc" in page
