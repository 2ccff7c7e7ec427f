"""Every Triton kernel compiled for GPUs that this machine need not have, by the calls of the GPU_CASES, forward and
backward. test_triton_compile.py runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rankkernels._triton.ahead_of_time import TARGETS, compile_case
from rankkernels.testing import GPU_CASES, OpCase

#: Bytes of local memory, where a backward keeps some of what all blocks of rows share there.
LOCAL = {"sm_80": 512, "sm_90": 512, "sm_100": 512, "gfx90a": 640, "gfx942": 640}


def compilations() -> Iterator[tuple[OpCase, torch.dtype, str]]:
    """bfloat16 for every target, the other dtypes for the two that most have."""
    for case in GPU_CASES:
        for dtype in case.dtypes:
            for target in TARGETS if dtype == torch.bfloat16 else ("sm_80", "sm_90"):
                yield case, dtype, target


@pytest.mark.parametrize(
    "case, dtype, target",
    [pytest.param(*c, id=f"{c[0].id}-{str(c[1]).removeprefix('torch.')}-{c[2]}") for c in compilations()],
)
def test_compiles_without_spills(case, dtype, target):
    calls = compile_case(case, dtype, target)
    assert [c.op for c in calls] == [case.op, f"{case.op}_backward"]
    width = case.inputs(dtype)[0].size(-1)
    for call in calls:
        assert call.kernels, f"{call.op} launches no kernel"
        for kernel in call.kernels:
            print(f"{target} {kernel.name}: {kernel.registers} registers, local {kernel.local}, {kernel.instructions}")
            local = LOCAL[target] if case.op == "din_attention" else 0
            assert kernel.local <= local
            assert local or not kernel.spills
            assert kernel.wide_loads or width * dtype.itemsize % 16
            assert kernel.matrix_instructions or not kernel.has_dot
