"""Lookups of tables under exact Adam, and its step, that catch up with idle steps row by row as they come to them.

Kernels: csrc/cpu/embedding/bag_exact.cpp, csrc/cuda/embedding/bag_exact.cuh and
_triton/embedding_catch_up_lookup.py. A row is read where it is looked up, and read and written in the step:
bringing it up to date before would read and write it once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels.ops._checks import raise_documented
from rankkernels.ops._embedding_checks import check_forward, report_values
from rankkernels.ops._features import Features, names_of
from rankkernels.ops._idle_steps import Clock
from rankkernels.ops._library import define, lib, triton_embeds, triton_serves_tables
from rankkernels.ops._schema import schema_of
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, check_apart, check_update
from rankkernels.ops.embedding_catch_up import TABLES, check_behind

# ``embedding_bag`` of tables that lag behind. They may be changed: what they are read as stays.
define(
    f"embedding_bag_exact({TABLES}, {schema_of(Features)}, str names, float[] clocks, *, bool concat=False) -> Tensor[]"
)
# ``embedding_bag_update`` of them by AdamW, without per-sample weights and mode max: rows that get a gradient are then
# as of the step after the clock's. Rounding in ``hyper`` is 0: rows are where dense Adam has them.
define(
    f"embedding_bag_exact_update(Tensor?[] grad_outs, {TABLES}, {schema_of(Features)}, float[] hyper, float[] clocks) "
    "-> Tensor[] grad_per_sample_weights"
)
_ops = torch.ops.rankkernels
_ADAMW = OPTIMIZERS.index("adamw")


@torch.library.register_fake("rankkernels::embedding_bag_exact", lib=lib)
def _(weights, states, last_steps, histories, *rest, concat=False):
    *features, _clocks = rest
    return _ops.embedding_bag.default(weights, *features, concat=concat)


@torch.library.impl(lib, "embedding_bag_exact", "CompositeExplicitAutograd")
def _looked_up(weights, states, last_steps, histories, *rest, concat=False):
    *features, clocks = rest
    _ops.embedding_catch_up.default(weights, states, last_steps, histories, *features, clocks)
    return _ops.embedding_bag.default(weights, *features, concat=concat)


@torch.library.register_fake("rankkernels::embedding_bag_exact_update", lib=lib)
def _(grad_outs, weights, states, last_steps, histories, *rest):
    *features, hyper, _clocks = rest
    return _ops.embedding_bag_update.default(grad_outs, weights, states, *features, _ADAMW, hyper)


@torch.library.impl(lib, "embedding_bag_exact_update", "CompositeExplicitAutograd")
def _updated(grad_outs, weights, states, last_steps, histories, *rest):
    *features, hyper, clocks = rest
    _ops.embedding_catch_up.default(weights, states, last_steps, histories, *features, "", clocks)
    returned = _ops.embedding_bag_update.default(grad_outs, weights, states, *features, _ADAMW, hyper)
    tables, stepped = Features(*features).subset([f for f, g in enumerate(grad_outs) if g is not None])
    steps = [int(step) + 1 for step in clocks[:: len(Clock._fields)]]
    _ops.embedding_mark_steps.default([last_steps[t] for t in tables], *stepped, [steps[t] for t in tables])
    return returned


if triton_embeds:

    @torch.library.impl(lib, "embedding_bag_exact", "CUDA")
    def _(weights, *rest, concat=False):
        from rankkernels._triton.embedding_catch_up import embedding_bag_exact

        *behind, names, clocks = rest
        tables, features = (weights, *behind[:3], clocks), Features(*behind[3:])
        if features.need_values() or not triton_serves_tables(weights):
            return _looked_up(weights, *rest, concat=concat)
        check_forward(weights, features, names, concat)
        check_behind(*tables)
        report_values(features, [w.size(0) for w in weights], names_of(names, len(features.indices)))
        return embedding_bag_exact(*tables, features=features, concat=concat)

    @torch.library.impl(lib, "embedding_bag_exact_update", "CUDA")
    def _(grad_outs, weights, states, *rest):
        from rankkernels._triton.embedding_catch_up import embedding_bag_exact_update

        *behind, hyper, clocks = rest
        tables, features = (weights, states, *behind[:2], clocks), Features(*behind[2:])
        if features.need_values() or not triton_serves_tables(weights):
            return _updated(grad_outs, weights, states, *rest)
        check_update(grad_outs, weights, states, *features, _ADAMW, hyper)
        check_apart(weights)
        check_behind(*tables)
        return embedding_bag_exact_update(grad_outs, *tables, features=features, hyper=hyper)


def bag_exact(tables: Sequence, features: Features, names: str, concat: bool) -> list[Tensor]:
    """The lookup's results. ``tables``: what ``_exact_table.of_each`` has of them."""
    *lists, clocks = tables
    with raise_documented():
        return _ops.embedding_bag_exact.default(*lists, *features, names, clocks, concat=concat)
