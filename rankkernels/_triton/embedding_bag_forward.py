"""Embedding lookups of many features, forward, in Triton.

A feature has B bags of ids i_1 .. i_n, padding left out, and per-sample weights a_1 .. a_n, ones if none are given:

    sum:  out[b] = sum_p a_p weight[i_p]        mean: out[b] = 1/n sum_p a_p weight[i_p]
    max:  out[b] = max_p weight[i_p]            none: out[b] = weight[i_b], a bag an id

An empty bag is zeros. An id outside the table is never followed and contributes nothing. A program has some bags of a
feature, whole rows in registers, and goes through the bags' ids in order. Bytes: each looked-up row once, 4 or 8 an id,
each output row once; 2 D flops a lookup. Bound by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_blocks import (
    MODE,
    MODE_MAX,
    MODE_MEAN,
    bags_of,
    factors_of,
    outs_of,
    rows_of,
    table_of,
)
from rankkernels._triton.embedding_bag_features import Call


@triton.jit(do_not_specialize=["n", "F", "D"])
def embedding_bag_kernel(
    described_ptr, numbers_ptr, n, F, D, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr, HAS_FACTORS: tl.constexpr, HAS_MAX: tl.constexpr, DTYPE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every BLOCK_B bags of n features of width D, in one launch."""
    i, b, begin, end = bags_of(described_ptr, numbers_ptr, n, F, HAS_OFFSETS, WIDE_OFFSETS, BLOCK_N, BLOCK_B)
    o_d, mode = tl.arange(0, BLOCK_D), tl.load(described_ptr + MODE * n + i)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    weight_ptr, stride = table_of(described_ptr, n, i, DTYPE, ALIGN)
    total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    if HAS_MAX:
        total = tl.where(mode == MODE_MAX, float("-inf"), total)
    count = tl.zeros([BLOCK_B], tl.int32)
    for k in range(0, tl.max(end - begin)):
        p = begin + k
        row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        rows_ptr = weight_ptr + (row * stride)[:, None] + o_d[None, :]
        x = tl.load(rows_ptr, mask=keep[:, None] & of_row, other=0.0).to(ACC)
        if HAS_FACTORS:
            x *= factors_of(described_ptr, numbers_ptr, n, F, i, p, keep, DTYPE, ACC, HAS_OFFSETS)[:, None]
        if HAS_MAX:
            larger = keep[:, None] & ((x > total) | (x != x))  # a NaN stays
            total = tl.where(mode == MODE_MAX, tl.where(larger, x, total), total + x)
        else:
            total += x
        count += keep.to(tl.int32)
    total = tl.where((mode == MODE_MEAN) & (count > 1)[:, None], total / tl.maximum(count, 1)[:, None].to(ACC), total)
    if HAS_MAX:
        total = tl.where((count > 0)[:, None], total, 0.0)
    out_ptr, there = outs_of(described_ptr, numbers_ptr, n, F, i, b, D, DTYPE, ALIGN, BLOCK_D)
    tl.store(out_ptr, total, mask=there)


def lookup(call: Call) -> None:
    """Writes the results of a call: a launch for all features whose rows have one dtype, width and alignment."""
    tiles, numbers = call.tiles(call.chosen()), None
    for tile, chosen in tiles.items():
        numbers = call.numbers() if numbers is None else numbers
        described, blocks = call.described(chosen, tile.rows)
        has_max = call.has_mode("max", chosen)
        constants = (
            *call.flags, call.has_factors, has_max, *tile.types, tile.ALIGN, triton.next_power_of_2(len(chosen)),
            tile.rows, tile.BLOCK_D,
        )  # fmt: skip
        launch(
            embedding_bag_kernel, (blocks,), (described, numbers), (len(chosen), len(call.outs), tile.D), constants,
            num_warps=4,
        )  # fmt: skip
