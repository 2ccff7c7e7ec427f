"""Sums of sorted lookups' gradients, row by row, in a fixed order: the same bits run after run, no atomics.

    1. embedding_bag_reduce_kernel   adds up each piece of a run of equal keys that lies in one of the tiles of TILE
                                     lookups; a run that lies in one tile is done with
    2. embedding_bag_join_kernel     adds up the pieces of a run that crosses tiles

What is done with a row's sum is ``finish``: stored in a dense gradient, in a sparse one, or an optimizer's step. Bytes:
keys and orders, 12 or 16 a lookup, each lookup's gradient once, then what finishing moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_blocks import pointer_to
from rankkernels._triton.embedding_bag_features import Tile
from rankkernels._triton.embedding_bag_numbers import described
from rankkernels._triton.embedding_bag_sources import Sources
from rankkernels._triton.embedding_bag_step import KIND_SPARSE, T_KEY, T_NUMBER, T_ROWS, step
from rankkernels._triton.embedding_bag_update import Table

TILE = 32  # a constant, because the order of the sums follows from it


@triton.jit
def tables_of(described_ptr, n, keys, STEPS: tl.constexpr):
    """Of each key the last of n tables, by their ascending first keys, that begins at it or before."""
    t = tl.zeros_like(keys).to(tl.int32)
    for k in tl.static_range(STEPS):
        middle = t + (1 << (STEPS - 1 - k))
        first = tl.load(described_ptr + T_KEY * n + middle, mask=middle < n, other=0)
        t = tl.where((middle < n) & (first <= keys), middle, t)
    return t


@triton.jit
def finish(
    total, key, done, position, t, described_ptr, numbers_ptr, hyper_ptr, ranks_ptr, n, T, D, KIND: tl.constexpr,
    DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, CLIPS: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What becomes of the sums [P, BLOCK_D] of rows [P] that are ``done``; ``position``: of one of their lookups."""
    row = key - tl.load(described_ptr + T_KEY * n + t, mask=done, other=0)
    if KIND <= KIND_SPARSE:
        number, o_d = tl.load(described_ptr + T_NUMBER * n + t, mask=done, other=0), tl.arange(0, BLOCK_D)
        address = tl.load(numbers_ptr + number, mask=done, other=0)
        place = row
        if KIND == KIND_SPARSE:
            place = tl.load(ranks_ptr + position, mask=done, other=0) - 1
            place -= tl.load(numbers_ptr + 2 * T + number, mask=done, other=0)
            rows_ptr = tl.load(numbers_ptr + T + number, mask=done, other=0).to(tl.pointer_type(tl.int64))
            tl.store(rows_ptr + place, row, mask=done)
        out_ptr = pointer_to(address, DTYPE, ALIGN)[:, None] + (place * aligned(D, ALIGN))[:, None] + o_d[None, :]
        tl.store(out_ptr, total, mask=done[:, None] & (o_d < aligned(D, ALIGN))[None, :])
    else:
        step(total, row, done, t, described_ptr, hyper_ptr, n, D, KIND, DTYPE, ACC, ALIGN, CLIPS, ROUNDS, BLOCK_D)


@triton.jit(do_not_specialize=["lookups", "n", "T", "D"])
def embedding_bag_reduce_kernel(
    described_ptr, numbers_ptr, hyper_ptr, keys_ptr, order_ptr, sources_ptr, scales_ptr, ranks_ptr, carries_ptr,
    lookups, n, T, D, KIND: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    CLIPS: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P sorted lookups and the pieces that begin there, of the n tables whose width is D."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = tl.load(keys_ptr + p, mask=p < lookups, other=0).to(tl.int64)
    before = tl.load(keys_ptr + p - 1, mask=(p > 0) & (p < lookups), other=-1).to(tl.int64)
    t = tables_of(described_ptr, n, key, STEPS)
    first = tl.load(described_ptr + T_KEY * n + t)
    mine = (p < lookups) & (key >= first) & (key < first + tl.load(described_ptr + T_ROWS * n + t))
    starts = key != before
    mine &= starts | (p % TILE == 0)
    q = p[:, None] + tl.arange(0, TILE)[None, :]
    in_tile = (q // TILE == (p // TILE)[:, None]) & (q < lookups)
    same = tl.load(keys_ptr + q, mask=in_tile & mine[:, None], other=-1).to(tl.int64) == key[:, None]
    length = tl.sum((same & mine[:, None]).to(tl.int32), 1)
    o_d = tl.arange(0, BLOCK_D)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    for k in range(0, tl.max(length)):
        i = tl.load(order_ptr + p + k, mask=k < length, other=0)
        source_ptr = pointer_to(tl.load(sources_ptr + i, mask=k < length, other=0), DTYPE, ALIGN)
        x = tl.load(source_ptr[:, None] + o_d[None, :], mask=(k < length)[:, None] & of_row, other=0.0).to(ACC)
        if scales_ptr is not None:
            x *= tl.load(scales_ptr + i, mask=k < length, other=0.0).to(ACC)[:, None]
        total += x
    after = tl.load(keys_ptr + p + length, mask=mine & (p + length < lookups), other=-1).to(tl.int64)
    whole = starts & (after != key)
    slot = 2 * (p // TILE) + starts.to(tl.int64)
    carry_ptr = carries_ptr + (slot * aligned(D, ALIGN))[:, None] + o_d[None, :]
    tl.store(carry_ptr, total, mask=(mine & ~whole)[:, None] & of_row)
    finish(
        total, key, mine & whole, p, t, described_ptr, numbers_ptr, hyper_ptr, ranks_ptr, n, T, D, KIND, DTYPE, ACC,
        ALIGN, CLIPS, ROUNDS, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lookups", "n", "T", "D"])
def embedding_bag_join_kernel(
    described_ptr, numbers_ptr, hyper_ptr, keys_ptr, ranks_ptr, carries_ptr, lookups, n, T, D,
    KIND: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, CLIPS: tl.constexpr,
    ROUNDS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The run that begins in a tile and goes on in the next, if one does: [0] of a tile's two carries is of a run that
    began before, [1] of one that goes on."""
    tile = tl.program_id(0).to(tl.int64)
    end = (tile + 1) * TILE
    key = tl.load(keys_ptr + end - 1).to(tl.int64)
    goes_on = tl.load(keys_ptr + end).to(tl.int64) == key
    began_before = tl.load(keys_ptr + tile * TILE - 1, mask=tile > 0, other=-1).to(tl.int64) == key
    if goes_on & (began_before == 0):
        keys = tl.zeros([1], tl.int64) + key
        t = tables_of(described_ptr, n, keys, STEPS)
        first = tl.load(described_ptr + T_KEY * n + t)
        mine = (keys >= first) & (keys < first + tl.load(described_ptr + T_ROWS * n + t))
        o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
        of_row = (o_d < aligned(D, ALIGN))[None, :]
        total = tl.zeros([1, BLOCK_D], ACC)
        k, more = tl.full([], 0, tl.int64), tl.max(mine.to(tl.int32))
        while more > 0:
            part = k + o_k  # 0: [1] of this tile
            begin = (tile + part) * TILE
            key_there = tl.load(keys_ptr + begin, mask=(begin < lookups) & (part > 0), other=-1).to(tl.int64)
            same = (key_there == key) | (part == 0)
            slot = 2 * (tile + part) + (part == 0).to(tl.int64)
            carry_ptr = carries_ptr + (slot * aligned(D, ALIGN))[:, None] + o_d[None, :]
            total += tl.sum(tl.load(carry_ptr, mask=same[:, None] & of_row, other=0.0), 0)[None, :]
            k += BLOCK_K
            more = tl.min(same.to(tl.int32))
        finish(
            total, keys, mine, tl.zeros([1], tl.int64) + end - 1, t, described_ptr, numbers_ptr, hyper_ptr, ranks_ptr,
            n, T, D, KIND, DTYPE, ACC, ALIGN, CLIPS, ROUNDS, BLOCK_D,
        )  # fmt: skip


def add_up(
    found: Sources, tiles: dict[Tile, list[Table]], T: int, kind: int, numbers: Tensor, ranks: Tensor | None = None,
    clips: bool = False, rounds: bool = False,
) -> None:  # fmt: skip
    """Finishes the rows of the tables, two launches for those of one dtype, width and alignment. ``numbers``: of the
    gradients of T tables, or an optimizer's settings."""
    lookups = found.keys.numel()
    numbers, hyper = (numbers, None) if kind <= KIND_SPARSE.value else (None, numbers)
    for tile, tables in tiles.items():
        where, n = described(tuple(v for column in zip(*tables) for v in column), found.keys.device), len(tables)
        carries = torch.empty(
            (2 * triton.cdiv(lookups, TILE), tile.D), dtype=tile.accumulator, device=found.keys.device
        )  # fmt: skip
        size, steps = (lookups, n, T, tile.D), max(n - 1, 1).bit_length()
        constants = kind, *tile.types, tile.ALIGN, clips, rounds, TILE, steps
        rows, parts = tile.sums, max(1, 1024 // tile.BLOCK_D)
        pointers = where, numbers, hyper, found.keys, found.order, found.sources, found.scales, ranks, carries
        blocks, of_reduce = (triton.cdiv(lookups, rows),), (*constants, rows, tile.BLOCK_D)
        launch(embedding_bag_reduce_kernel, blocks, pointers, size, of_reduce, num_warps=4)
        if lookups > TILE:
            pointers = where, numbers, hyper, found.keys, ranks, carries
            blocks, of_join = (triton.cdiv(lookups, TILE) - 1,), (*constants, parts, tile.BLOCK_D)
            launch(embedding_bag_join_kernel, blocks, pointers, size, of_join, num_warps=2)
