"""Device functions that the embedding kernels share, and the places of what they find in memory.

``described`` is [columns, n] of n items, features or tables; ``numbers`` is [rows, F] of all F features of a call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton._alignment import aligned

#: Columns of a feature: embedding_bag_features.py, Feature.
FIRST, NUMBER, WEIGHT, STRIDE, ROWS, BAGS, LENGTH, MODE, PADDING, UNKNOWN, SIZE, HIDDEN, OUT_STRIDE = (
    tl.constexpr(k) for k in range(13)
)
#: More of them, in the backward.
LOOKUP, KEY, FROZEN, ITEMSIZE, BY_LOOKUP = (tl.constexpr(k) for k in range(13, 18))
#: Rows of numbers; without offsets the factors' row is the first of these.
IDS, OUT, OFFSETS, COUNT, FIRST_LOOKUP = (tl.constexpr(k) for k in range(5))

MODE_MEAN, MODE_MAX = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def item_of(described_ptr, n, index, BLOCK: tl.constexpr):
    """The last of n ascending FIRSTs that is not above ``index``."""
    o = tl.arange(0, BLOCK)
    first = tl.load(described_ptr + o, mask=o < n, other=0)
    return tl.sum(((first <= index) & (o < n)).to(tl.int32), 0) - 1


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An address of items of DTYPE, ALIGN of which it is a multiple of."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGN * DTYPE.primitive_bitwidth // 8)


@triton.jit
def multiple_at(numbers_ptr, ALIGN: tl.constexpr):
    """A number in memory that is a multiple of ALIGN, which the compiler does not believe of what is loaded."""
    return tl.load(numbers_ptr) // ALIGN * ALIGN


@triton.jit
def span_of(described_ptr, numbers_ptr, n, F, i, b, HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr):
    """The ids [begin, end) of bags b of feature i, none beyond the last bag. Whatever offsets are, spans stay within
    the ids."""
    bags, length = tl.load(described_ptr + BAGS * n + i), tl.load(described_ptr + LENGTH * n + i)
    begin = b * length
    end = begin + length
    if HAS_OFFSETS:
        number = tl.load(described_ptr + NUMBER * n + i)
        address, count = tl.load(numbers_ptr + OFFSETS * F + number), tl.load(numbers_ptr + COUNT * F + number)
        offsets_ptr = address.to(tl.pointer_type(tl.int64 if WIDE_OFFSETS else tl.int32))
        jagged = tl.where(address != 0, bags, 0)
        first = tl.load(offsets_ptr + b, mask=(b > 0) & (b < jagged), other=0).to(tl.int64)
        last = tl.load(offsets_ptr + b + 1, mask=b + 1 < jagged, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), count)
        last = tl.where(b + 1 < bags, tl.minimum(tl.maximum(last, first), count), count)
        begin, end = tl.where(address != 0, first, begin), tl.where(address != 0, last, end)
    return begin, tl.where(b < bags, end, begin)


@triton.jit
def bags_of(
    described_ptr, numbers_ptr, n, F, HAS_OFFSETS: tl.constexpr, WIDE_OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A program's feature, its bags [BLOCK_B], and the ids [begin, end) of these."""
    i = item_of(described_ptr, n, tl.program_id(0), BLOCK_N)
    b = (tl.program_id(0) - tl.load(described_ptr + i)) * BLOCK_B + tl.arange(0, BLOCK_B)
    begin, end = span_of(described_ptr, numbers_ptr, n, F, i, b, HAS_OFFSETS, WIDE_OFFSETS)
    return i, b, begin, end


@triton.jit
def table_of(described_ptr, n, i, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the table of feature i begins, and from row to row."""
    weight_ptr = pointer_to(tl.load(described_ptr + WEIGHT * n + i), DTYPE, ALIGN)
    return weight_ptr, multiple_at(described_ptr + STRIDE * n + i, ALIGN)


@triton.jit
def outs_of(
    described_ptr, numbers_ptr, n, F, i, b, D, DTYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Where the results of bags b of feature i, or their gradients, are, [B, BLOCK_D], and which of these exist."""
    out_ptr = pointer_to(tl.load(numbers_ptr + OUT * F + tl.load(described_ptr + NUMBER * n + i)), DTYPE, ALIGN)
    out_stride, o_d = multiple_at(described_ptr + OUT_STRIDE * n + i, ALIGN), tl.arange(0, BLOCK_D)
    there = (b < tl.load(described_ptr + BAGS * n + i))[:, None] & (o_d < aligned(D, ALIGN))[None, :]
    return out_ptr + (b.to(tl.int64) * out_stride)[:, None] + o_d[None, :], there


@triton.jit
def known_row(id, described_ptr, n, i):
    """reference.known_rows of feature i."""
    unknown, size = tl.load(described_ptr + UNKNOWN * n + i), tl.load(described_ptr + SIZE * n + i)
    hidden = tl.load(described_ptr + HIDDEN * n + i)
    mixed = id * -7046029254386353131
    rows = tl.maximum(size - (hidden >= 0).to(tl.int64), 1)
    row = (mixed ^ (mixed >> 32)) % rows
    row = tl.where(row < 0, row + rows, row)
    row += ((hidden >= 0) & (row >= hidden)).to(tl.int64)
    outside = (id < 0) | (id >= size)
    return tl.where(outside & (unknown != 0), tl.where(unknown == 1, size - 1, row), id)


@triton.jit
def rows_of(
    described_ptr, numbers_ptr, n, F, i, p, there, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr
):  # fmt: skip
    """``rows_at`` of feature i, with the address of its ids."""
    address = tl.load(numbers_ptr + IDS * F + tl.load(described_ptr + NUMBER * n + i))
    return rows_at(address, described_ptr, n, i, p, there, WIDE_IDS, HAS_KNOWN)


@triton.jit
def rows_at(address, described_ptr, n, i, p, there, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr):
    """The rows that lookups p of feature i are of, and whether they are rows that count: in the table, no padding."""
    ids_ptr = address.to(tl.pointer_type(tl.int64 if WIDE_IDS else tl.int32))
    row = tl.load(ids_ptr + p, mask=there, other=-1).to(tl.int64)
    if HAS_KNOWN:
        row = known_row(row, described_ptr, n, i)
    rows, padding = tl.load(described_ptr + ROWS * n + i), tl.load(described_ptr + PADDING * n + i)
    return row, there & (row >= 0) & (row < rows) & (row != padding)


@triton.jit
def factors_of(
    described_ptr, numbers_ptr, n, F, i, p, there, DTYPE: tl.constexpr, ACC: tl.constexpr, HAS_OFFSETS: tl.constexpr
):  # fmt: skip
    """The per-sample weights of lookups p of feature i, ones where it has none."""
    address = tl.load(numbers_ptr + (OUT + 1 + 3 * HAS_OFFSETS) * F + tl.load(described_ptr + NUMBER * n + i))
    factors_ptr = address.to(tl.pointer_type(DTYPE))
    factors = tl.load(factors_ptr + p, mask=tl.where(address != 0, there, False), other=0.0).to(ACC)
    return tl.where(address != 0, factors, 1.0)
