"""Lookups of tables under exact Adam, each row as of the last step, in Triton.

The rows stay as they are: catching up with a row's idle steps (embedding_catch_up_idle.py) happens in registers, and
the next step on the row writes it. Bytes a lookup: w, m and v, its last step and id; each output row once. Bound by
memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_blocks import MODE, MODE_MEAN, bags_of, outs_of, rows_of, table_of
from rankkernels._triton.embedding_bag_features import Call
from rankkernels._triton.embedding_catch_up_idle import caught_up, clock_of, is_idle, last_steps_of, state_of
from rankkernels._triton.embedding_catch_up_rows import Tables, rows_of_program


@triton.jit(do_not_specialize=["n", "F", "D"])
def embedding_bag_exact_kernel(
    described_ptr, behind_ptr, numbers_ptr, clocks_ptr, n, F, D, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every BLOCK_B bags of n features of width D, in one launch: sums and means."""
    i, b, begin, end = bags_of(described_ptr, numbers_ptr, n, F, HAS_OFFSETS, WIDE_OFFSETS, BLOCK_N, BLOCK_B)
    o_d = tl.arange(0, BLOCK_D)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    weight_ptr, stride = table_of(described_ptr, n, i, DTYPE, ALIGN)
    item = i + tl.zeros_like(b)
    clock_ptr = clock_of(behind_ptr, clocks_ptr, n, item)
    total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    count = tl.zeros([BLOCK_B], tl.int32)
    for k in range(0, tl.max(end - begin)):
        p = begin + k
        row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        last = tl.load(last_steps_of(behind_ptr, n, item, row), mask=keep, other=0)
        idle = keep & is_idle(last, clock_ptr)
        with_state = (idle & (last > 0))[:, None] & of_row
        row_ptr = weight_ptr + (row * stride)[:, None] + o_d[None, :]
        m_ptr, v_ptr = state_of(behind_ptr, n, item, row, ACC, ALIGN, BLOCK_D)
        w = tl.load(row_ptr, mask=keep[:, None] & of_row, other=0.0).to(ACC)
        m, v = tl.load(m_ptr, mask=with_state, other=0.0), tl.load(v_ptr, mask=with_state, other=0.0)
        w, _, _ = caught_up(w, m, v, last, idle, clock_ptr, ACC)
        total += w.to(DTYPE).to(ACC)  # as it would be stored
        count += keep.to(tl.int32)
    is_mean = (tl.load(described_ptr + MODE * n + i) == MODE_MEAN) & (count > 1)
    total = tl.where(is_mean[:, None], total / tl.maximum(count, 1)[:, None].to(ACC), total)
    out_ptr, there = outs_of(described_ptr, numbers_ptr, n, F, i, b, D, DTYPE, ALIGN, BLOCK_D)
    tl.store(out_ptr, total, mask=there)


def lookup(call: Call, tables: Tables) -> None:
    """Writes the results of a call: a launch for all features whose rows have one dtype, width and alignment."""
    clocks, numbers = tables.as_numbers(), None
    for tile, chosen in call.tiles(call.chosen()).items():
        numbers = call.numbers(clocks) if numbers is None else numbers
        of_features = [call.features.tables[f] for f in chosen]
        align = math.gcd(tile.ALIGN, *map(tables.alignment, set(of_features)))
        rows = rows_of_program(tile)
        described, blocks = call.described(chosen, rows)
        behind = tables.described([(t, 0) for t in of_features])
        pointers = described, behind, numbers, numbers[numbers.numel() - len(clocks) :]
        constants = *call.flags, *tile.types, align, triton.next_power_of_2(len(chosen)), rows, tile.BLOCK_D
        size = len(chosen), len(call.outs), tile.D
        # Left to itself ptxas keeps to 72 registers on sm_80, and spills two.
        options = {} if torch.version.hip else {"maxnreg": 168}
        launch(embedding_bag_exact_kernel, (blocks,), pointers, size, constants, num_warps=4, **options)
