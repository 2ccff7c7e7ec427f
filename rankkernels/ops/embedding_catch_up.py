"""The steps that dense Adam took on rows while no batch looked them up. Kernels: csrc/cpu/embedding/catch_up_kernel.h,
csrc/cuda/embedding/catch_up.cuh and _triton/embedding_catch_up_rows.py.

The first one's header has the mathematics: how a history of the steps, a few numbers each, stands for all that they
did to a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels.ops._embedding_checks import check_features
from rankkernels.ops._features import Features, names_of
from rankkernels.ops._idle_steps import TERMS, WIDTH, Clock, centre_of, contributions, window
from rankkernels.ops._library import define, lib, triton_embeds, triton_serves, triton_serves_tables
from rankkernels.ops._rules import OPTIMIZERS, Hyper
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import notice_reference
from rankkernels.ops.embedding_bag_update import check_tables

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


def _check_form(op: str, what: str, t: Tensor, fits: bool, form: str) -> None:
    torch._check(
        fits and t.layout == torch.strided and t.is_contiguous(),
        lambda: f"{op}: {what} must be {form}, contiguous, got {str(t.dtype).removeprefix('torch.')} {list(t.shape)}",
    )


def _check_history(op: str, history: Tensor) -> None:
    fits = history.dim() == 2 and history.size(1) == WIDTH and history.dtype == torch.float64
    _check_form(op, "a history", history, fits, f"float64 [S, {WIDTH}]")


def _check_last_steps(op: str, last: Tensor, R: int, device: torch.device) -> None:
    fits = last.shape == (R,) and last.dtype == torch.int32 and last.device == device
    _check_form(op, "last_steps", last, fits, f"int32 [{R}]")


def check_behind(weights, states, last_steps, histories, clocks) -> None:
    """Of tables that are behind; the texts are those of csrc/embedding/catch_up.h."""
    op, check, n, each = "embedding_catch_up", torch._check, len(weights), len(Clock._fields)
    lengths = len(states), len(last_steps), len(histories), len(clocks)
    check(
        lengths == (2 * n, n, n, each * n),
        lambda: (
            f"{op}: of each table there must be 2 states, last_steps, a history and a clock of 4 numbers, got "
            f"{lengths[0]}, {lengths[1]}, {lengths[2]} and {lengths[3]} for {n}"
        ),
    )
    check_tables(op, weights, states, OPTIMIZERS.index("adamw"), [0.0] * len(Hyper._fields) * n)
    for t, (weight, last, history) in enumerate(zip(weights, last_steps, histories)):
        _check_last_steps(op, last, weight.size(0), weight.device)
        _check_history(op, history)
        step, base, *_ = clocks[each * t : each * t + each]
        check(
            history.device == weight.device and 0 <= base <= step < base + history.size(0),
            lambda: (
                f"{op}: the history of table {t} must reach from step {base:g} to {step:g}, got shape "
                f"{list(history.shape)}"
            ),
        )


@torch.library.impl(lib, "adam_history", "CompositeExplicitAutograd")
def _add_to_history(history, base, step, beta1, beta2, lr, decay_before, decay_after):
    fresh = history[step - 1 - base]
    fresh[: TERMS + 2] = 0
    fresh[0], fresh[1] = centre_of(step - 1, beta1, beta2), decay_before
    n = min(window(beta1), step - base)
    starts = history[step - n - base : step - base]
    k = torch.arange(n, 0, -1, dtype=torch.float64, device=history.device)
    first, tau = contributions(k, step - k, beta1, beta2, starts[:, 0])
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
def _catch_up(weights, states, last_steps, histories, *rest):
    *features, _names, clocks = rest
    features = Features(*features).as_rows()
    notice_reference("embedding_catch_up", weights[0])
    for t, table in enumerate(_tables(weights, states, last_steps, histories, clocks)):
        _catch_up_rows(_rows_of(features, t, weights[t].size(0), False), *table)


@torch.library.impl(lib, "embedding_catch_up_all", "CompositeExplicitAutograd")
def _catch_up_all(weights, states, last_steps, histories, clocks):
    notice_reference("embedding_catch_up", weights[0])
    for table in _tables(weights, states, last_steps, histories, clocks):
        _catch_up_rows(torch.arange(table[0].size(0), device=table[0].device), *table)


@torch.library.impl(lib, "embedding_mark_steps", "CompositeExplicitAutograd")
def _mark_steps(last_steps, *rest):
    *features, steps = rest
    features = Features(*features).as_rows()
    for t, (last, step) in enumerate(zip(last_steps, steps)):
        last[_rows_of(features, t, last.size(0), True)] = step


def triton_catches_up(weights: Sequence[Tensor]) -> bool:
    """Whether Triton's kernels serve these tables: those of one GPU, whose launches they are."""
    return triton_serves_tables(weights) and all(w.device == weights[0].device for w in weights)


if triton_embeds:

    @torch.library.impl(lib, "embedding_catch_up", "CUDA")
    def _(*arguments):
        from rankkernels._triton.embedding_catch_up import embedding_catch_up

        *behind, names, clocks = arguments
        tables, features = (*behind[:4], clocks), Features(*behind[4:])
        if not triton_catches_up(tables[0]):
            return _catch_up(*arguments)
        check_behind(*tables)
        check_features(len(tables[0]), tables[0][0].device, features, names_of(names, len(features.indices)))
        embedding_catch_up(*tables, features=features)

    @torch.library.impl(lib, "embedding_catch_up_all", "CUDA")
    def _(*tables):
        from rankkernels._triton.embedding_catch_up import embedding_catch_up_all

        if not triton_catches_up(tables[0]):
            return _catch_up_all(*tables)
        check_behind(*tables)
        embedding_catch_up_all(*tables)

    @torch.library.impl(lib, "embedding_mark_steps", "CUDA")
    def _(last_steps, *rest):
        from rankkernels._triton.embedding_catch_up import embedding_mark_steps

        *lookups, steps = rest
        features, n = Features(*lookups), len(last_steps)
        if not triton_serves(last_steps[0]) or any(last.device != last_steps[0].device for last in last_steps):
            return _mark_steps(last_steps, *rest)
        torch._check(
            len(steps) == n,
            lambda: f"embedding_mark_steps: steps must have one entry a table, {n}, got {len(steps)}",
        )
        device = last_steps[0].device
        check_features(n, device, features, names_of("", len(features.indices)))
        for last in last_steps:
            _check_last_steps("embedding_mark_steps", last, last.numel(), device)
        embedding_mark_steps(last_steps, features, steps)

    @torch.library.impl(lib, "adam_history", "CUDA")
    def _(history, base, step, *numbers):
        from rankkernels._triton.embedding_catch_up import adam_history

        if not triton_serves(history):
            return _add_to_history(history, base, step, *numbers)
        _check_history("adam_history", history)
        torch._check(
            0 <= base < step < base + history.size(0),
            lambda: (
                f"adam_history: step {step} must lie after base {base} and fit into a history of shape "
                f"{list(history.shape)}"
            ),
        )
        adam_history(history, base, step, *numbers)


def _nothing(*_arguments) -> None:
    """They return nothing, whatever they are given."""


for _name in ("embedding_catch_up", "embedding_catch_up_all", "embedding_mark_steps", "adam_history"):
    torch.library.register_fake(f"rankkernels::{_name}", _nothing, lib=lib)
