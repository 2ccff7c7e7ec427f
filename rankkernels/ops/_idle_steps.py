"""The history of Adam's steps, on the host: what a few numbers each stand for. csrc/cpu/embedding/catch_up_kernel.h has
the mathematics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Terms of a start step; the columns of a history around them: centre, decay, terms, powers of beta1 and beta2.
TERMS = 16
WIDTH = TERMS + 4


class Clock(NamedTuple):
    """The steps a table has taken, as the schemas' ``clocks`` have them of each table: the last one's number, the step
    at which the history begins, the product of all (1 - lr weight_decay) since then, and Adam's eps."""

    step: float
    base: float
    decay: float
    eps: float


def new_history(length: int, beta1: float, beta2: float, device: torch.device | None = None) -> Tensor:
    """An empty history of ``length`` - 1 steps, on the CPU unless another device is given."""
    i = torch.arange(length, dtype=torch.float64, device=device)
    history = i.new_zeros(length, WIDTH)
    history[:, -2], history[:, -1] = beta1**i, beta2**i
    return history


def log_of(beta: float) -> float:
    """The logarithm, of a beta of 0, too."""
    return math.log(beta) if beta > 0 else -math.inf


def centre_of(t: float, beta1: float, beta2: float) -> float:
    """The a_s of the steps that count for a row last stepped at ``t``."""
    delay = math.ceil(1 / (1 - beta1))
    return math.sqrt(beta2**delay / -math.expm1((t + delay) * log_of(beta2)))


def contributions(k: Tensor, start: Tensor, beta1: float, beta2: float, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of step start + k to each ``start``: the first term of lr 1 without bias correction, and tau."""
    a = (beta2**k / -torch.expm1((start + k) * log_of(beta2))).sqrt()
    r = (a / centres).sqrt()
    return beta1**k / r, (1 - r) / (1 + r)


def window(beta1: float) -> int:
    """Steps after which nothing more comes of a gradient."""
    return math.ceil(math.log(1e-18) / math.log(beta1)) if beta1 > 0 else 0


def truncation(beta1: float, beta2: float) -> float:
    """The largest relative error of ``TERMS`` terms, of all start steps."""
    if beta1 == 0:
        return 0.0
    if beta2 == 0:
        return math.inf
    k, worst = torch.arange(1, window(beta1) + 1, dtype=torch.float64), 0.0
    for start in (1.0, 10.0, 1e9):
        centre = torch.tensor(centre_of(start, beta1, beta2), dtype=torch.float64)
        first, tau = contributions(k, torch.tensor(start), beta1, beta2, centre)
        first = first / (1 - beta1 ** (start + k))
        left = first * 2 * tau.abs() ** TERMS / (1 - tau.abs()).clamp(min=1e-300)
        least = (first * torch.where(tau > 0, (1 - tau) / (1 + tau), (1 + tau) / (1 - tau))).sum()  # at z = 1 or -1
        worst = max(worst, float(left.sum() / least))
    return worst
