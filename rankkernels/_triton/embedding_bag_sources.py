"""What each lookup of a backward adds, and to which row: the keys that are sorted, and the gradients that are summed.

Lookup p of bag b gives its row the gradient

    sum, none: a_p grad_out[b]      mean: a_p / n grad_out[b]
    max: grad_out[b, d] for the first p whose row is the bag's maximum in column d, or NaN, 0 for the others

and a_p, its per-sample weight, (1 or 1/n) <grad_out[b], weight[i_p]>. Lookups of padding, of a frozen row and outside
the table give nothing. A key is the row, numbered over all tables; 12 or 16 bytes a lookup, and 4 more with factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_blocks import (
    BY_LOOKUP,
    FIRST_LOOKUP,
    FROZEN,
    ITEMSIZE,
    KEY,
    LOOKUP,
    MODE,
    MODE_MEAN,
    NUMBER,
    OUT,
    OUT_STRIDE,
    bags_of,
    factors_of,
    outs_of,
    pointer_to,
    rows_of,
    table_of,
)
from rankkernels._triton.embedding_bag_features import DTYPES, Bring, Call
from rankkernels._triton.embedding_bag_numbers import numbers as on_device

BLOCK, MOST_L = 512, 16  # lookups of a program at a time, and those of one bag


@triton.jit
def first_lookup_of(described_ptr, numbers_ptr, n, F, i, HAS_OFFSETS: tl.constexpr):
    """The number of feature i's first lookup among those of all."""
    if HAS_OFFSETS:
        return tl.load(numbers_ptr + FIRST_LOOKUP * F + tl.load(described_ptr + NUMBER * n + i))
    else:
        return tl.load(described_ptr + LOOKUP * n + i)


@triton.jit(do_not_specialize=["n", "F", "skipped"])
def embedding_bag_sources_kernel(
    described_ptr, numbers_ptr, keys_ptr, sources_ptr, scales_ptr, n, F, skipped, WIDE_IDS: tl.constexpr,
    HAS_KNOWN: tl.constexpr, HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr, HAS_FACTORS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of every lookup its key, ``skipped`` if it gives nothing, the address of a gradient and a factor for it."""
    i, b, begin, end = bags_of(described_ptr, numbers_ptr, n, F, HAS_OFFSETS, WIDE_OFFSETS, BLOCK_N, BLOCK_B)
    begin, end, o_l = begin[:, None], end[:, None], tl.arange(0, BLOCK_L)[None, :]
    longest, mode = tl.max(end - begin), tl.load(described_ptr + MODE * n + i)
    scale = tl.full([BLOCK_B, 1], 1.0, ACC)
    if scales_ptr is not None:
        count = tl.zeros([BLOCK_B, 1], tl.int32)
        for k in range(0, tl.where(mode == MODE_MEAN, longest, 0), BLOCK_L):
            p = begin + k + o_l
            _, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
            count += tl.sum(keep.to(tl.int32), 1)[:, None]
        scale /= tl.maximum(count, 1).to(ACC)
    first = first_lookup_of(described_ptr, numbers_ptr, n, F, i, HAS_OFFSETS)
    key, frozen = tl.load(described_ptr + KEY * n + i), tl.load(described_ptr + FROZEN * n + i)
    grad = tl.load(numbers_ptr + OUT * F + tl.load(described_ptr + NUMBER * n + i))
    stride = tl.load(described_ptr + OUT_STRIDE * n + i) * tl.load(described_ptr + ITEMSIZE * n + i)
    by_lookup = tl.load(described_ptr + BY_LOOKUP * n + i)
    for k in range(0, longest, BLOCK_L):
        p = begin + k + o_l
        row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        tl.store(keys_ptr + first + p, tl.where(keep & (row != frozen), key + row, skipped), mask=p < end)
        tl.store(sources_ptr + first + p, grad + tl.where(by_lookup != 0, p, b[:, None]) * stride, mask=p < end)
        if scales_ptr is not None:
            factor = scale
            if HAS_FACTORS:
                factor *= factors_of(described_ptr, numbers_ptr, n, F, i, p, keep, ACC, ACC, HAS_OFFSETS)
            tl.store(scales_ptr + first + p, tl.broadcast_to(factor, p.shape), mask=p < end)


@triton.jit(do_not_specialize=["n", "F", "D"])
def embedding_bag_max_kernel(
    described_ptr, numbers_ptr, rows_ptr, n, F, D, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of every lookup of a maximum its row's gradient, at the address of its feature in ``rows``."""
    i, b, begin, end = bags_of(described_ptr, numbers_ptr, n, F, HAS_OFFSETS, WIDE_OFFSETS, BLOCK_N, BLOCK_B)
    o_d, number = tl.arange(0, BLOCK_D), tl.load(described_ptr + NUMBER * n + i)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    weight_ptr, stride = table_of(described_ptr, n, i, DTYPE, ALIGN)
    longest = tl.max(end - begin)
    largest = tl.full([BLOCK_B, BLOCK_D], float("-inf"), ACC)
    first = tl.full([BLOCK_B, BLOCK_D], -1, tl.int64)  # the lookup that attains it
    for k in range(0, longest):
        p = begin + k
        row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        table_ptr = weight_ptr + (row * stride)[:, None] + o_d[None, :]
        x = tl.load(table_ptr, mask=keep[:, None] & of_row, other=0.0).to(ACC)
        larger = (first < 0) | (x > largest) | ((x != x) & (largest == largest))
        largest = tl.where(keep[:, None] & larger, x, largest)
        first = tl.where(keep[:, None] & larger, p[:, None], first)
    grad_ptr, there = outs_of(described_ptr, numbers_ptr, n, F, i, b, D, DTYPE, ALIGN, BLOCK_D)
    grad = tl.load(grad_ptr, mask=there, other=0.0).to(ACC)
    out_ptr = pointer_to(tl.load(rows_ptr + number), DTYPE, ALIGN)
    for k in range(0, longest):
        p = begin + k
        of_lookup = tl.where(first == p[:, None], grad, 0.0)
        out_rows_ptr = out_ptr + (p * aligned(D, ALIGN))[:, None] + o_d[None, :]
        tl.store(out_rows_ptr, of_lookup, mask=(p < end)[:, None] & of_row)


@triton.jit(do_not_specialize=["n", "F", "D"])
def embedding_bag_factors_kernel(
    described_ptr, numbers_ptr, factors_ptr, n, F, D, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the per-sample weights, at the address of their feature in ``factors``."""
    i, b, begin, end = bags_of(described_ptr, numbers_ptr, n, F, HAS_OFFSETS, WIDE_OFFSETS, BLOCK_N, BLOCK_B)
    o_d, number = tl.arange(0, BLOCK_D), tl.load(described_ptr + NUMBER * n + i)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    weight_ptr, stride = table_of(described_ptr, n, i, DTYPE, ALIGN)
    grad_ptr, there = outs_of(described_ptr, numbers_ptr, n, F, i, b, D, DTYPE, ALIGN, BLOCK_D)
    grad = tl.load(grad_ptr, mask=there, other=0.0).to(ACC)
    longest, count = tl.max(end - begin), tl.zeros([BLOCK_B], tl.int32)
    for k in range(0, longest):
        p = begin + k
        _, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        count += keep.to(tl.int32)
    count = tl.where(tl.load(described_ptr + MODE * n + i) == MODE_MEAN, tl.maximum(count, 1), 1)
    out_ptr = tl.load(factors_ptr + number).to(tl.pointer_type(DTYPE))
    for k in range(0, longest):
        p = begin + k
        row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, p < end, WIDE_IDS, HAS_KNOWN)
        table_ptr = weight_ptr + (row * stride)[:, None] + o_d[None, :]
        x = tl.load(table_ptr, mask=keep[:, None] & of_row, other=0.0).to(ACC)
        tl.store(out_ptr + p, tl.sum(grad * x, 1) / count.to(ACC), mask=p < end)


class Sources(NamedTuple):
    """The lookups of a backward, sorted by their keys; ``order`` says where each one's source is."""

    keys: Tensor  # [n] int32 or int64
    order: Tensor  # [n] int64
    sources: Tensor  # [n] int64, addresses
    scales: Tensor | None  # [n], ones
    skipped: int  # behind all keys
    grads: list  # what the addresses are of, a feature
    others: Tensor  # the numbers that were given


def _each(call: Call, kernel, numbers: Tensor, chosen: Sequence[int], places: Sequence[Tensor | None]) -> None:
    """Launches a kernel that writes to ``places``, one a feature, for the features chosen."""
    where = on_device(list(map(_alignment.address, places)), call.device)
    for tile, features in call.tiles(chosen).items():
        # In 16 bits a maximum beside its gradient is more than sm_90's registers hold of as many.
        rows = max(1, tile.rows // 2) if tile.dtype.itemsize == 2 else tile.rows
        described, blocks = call.described(features, rows)
        power = triton.next_power_of_2(len(features))
        constants = *call.flags, *tile.types, tile.ALIGN, power, rows, tile.BLOCK_D
        size = len(features), len(call.outs), tile.D
        launch(kernel, (blocks,), (described, numbers, where), size, constants, num_warps=4)


def factor_gradients(call: Call) -> list[Tensor]:
    """The gradients of the per-sample weights, zeros of those without any."""
    chosen = call.chosen(lambda f: call.factors[f] is not None)
    grads = [
        torch.empty_like(w) if f in chosen else torch.zeros_like(w)
        for f, w in enumerate(call.features.per_sample_weights)
    ]
    if chosen:
        _each(call, embedding_bag_factors_kernel, call.numbers(), chosen, grads)
    return grads


def sources(call: Call, others: Sequence[int], bring: Bring = on_device) -> Sources:
    """Keys and sources of all lookups, in one launch and the sort, and one or two more where a feature takes maxima.
    ``others`` are brought to the device beside the call's own numbers."""
    chosen, features, F = call.chosen(), call.features, len(call.outs)
    maxima = [f for f in chosen if features.mode(f) == "max"]
    grads = list(call.outs)
    for f in maxima:
        grads[f] = grads[f].new_empty((call.ids[f].numel(), grads[f].size(1)))
    if maxima:
        places = [grads[f] if f in maxima else None for f in range(F)]
        _each(call, embedding_bag_max_kernel, call.numbers(), maxima, places)
    wide = any(call.outs[f].dtype == torch.float64 for f in chosen)
    dtype = torch.float64 if wide else torch.float32
    call = call.replaced(grads, [None if w is None else w.to(dtype) for w in call.factors])
    n, device = call.lookups, call.device
    keys = torch.empty(n, dtype=torch.int32 if call.keys < 2**31 else torch.int64, device=device)
    found = torch.empty(n, dtype=torch.int64, device=device)
    scaled = call.has_factors or call.has_mode("mean", chosen)
    scales = torch.empty(n, dtype=dtype, device=device) if scaled else None
    longest = MOST_L if call.has_offsets else max(call.length(f) for f in chosen)
    block = min(MOST_L, triton.next_power_of_2(longest))
    bags = min(256, BLOCK // block)
    described, blocks = call.described(chosen, bags, maxima)
    constants = *call.flags, call.has_factors, DTYPES[dtype], triton.next_power_of_2(len(chosen)), bags, block
    numbers = call.numbers(others, bring)
    pointers = described, numbers, keys, found, scales
    launch(embedding_bag_sources_kernel, (blocks,), pointers, (len(chosen), F, call.keys), constants, num_warps=4)
    keys, order = torch.sort(keys, stable=True)
    return Sources(keys, order, found, scales, call.keys, grads, numbers[numbers.numel() - len(others) :])
