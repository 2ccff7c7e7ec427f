"""A step added to the history of Adam's steps, in Triton: csrc/embedding/idle_steps.h, HistoryStep.

Some 400 entries of 160 bytes, read and written: a few programs, bound by the launch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag_numbers import bits_of
from rankkernels._triton.embedding_catch_up_idle import CENTRE, DECAY, POWER1, POWER2, TERM, TERMS, WIDTH
from rankkernels.ops._idle_steps import centre_of, log_of, window

BLOCK_K = 64  # entries of a program


@triton.jit
def of_bits(number):
    return number.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["new", "n", "centre", "decay", "root2", "size"])
def adam_history_kernel(
    history_ptr, new, n, centre: tl.int64, decay: tl.int64, root2: tl.int64, size: tl.int64, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Adds a step to the n entries up to the ``new`` one, which begins with it; the float64 numbers as bits."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K) + 1  # steps since the entry
    is_new, there = k == 1, k <= n
    start_ptr = history_ptr + (new + 1 - k).to(tl.int64) * WIDTH
    power_ptr = history_ptr + k * WIDTH
    g = tl.load(start_ptr + CENTRE, mask=there & (k > 1), other=1.0)
    g = tl.where(is_new, of_bits(centre), g)
    tl.store(start_ptr + CENTRE, g, mask=is_new)
    tl.store(start_ptr + DECAY, tl.zeros_like(g) + of_bits(decay), mask=is_new)
    power1, power2 = (
        tl.load(power_ptr + POWER1, mask=there, other=0.0),
        tl.load(power_ptr + POWER2, mask=there, other=1.0),
    )
    r = tl.sqrt(tl.sqrt(power2) / (of_bits(root2) * g))
    tau, term = (1.0 - r) / (1.0 + r), of_bits(size) * power1 / r
    for j in tl.static_range(TERMS):
        before = tl.load(start_ptr + TERM + j, mask=there & (k > 1), other=0.0)
        tl.store(start_ptr + TERM + j, before + tl.where(there, term, 0.0), mask=there | is_new)
        term *= tau if j else tau + tau


def adam_history(
    history: Tensor, base: int, step: int, beta1: float, beta2: float, lr: float, decay_before: float,
    decay_after: float,
) -> None:  # fmt: skip
    """As the op has it."""
    root2 = math.sqrt(-math.expm1(step * log_of(beta2)))
    given = centre_of(step - 1, beta1, beta2), decay_before, root2, lr / (1 - beta1**step) / decay_after
    n = min(window(beta1), step - base)
    with torch.cuda.device_of(history):
        grid, numbers = (triton.cdiv(max(n, 1), BLOCK_K),), (step - 1 - base, n, *bits_of(given))
        launch(adam_history_kernel, grid, (history,), numbers, (BLOCK_K,), num_warps=1)
