"""Rows of tables under exact Adam brought up to date in Triton, and their last steps. Bytes a row: w, m and v, read and
written, its last step and 160 of the history, which caches hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_blocks import BAGS, FROZEN, NUMBER, WEIGHT, item_of, pointer_to, rows_of
from rankkernels._triton.embedding_bag_features import Call, Tile
from rankkernels._triton.embedding_bag_numbers import bits_of, described
from rankkernels._triton.embedding_bag_reduce import tables_of
from rankkernels._triton.embedding_bag_update import row_alignment
from rankkernels._triton.embedding_catch_up_idle import (
    C_STEP,
    I_KEY,
    I_ROWS,
    I_STRIDE,
    I_WEIGHT,
    caught_up,
    clock_of,
    is_idle,
    last_steps_of,
    state_of,
)
from rankkernels.ops._idle_steps import Clock

BLOCK = 512  # lookups of a program


@triton.jit(do_not_specialize=["lookups", "n", "D"])
def embedding_catch_up_kernel(
    behind_ptr, clocks_ptr, keys_ptr, lookups, n, D, STEPS_NOW: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows of BLOCK_P sorted keys, or without keys as many rows, of the n tables whose width is D. With STEPS_NOW
    they are as of the step after the clock's, which follows."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mine = p < lookups
    key = p
    if keys_ptr is not None:
        key = tl.load(keys_ptr + p, mask=mine, other=-1).to(tl.int64)
        mine &= key != tl.load(keys_ptr + p - 1, mask=mine & (p > 0), other=-1).to(tl.int64)
    t = tables_of(behind_ptr, n, key, STEPS)
    row = key - tl.load(behind_ptr + I_KEY * n + t)
    mine &= (row >= 0) & (row < tl.load(behind_ptr + I_ROWS * n + t))
    last_ptr, clock_ptr = last_steps_of(behind_ptr, n, t, row), clock_of(behind_ptr, clocks_ptr, n, t)
    last = tl.load(last_ptr, mask=mine, other=0)
    idle = mine & is_idle(last, clock_ptr)
    o_d = tl.arange(0, BLOCK_D)
    of_row = (o_d < aligned(D, ALIGN))[None, :]
    with_state = (idle & (last > 0))[:, None] & of_row
    weight_ptr = pointer_to(tl.load(behind_ptr + I_WEIGHT * n + t), DTYPE, ALIGN)
    stride = tl.load(behind_ptr + I_STRIDE * n + t) // ALIGN * ALIGN
    weight_ptr = weight_ptr[:, None] + (row * stride)[:, None] + o_d[None, :]
    m_ptr, v_ptr = state_of(behind_ptr, n, t, row, ACC, ALIGN, BLOCK_D)
    w = tl.load(weight_ptr, mask=idle[:, None] & of_row, other=0.0).to(ACC)
    m, v = tl.load(m_ptr, mask=with_state, other=0.0), tl.load(v_ptr, mask=with_state, other=0.0)
    w, keep1, keep2 = caught_up(w, m, v, last, idle, clock_ptr, ACC)
    tl.store(weight_ptr, w, mask=idle[:, None] & of_row)
    tl.store(m_ptr, m * keep1, mask=with_state)
    tl.store(v_ptr, v * keep2, mask=with_state)
    step = tl.load(clock_ptr + C_STEP).to(tl.int32)
    tl.debug_barrier()  # every thread of a row has loaded what one of them stores
    if STEPS_NOW:
        tl.store(last_ptr, step + 1, mask=mine)
    else:
        tl.store(last_ptr, tl.where(last > 0, step, -step), mask=idle)


@triton.jit(do_not_specialize=["n", "F"])
def embedding_mark_steps_kernel(
    described_ptr, numbers_ptr, steps_ptr, n, F, WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of lookups that get a gradient are as of their table's step. Those of one row all store the same."""
    i = item_of(described_ptr, n, tl.program_id(0), BLOCK_N)
    p = (tl.program_id(0) - tl.load(described_ptr + i)) * BLOCK + tl.arange(0, BLOCK)
    there = p < tl.load(described_ptr + BAGS * n + i)
    row, keep = rows_of(described_ptr, numbers_ptr, n, F, i, p, there, WIDE_IDS, HAS_KNOWN)
    keep &= row != tl.load(described_ptr + FROZEN * n + i)
    last_ptr = tl.load(described_ptr + WEIGHT * n + i).to(tl.pointer_type(tl.int32))
    step = tl.load(steps_ptr + tl.load(described_ptr + NUMBER * n + i)).to(tl.int32)
    tl.store(last_ptr + row, step + tl.zeros_like(row).to(tl.int32), mask=keep)


def rows_of_program(tile: Tile) -> int:
    """16 bytes of sums a thread, beside the state and what is made of it: of twice as many a warp in six would fit."""
    return max(1, tile.sums // 4)


class Behind(NamedTuple):
    """What the kernels know of a table: the columns I_* of embedding_catch_up_idle.py, in their order."""

    key: int  # of its first row
    rows: int
    weight: int  # the address
    stride: int
    state0: int
    state1: int
    state_stride: int
    last_steps: int
    clock: int  # which


class Tables:
    """Tables that are behind: the arguments of the ops, which are checked."""

    def __init__(
        self, weights: Sequence[Tensor], states: Sequence[Tensor], last_steps: Sequence[Tensor],
        histories: Sequence[Tensor], clocks: Sequence[float],
    ):  # fmt: skip
        each, found = len(Clock._fields), {}
        for t, history in enumerate(histories):
            clock = _alignment.address(history), Clock(*clocks[each * t : each * t + each])
            found.setdefault(clock, []).append(t)
        self.distinct = list(found)
        self.clock = {t: i for i, tables in enumerate(found.values()) for t in tables}
        self.weights, self.states, self.last_steps = weights, states, last_steps
        self.rows = [w.size(0) for w in weights]

    def as_numbers(self) -> list[int]:
        """What a launch is to bring to the device: the clocks, each once."""
        return [
            v for history, c in self.distinct
            for v in (history, int(c.step), int(c.base), *bits_of((c.decay, c.eps)))
        ]  # fmt: skip

    def alignment(self, t: int) -> int:
        """Of a table's rows in items, 1 if its state's are not aligned."""
        return row_alignment(self.weights[t], self.states[2 * t : 2 * t + 2])

    def described(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """The columns of tables, each with the key of its first row."""
        columns = zip(*(self._behind(*place) for place in places))
        return described(tuple(v for column in columns for v in column), self.weights[0].device)

    def _behind(self, t: int, key: int) -> Behind:
        weight, m, v, last = self.weights[t], *self.states[2 * t : 2 * t + 2], self.last_steps[t]
        addresses = _alignment.address(m), _alignment.address(v), m.stride(0), _alignment.address(last)
        return Behind(key, self.rows[t], _alignment.address(weight), weight.stride(0), *addresses, self.clock[t])

    def catch_up(
        self, tables: Sequence[int], clocks: Tensor, keys: Tensor | None = None, first_key: Sequence[int] = (),
        steps_now: bool = False,
    ) -> None:  # fmt: skip
        """Brings the rows of these ``tables`` up to date, all or those of sorted ``keys``, a launch for those of one
        dtype, width and alignment. ``clocks``: ``as_numbers`` on the device."""
        tiles: dict[Tile, list[int]] = {}
        for t in tables:
            weight = self.weights[t]
            if weight.numel():
                tiles.setdefault(Tile(weight.dtype, weight.size(1), self.alignment(t)), []).append(t)
        for tile, of_tile in tiles.items():
            if keys is None:
                first_key = {t: sum(self.rows[s] for s in of_tile[:i]) for i, t in enumerate(of_tile)}
            lookups = sum(self.rows[t] for t in of_tile) if keys is None else keys.numel()
            behind, n = self.described([(t, first_key[t]) for t in of_tile]), len(of_tile)
            rows = rows_of_program(tile)
            constants = steps_now, *tile.types, tile.ALIGN, max(n - 1, 1).bit_length(), rows, tile.BLOCK_D
            grid = (triton.cdiv(lookups, rows),)
            size = lookups, n, tile.D
            launch(embedding_catch_up_kernel, grid, (behind, clocks, keys), size, constants, num_warps=4)


def mark_steps(call: Call, steps: Sequence[int]) -> None:
    """``steps``: of the call's features, whose tables are last steps [R]."""
    chosen = call.chosen()
    numbers = call.numbers(steps)
    described, blocks = call.described(chosen, BLOCK)
    wide_ids, has_known, *_ = call.flags
    pointers = described, numbers, numbers[numbers.numel() - len(steps) :]
    constants = wide_ids, has_known, triton.next_power_of_2(len(chosen)), BLOCK
    launch(embedding_mark_steps_kernel, (blocks,), pointers, (len(chosen), len(steps)), constants, num_warps=4)
