"""Lookups at every width from 1 to 130 and some beyond, where rows are pieces of a vector, whole vectors or neither.

Values are compared with float64 on the same ids; rows that are only copied, and peaks, must be the same bits.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_out_of_bounds import guarded, needs_kernels_of

from rankkernels import table_batched_embedding_bag
from rankkernels.testing import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
WIDTHS = [*range(1, 131), 137, 260, 605, 1203]  # 1203: ten covers of AVX2 that overlap
ROWS, BAGS, LONGEST, PADDING = 40, 19, 6, 7


def pooled(rows: torch.Tensor, bag: torch.Tensor, mode: str, factors: torch.Tensor | None) -> torch.Tensor:
    """Rows [n, D] in float64, each in its bag -> [BAGS, D]."""
    empty = rows.new_zeros(BAGS, rows.size(1))
    if mode == "max":
        return empty.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
    total = empty.index_add(0, bag, rows if factors is None else rows * factors[:, None])
    return total / bag.bincount(minlength=BAGS).clamp(min=1)[:, None] if mode == "mean" else total


def check(dtype: torch.dtype, D: int, ids_dtype: torch.dtype, at_end: bool) -> None:
    generator = torch.Generator().manual_seed(D)
    weight = guarded(torch.randn(ROWS, D, generator=generator).to(dtype), at_end)
    counts = torch.randint(0, LONGEST, (BAGS,), generator=generator)
    offsets = counts.cumsum(0) - counts
    N, bag = int(counts.sum()), torch.arange(BAGS).repeat_interleave(counts)
    jagged = guarded(torch.randint(0, ROWS, (N,), generator=generator).to(ids_dtype), at_end)
    jagged[::4] = PADDING
    factors = guarded(torch.rand(N, generator=generator).to(dtype), at_end)
    (rows,) = table_batched_embedding_bag([weight], [jagged], modes=["none"])
    (single,) = table_batched_embedding_bag([weight], [jagged[:, None]], modes=["sum"])
    assert torch.equal(rows, weight[jagged.long()]) and torch.equal(single, rows)
    for mode, weighted in (("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)):
        for padding in (None, PADDING):
            (out,) = table_batched_embedding_bag(
                [weight], [jagged], modes=[mode], offsets=[offsets], padding_idx=[padding],
                per_sample_weights=[factors] if weighted else None,
            )  # fmt: skip
            kept = jagged != (-1 if padding is None else padding)
            own = factors[kept].double() if weighted else None
            expected = pooled(weight.double()[jagged[kept].long()], bag[kept], mode, own)
            if mode == "max":
                assert torch.equal(out.double(), expected), (D, dtype, padding)
            else:
                assert relative_error(out, expected) < TOLERANCE[dtype], (D, dtype, mode, weighted, padding)


def check_all() -> None:
    torch.set_num_threads(1)
    for D in WIDTHS:
        for dtype in TOLERANCE:
            check(dtype, D, torch.int32 if D % 2 else torch.int64, at_end=D % 3 > 0)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_width_between_forbidden_pages(capability):
    """In a process of its own: a byte read beyond a table, its ids or its factors ends it."""
    needs_kernels_of(capability)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("D", [1, 3, 10, 24, 33, 130])
@pytest.mark.parametrize("mode", ["none", "sum", "max"])
def test_neighbours_in_one_output_are_left_alone(mode, D):
    """Rows written side by side end where the next feature's begin, whatever the width."""
    weights = [torch.randn(ROWS, d) for d in (5, D, 3)]
    ids = [torch.randint(0, ROWS, (33,) if mode == "none" else (33, 4)) for _ in weights]
    apart = table_batched_embedding_bag(weights, ids, modes=[mode] * 3)
    (together,) = table_batched_embedding_bag(weights, ids, modes=[mode] * 3, concat=True)
    assert torch.equal(together, torch.cat(apart, 1))


@pytest.mark.parametrize("rows", [200, 30_000, 300_000])
@pytest.mark.parametrize("D", [10, 16, 24])
def test_tables_of_every_level_of_cache(rows, D):
    """Rows of larger tables are asked for ahead of their turn, near the end of the ids too."""
    weight, ids = torch.randn(rows, D), torch.randint(0, rows, (301, 3))
    (out,) = table_batched_embedding_bag([weight], [ids], modes=["sum"])
    assert relative_error(out, weight.double()[ids].sum(1)) < TOLERANCE[torch.float32]
    (out,) = table_batched_embedding_bag([weight], [ids], modes=["none"])
    assert torch.equal(out, weight[ids])


if __name__ == "__main__":
    check_all()
    os._exit(0)  # the guarded pages are still in use by tensors: let the system unmap them
