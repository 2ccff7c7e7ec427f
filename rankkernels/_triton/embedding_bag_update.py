"""What an optimizer's step takes beside the gradients, brought to the device, and the step on given rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton._alignment import aligned
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_features import Tile, alignment, matrix_of
from rankkernels._triton.embedding_bag_numbers import bits_of, described
from rankkernels._triton.embedding_bag_numbers import numbers as on_device
from rankkernels._triton.embedding_bag_step import (
    COUNT,
    GRAD_FACTOR,
    INVERSE_ROOT,
    LR,
    MAX_NORM,
    OWN2,
    OWN3,
    PHILOX_KEY,
    SETTINGS,
    SGD,
    SKIPS,
    STEP,
    step,
)
from rankkernels.ops._rules import OPTIMIZERS, ROUNDING, RULES, Live, settings

ADAMS = ("adam", "adamw", "rowwise_adam")
KIND = SGD.value  # of the first optimizer; the others follow


class Table(NamedTuple):
    """What the kernels know of a table: the columns T_* of embedding_bag_step.py, in their order."""

    key: int  # of its first row
    rows: int
    number: int  # in the call
    weight: int = 0  # the address
    stride: int = 0
    state0: int = 0
    state1: int = 0
    state_stride: int = 0
    settings: int = 0  # which


@triton.jit(do_not_specialize=["T"])
def embedding_bag_fold_kernel(
    places_ptr, given_ptr, folded_ptr, T, BIAS: tl.constexpr, ROOT: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """A table's settings [16], where the number of the step, the rate and the loss scale are on the device. The step is
    counted, unless it is to be skipped."""
    t, o = tl.program_id(0), tl.arange(0, PLACES)
    count_ptr = tl.load(places_ptr + t).to(tl.pointer_type(tl.float32))
    lr = tl.load(tl.load(places_ptr + T + t).to(tl.pointer_type(tl.float32))).to(tl.float64)
    scale = tl.load(tl.load(places_ptr + 2 * T + t).to(tl.pointer_type(tl.float32))).to(tl.float64)
    skips = tl.load(tl.load(places_ptr + 3 * T + t).to(tl.pointer_type(tl.float32))) != 0.0
    given_ptr += tl.load(places_ptr + 4 * T + t) * PLACES
    count = tl.load(count_ptr).to(tl.float64) + 1.0
    tl.debug_barrier()  # every thread has loaded what one of them stores
    tl.store(count_ptr, count.to(tl.float32), mask=skips == 0)
    one = tl.full([], 1.0, tl.float64)
    size, root = lr, one
    if BIAS:
        correction = 1.0 - tl.exp2(count * tl.log2(tl.load(given_ptr + OWN2)))
        root = tl.sqrt(1.0 - tl.exp2(count * tl.log2(tl.load(given_ptr + OWN3))))
        size = lr * root / correction if ROOT else lr / correction
        root = one if ROOT else one / root
    value = tl.load(given_ptr + o)
    value = tl.where(o == LR, lr, tl.where(o == STEP, size, tl.where(o == INVERSE_ROOT, root, value)))
    value = tl.where(o == GRAD_FACTOR, 1.0 / scale, tl.where(o == COUNT, count, value))
    tl.store(folded_ptr + t * PLACES + o, tl.where(o == SKIPS, skips.to(tl.float64), value))


@triton.jit(do_not_specialize=["N", "D", "stride_v"])
def embedding_bag_rows_kernel(
    described_ptr, hyper_ptr, rows_ptr, values_ptr, N, D, stride_v, KIND: tl.constexpr, DTYPE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, CLIPS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The step on distinct rows of one table, whose gradients are ``values``."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + p, mask=p < N, other=0)
    value_ptr = values_ptr + (p * aligned(stride_v, ALIGN))[:, None] + o_d[None, :]
    inside = (p < N)[:, None] & (o_d < aligned(D, ALIGN))[None, :]
    grad = tl.load(value_ptr, mask=inside, other=0.0).to(ACC)
    t = tl.zeros([BLOCK_P], tl.int32)
    step(grad, row, p < N, t, described_ptr, hyper_ptr, 1, D, KIND, DTYPE, ACC, ALIGN, CLIPS, ROUNDS, BLOCK_D)


def folded(kind: str, hyper: Sequence[float]) -> tuple[float, ...]:
    """A table's settings as the kernels have them: embedding_bag_step.py."""
    now = settings(kind, hyper)
    size, root, own = now["lr"], 1.0, (0.0, 0.0, now["beta1"], now["beta2"])
    if kind in ADAMS:
        correction, root = 1 - now["beta1"] ** now["step"], math.sqrt(1 - now["beta2"] ** now["step"])
        size, root = (size * root / correction, 1.0) if kind == "adam" else (size / correction, 1 / root)
    elif kind == "ftrl":
        own = -now["lr_power"], now["beta"], now["l1"], now["l2"]
    elif kind == "rowwise_rmsprop":
        own = now["ar_alpha"], 1 - now["min_shrinkage"], 0.0, 0.0
    rates = 1 - now["beta1"], 1 - now["beta2"], now["eps"], now["weight_decay"], now["max_norm"], hyper[ROUNDING]
    return now["lr"], size, root, now["grad_factor"], now["step"], 0.0, *rates, *own


def row_alignment(weight: Tensor, matrices: Sequence[Tensor]) -> int:
    """Of a table's rows in items, 1 if those of these states are not aligned."""
    whole = all(alignment(s) == math.gcd(16 // s.element_size(), s.size(1)) for s in matrices)
    return alignment(weight) if whole else 1


class Step:
    """A step of one optimizer on the tables ``stepped`` of embedding_bag_update's arguments, which are checked."""

    def __init__(
        self, weights: Sequence[Tensor], states: Sequence[Tensor], optimizer: int, hyper: Sequence[float],
        stepped: Sequence[int],
    ):  # fmt: skip
        self.weights, self.stepped, self.name, n = weights, stepped, OPTIMIZERS[optimizer], len(weights)
        rule, each, numbers = RULES[self.name], len(states) // n, len(hyper) // n
        kept = rule.elementwise + rule.row_wise
        self.states = [states[each * t : each * t + kept] for t in range(n)]
        self.live = [Live(*states[each * t + kept : each * t + each]) for t in range(n)] if each > kept else []
        self.kind, self.elementwise = KIND + optimizer, rule.elementwise
        of_table = [folded(self.name, hyper[numbers * t : numbers * t + numbers]) for t in range(n)]
        self.distinct = list(dict.fromkeys(of_table))
        self.given = {t: self.distinct.index(of_table[t]) for t in stepped}
        self.place = {t: i for i, t in enumerate(stepped)} if self.live else self.given
        self.clips, self.rounds = (
            any(values[place.value] != 0 for values in self.distinct) for place in (MAX_NORM, PHILOX_KEY)
        )

    def as_numbers(self) -> list[int]:
        """What a launch is to bring to the device: the bits of the settings, and where live ones are."""
        bits = bits_of([v for of_table in self.distinct for v in of_table])
        if not self.live:
            return list(bits)
        places = zip(*([_alignment.address(v) for v in self.live[t]] for t in self.stepped))
        return [*bits, *(place for of_all in places for place in of_all), *self.given.values()]

    def settings(self, numbers: Tensor) -> Tensor:
        """The settings on the device, float64, from the numbers that are there; live steps are counted."""
        size = len(self.distinct) * SETTINGS.value
        given, where = numbers.split([size, numbers.numel() - size])
        given, T = given.view(torch.float64), len(self.stepped)
        if not self.live:
            return given
        out = given.new_empty(T * SETTINGS.value)
        constants = self.name in ADAMS, self.name == "adam", SETTINGS.value
        launch(embedding_bag_fold_kernel, (T,), (where, given, out), (T,), constants, num_warps=1)
        return out

    def alignment(self, t: int) -> int:
        """Of a table's rows in items, 1 if its state's are not aligned."""
        whole = all(_alignment.address(s) % 16 == 0 for s in self.states[t])
        return row_alignment(self.weights[t], self.states[t][: self.elementwise]) if whole else 1

    def table(self, t: int, key: int = 0) -> Table:
        weight, states = self.weights[t], self.states[t]
        addresses = [*map(_alignment.address, states), 0, 0][:2]
        stride = states[0].stride(0) if self.elementwise else 0
        return Table(
            key, weight.size(0), t, _alignment.address(weight), weight.stride(0), *addresses, stride, self.place[t]
        )


def sparse_update(
    weight: Tensor, states: Sequence[Tensor], rows: Tensor, values: Tensor, optimizer: int, hyper: Sequence[float]
) -> None:
    """A step on ``rows`` [n], distinct, with the gradients ``values`` [n, D]."""
    update, values = Step([weight], states, optimizer, hyper, [0]), matrix_of(values)
    with torch.cuda.device_of(weight):
        given = update.settings(on_device(update.as_numbers(), weight.device))
        if values.numel() == 0:
            return
        tile = Tile(weight.dtype, weight.size(1), math.gcd(update.alignment(0), alignment(values)))
        pointers = described(tuple(update.table(0)), weight.device), given, rows.contiguous(), values
        constants = update.kind, *tile.types, tile.ALIGN, update.clips, update.rounds, tile.sums, tile.BLOCK_D
        grid = (triton.cdiv(rows.numel(), tile.sums),)
        size = rows.numel(), tile.D, values.stride(0)
        launch(embedding_bag_rows_kernel, grid, pointers, size, constants, num_warps=4)
