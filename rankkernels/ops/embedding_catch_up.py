"""The steps that dense Adam took on rows while no batch looked them up. Kernel: csrc/cpu/embedding/catch_up_kernel.h.

Its header has the mathematics: how a history of the steps, a few numbers each, stands for all that they did to a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._features import Features
from rankkernels.ops._library import define, lib
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import notice_reference

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


# ``states`` are the two moments of each table, ``last_steps`` int32 [R]: the step that each row is as of, zero or
# negative if it never had a gradient. Ids outside a table are left to the lookup's own error.
TABLES = "Tensor(a!)[] weights, Tensor(b!)[] states, Tensor(c!)[] last_steps, Tensor[] histories"
define(f"embedding_catch_up({TABLES}, {schema_of(Features)}, str names, float[] clocks) -> ()")
# The same for every row of the tables.
define(f"embedding_catch_up_all({TABLES}, float[] clocks) -> ()")
# The rows that these lookups' gradients moved are as of the tables' ``steps``.
define(f"embedding_mark_steps(Tensor(a!)[] last_steps, {schema_of(Features)}, int[] steps) -> ()")
# Adds a step of rate lr. ``decay_before`` and ``decay_after`` are ``Clock.decay`` without and with it.
define(
    "adam_history(Tensor(a!) history, int base, int step, float beta1, float beta2, float lr, float decay_before, "
    "float decay_after) -> ()"
)


def new_history(length: int, beta1: float, beta2: float, device: torch.device | None = None) -> Tensor:
    """An empty history of ``length`` - 1 steps, on the CPU unless another device is given."""
    history, i = torch.zeros(length, WIDTH, dtype=torch.float64), torch.arange(length, dtype=torch.float64)
    history[:, -2], history[:, -1] = beta1**i, beta2**i
    return history.to(device)


def _centre(t: float, beta1: float, beta2: float) -> float:
    """The a_s of the steps that count for a row last stepped at ``t``."""
    delay = math.ceil(1 / (1 - beta1))
    return math.sqrt(beta2**delay / -math.expm1((t + delay) * math.log(beta2)))


def _contributions(k: Tensor, start: Tensor, beta1: float, beta2: float, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of step start + k to each ``start``: the first term of lr 1 without bias correction, and tau."""
    a = (beta2**k / -torch.expm1((start + k) * math.log(beta2))).sqrt()
    r = (a / centres).sqrt()
    return beta1**k / r, (1 - r) / (1 + r)


def _window(beta1: float) -> int:
    """Steps after which nothing more comes of a gradient."""
    return math.ceil(math.log(1e-18) / math.log(beta1)) if beta1 > 0 else 0


def truncation(beta1: float, beta2: float) -> float:
    """The largest relative error of ``TERMS`` terms, of all start steps."""
    if beta1 == 0:
        return 0.0
    if beta2 == 0:
        return math.inf
    k, worst = torch.arange(1, _window(beta1) + 1, dtype=torch.float64), 0.0
    for start in (1.0, 10.0, 1e9):
        centre = torch.tensor(_centre(start, beta1, beta2), dtype=torch.float64)
        first, tau = _contributions(k, torch.tensor(start), beta1, beta2, centre)
        first = first / (1 - beta1 ** (start + k))
        left = first * 2 * tau.abs() ** TERMS / (1 - tau.abs()).clamp(min=1e-300)
        least = (first * torch.where(tau > 0, (1 - tau) / (1 + tau), (1 + tau) / (1 - tau))).sum()  # at z = 1 or -1
        worst = max(worst, float(left.sum() / least))
    return worst


@torch.library.impl(lib, "adam_history", "CompositeExplicitAutograd")
def _(history, base, step, beta1, beta2, lr, decay_before, decay_after):
    fresh = history[step - 1 - base]
    fresh[: TERMS + 2] = 0
    fresh[0], fresh[1] = _centre(step - 1, beta1, beta2), decay_before
    n = min(_window(beta1), step - base)
    starts = history[step - n - base : step - base]
    k = torch.arange(n, 0, -1, dtype=torch.float64, device=history.device)
    first, tau = _contributions(k, step - k, beta1, beta2, starts[:, 0])
    powers = tau[:, None] ** torch.arange(TERMS, dtype=torch.float64, device=history.device)
    powers[:, 1:] *= 2
    starts[:, 2:-2] += (lr / (1 - beta1**step) / decay_after * first)[:, None] * powers


def _catch_up_rows(rows: Tensor, weight: Tensor, m: Tensor, v: Tensor, last: Tensor, history: Tensor, c: Clock) -> None:
    """Brings these distinct rows up to the clock's step."""
    step, base, before = int(c.step), int(c.base), last[rows]
    idle = torch.where(before > 0, before < step, (-before < step) & (c.decay != 1))
    rows, before = rows[idle], before[idle].long()
    stepped = (before > 0)[:, None]
    start = torch.where(before > 0, before, (-before).clamp(min=base))
    centre, decay, *terms, _, _ = history[start - base].split(1, 1)
    keep1, keep2 = history[step - start][:, -2:].split(1, 1)
    dtype = m.dtype
    gx = centre.to(dtype) * v[rows].sqrt()
    z = (gx - c.eps) / (gx + c.eps)
    polynomials = [torch.ones_like(z), z]
    while len(polynomials) < TERMS:
        polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
    series = sum((c.decay * term).to(dtype) * p for term, p in zip(terms, polynomials))
    moved = (c.decay / decay).to(dtype) * weight[rows].to(dtype) - torch.where(
        stepped, m[rows] * series / (gx + c.eps), 0
    )
    weight[rows] = moved.to(weight.dtype)
    m[rows] = torch.where(stepped, keep1.to(dtype), 1) * m[rows]
    v[rows] = torch.where(stepped, keep2.to(dtype), 1) * v[rows]
    last[rows] = torch.where(before > 0, step, -step).to(last.dtype)


def _tables(weights, states, last_steps, histories, clocks):
    """The arguments of ``_catch_up_rows`` after the rows, of each table."""
    for t, table in enumerate(zip(weights, states[::2], states[1::2], last_steps, histories)):
        yield *table, Clock(*clocks[len(Clock._fields) * t :][: len(Clock._fields)])


def _rows_of(features: Features, t: int, R: int, stepped: bool) -> Tensor:
    """The distinct rows of table ``t`` that are looked up; with ``stepped``, those of them that get a gradient."""
    found = []
    for ids, table, padding in zip(features.indices, features.tables, features.padding_idx):
        if table == t:
            kept = (ids >= 0) & (ids < R)
            found.append(ids[kept & (ids != padding) & (ids != features.frozen_rows[t]) if stepped else kept].long())
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64)


@torch.library.impl(lib, "embedding_catch_up", "CompositeExplicitAutograd")
def _(weights, states, last_steps, histories, *rest):
    *features, _names, clocks = rest
    features = Features(*features).as_rows()
    notice_reference("embedding_catch_up", weights[0])
    for t, table in enumerate(_tables(weights, states, last_steps, histories, clocks)):
        _catch_up_rows(_rows_of(features, t, weights[t].size(0), False), *table)


@torch.library.impl(lib, "embedding_catch_up_all", "CompositeExplicitAutograd")
def _(weights, states, last_steps, histories, clocks):
    notice_reference("embedding_catch_up", weights[0])
    for table in _tables(weights, states, last_steps, histories, clocks):
        _catch_up_rows(torch.arange(table[0].size(0), device=table[0].device), *table)


@torch.library.impl(lib, "embedding_mark_steps", "CompositeExplicitAutograd")
def _(last_steps, *rest):
    *features, steps = rest
    features = Features(*features).as_rows()
    for t, (last, step) in enumerate(zip(last_steps, steps)):
        last[_rows_of(features, t, last.size(0), True)] = step


def _nothing(*_arguments) -> None:
    """They return nothing, whatever they are given."""


for _name in ("embedding_catch_up", "embedding_catch_up_all", "embedding_mark_steps", "adam_history"):
    torch.library.register_fake(f"rankkernels::{_name}", _nothing, lib=lib)
