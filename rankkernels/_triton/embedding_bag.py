"""Embedding lookups of many features in Triton: what the ops call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton.embedding_bag_features import Bring, Call, Tile, alignment, matrix_of
from rankkernels._triton.embedding_bag_forward import lookup
from rankkernels._triton.embedding_bag_numbers import described
from rankkernels._triton.embedding_bag_numbers import numbers as on_device
from rankkernels._triton.embedding_bag_reduce import add_up
from rankkernels._triton.embedding_bag_sources import Sources, factor_gradients, sources
from rankkernels._triton.embedding_bag_step import KIND_DENSE, KIND_SPARSE
from rankkernels._triton.embedding_bag_update import Step, Table, sparse_update
from rankkernels._triton.embedding_catch_up_rows import Tables
from rankkernels.ops._features import Features

__all__ = [
    "embedding_bag",
    "embedding_bag_backward",
    "embedding_bag_backward_sparse",
    "embedding_bag_update",
    "sparse_update",
]


def bag_results(weights: Sequence[Tensor], features: Features, concat: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The results of all features, or with ``concat`` the one of all, as the op has them, and the part of each."""
    of_feature = [weights[t] for t in features.tables]
    if concat:
        widths = [w.size(1) for w in of_feature]
        outs = [of_feature[0].new_empty((features.bags_of(0), sum(widths)))]
        return outs, outs[0].split_with_sizes(widths, 1)
    outs = [
        w.new_empty((*(ids.shape if features.mode(f) == "none" else (features.bags_of(f),)), w.size(1)))
        for f, (w, ids) in enumerate(zip(of_feature, features.indices))
    ]
    return outs, outs


def embedding_bag(weights: Sequence[Tensor], features: Features, concat: bool) -> list[Tensor]:
    """The results of ``bag_results``."""
    outs, parts = bag_results(weights, features, concat)
    weights = [matrix_of(w) for w in weights]
    with torch.cuda.device_of(weights[0]):
        lookup(Call(features, [matrix_of(out) for out in parts], weights, [w.size(0) for w in weights]))
    return outs


def _backward_call(
    grad_outs: Sequence[Tensor | None], weights: Sequence[Tensor], rows: Sequence[int], features: Features
) -> Call:
    outs = [None if g is None else matrix_of(g) for g in grad_outs]
    return Call(features, outs, [matrix_of(w) for w in weights], rows)


def _tables(call: Call, found: Sources, of: Callable[[int], tuple[int, Table]]) -> dict[Tile, list[Table]]:
    """The tables with lookups by what a launch is for; ``of`` one: the alignment of what is written, and the table."""
    grads: dict[int, list[Tensor]] = {}
    for f in call.chosen():
        grads.setdefault(call.features.tables[f], []).append(found.grads[f])
    tiles: dict[Tile, list[Table]] = {}
    for t in sorted(grads):
        aligned, table = of(t)
        tile = Tile(grads[t][0].dtype, grads[t][0].size(1), math.gcd(aligned, *map(alignment, grads[t])))
        tiles.setdefault(tile, []).append(table)
    return tiles


def _new_gradients(call: Call, rows: Sequence[int]) -> list[Tensor]:
    """Of each table so many rows of a gradient, empty where it gets none."""
    of_table = {t: g for t, g in zip(call.features.tables, call.outs) if g is not None}
    some = next(iter(of_table.values()))
    return [
        of_table[t].new_empty((n, of_table[t].size(1))) if t in of_table else some.new_empty(0)
        for t, n in enumerate(rows)
    ]


def embedding_bag_backward(
    grad_outs: Sequence[Tensor | None], weights: Sequence[Tensor], rows: Sequence[int], features: Features
) -> tuple[list[Tensor], list[Tensor]]:
    """The dense gradients of the tables, empty without one, and those of the per-sample weights."""
    call = _backward_call(grad_outs, weights, rows, features)
    with torch.cuda.device_of(features.indices[0]):
        grads = _new_gradients(call, rows)
        torch._foreach_zero_(grads)
        if call.lookups:
            found, T = sources(call, list(map(_alignment.address, grads))), len(rows)
            tiles = _tables(call, found, lambda t: (alignment(grads[t]), Table(call.first_key[t], rows[t], t)))
            add_up(found, tiles, T, KIND_DENSE.value, found.others)
        return grads, factor_gradients(call)


def embedding_bag_backward_sparse(
    grad_outs: Sequence[Tensor | None], weights: Sequence[Tensor], rows: Sequence[int], features: Features
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tables' rows that were looked up, ascending, their gradients, and those of the per-sample weights."""
    call, T = _backward_call(grad_outs, weights, rows, features), len(rows)
    with torch.cuda.device_of(features.indices[0]):
        ends = [0] * T  # how many distinct rows there are up to the end of a table
        if call.lookups:
            found = sources(call, ())
            starts = torch.ones_like(found.keys, dtype=torch.bool)
            torch.ne(found.keys[1:], found.keys[:-1], out=starts[1:])
            ranks = starts.logical_and_(found.keys < found.skipped).cumsum(0)
            last = described(tuple(k + r for k, r in zip(call.first_key, rows)), call.device).to(found.keys.dtype)
            before = torch.searchsorted(found.keys, last)
            ends = torch.cat([ranks.new_zeros(1), ranks])[before].tolist()
        begins = [0, *ends[:-1]]
        counts = [end - begin for begin, end in zip(begins, ends)]
        grad_rows = [torch.empty(n, dtype=torch.int64, device=call.device) for n in counts]
        values = _new_gradients(call, counts)
        if call.lookups:
            tiles = _tables(call, found, lambda t: (alignment(values[t]), Table(call.first_key[t], rows[t], t)))
            numbers = on_device(
                [*map(_alignment.address, values), *map(_alignment.address, grad_rows), *begins], call.device
            )
            add_up(found, tiles, T, KIND_SPARSE.value, numbers, ranks)
        return grad_rows, values, factor_gradients(call)


def embedding_bag_update(
    grad_outs: Sequence[Tensor | None], weights: Sequence[Tensor], states: Sequence[Tensor], features: Features,
    optimizer: int, hyper: Sequence[float], bring: Bring = on_device, behind: Tables | None = None,
) -> list[Tensor]:  # fmt: skip
    """An optimizer's step on the rows that were looked up. -> the gradients of the per-sample weights. ``bring`` is
    called before anything reads the gradients of lookups without per-sample weights and maxima. Rows of tables that are
    ``behind`` catch up first."""
    stepped = sorted(features.tables_of(grad_outs))
    update = Step(weights, states, optimizer, hyper, stepped)
    call = _backward_call(grad_outs, weights, [w.size(0) for w in weights], features)
    with torch.cuda.device_of(weights[0]):
        factor_grads = factor_gradients(call)
        of_step, clocks = update.as_numbers(), [] if behind is None else behind.as_numbers()
        found = sources(call, [*of_step, *clocks], bring) if call.lookups else None
        given = update.settings(found.others if found else on_device(of_step, call.device))
        if found is not None:
            if behind is not None:
                behind.catch_up(stepped, found.others[len(of_step) :], found.keys, call.first_key, steps_now=True)
            tiles = _tables(call, found, lambda t: (update.alignment(t), update.table(t, call.first_key[t])))
            add_up(found, tiles, len(weights), update.kind, given, clips=update.clips, rounds=update.rounds)
        return factor_grads
