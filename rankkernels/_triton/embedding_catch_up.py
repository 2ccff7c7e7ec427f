"""Exact Adam's lookups, steps and idle steps in Triton: what the ops call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels._triton.embedding_bag import bag_results, embedding_bag_update
from rankkernels._triton.embedding_bag_features import Call, matrix_of
from rankkernels._triton.embedding_bag_numbers import numbers as on_device
from rankkernels._triton.embedding_bag_sources import sources
from rankkernels._triton.embedding_catch_up_history import adam_history
from rankkernels._triton.embedding_catch_up_lookup import lookup
from rankkernels._triton.embedding_catch_up_rows import Tables, mark_steps
from rankkernels.ops._features import MODES, Features
from rankkernels.ops._rules import OPTIMIZERS

__all__ = [
    "adam_history",
    "embedding_bag_exact",
    "embedding_bag_exact_update",
    "embedding_catch_up",
    "embedding_catch_up_all",
    "embedding_mark_steps",
]


def _one_by_one(features: Features, all_rows: bool) -> Features:
    """Each lookup on its own; with ``all_rows`` padding and frozen rows are rows like any other."""
    indices = [ids if ids.dim() else ids[None] for ids in features.indices]  # a lookup of one row may have no dimension
    modes = [MODES.index("none")] * len(indices)
    for f, padding in enumerate(features.padding_idx):
        if not all_rows and padding >= 0 and features.mode(f) != "none":  # a bag of one, which leaves padding out
            indices[f], modes[f] = indices[f].reshape(-1, 1), MODES.index("sum")
    frozen_rows = [-1] * len(features.frozen_rows) if all_rows else features.frozen_rows
    return features._replace(
        indices=indices, offsets=[], per_sample_weights=[], modes=modes, frozen_rows=frozen_rows
    )  # fmt: skip


def embedding_catch_up(*arguments: Sequence, features: Features) -> None:
    """Brings the rows up to date that are looked up: the distinct ones among their sorted keys."""
    tables, each = Tables(*arguments), _one_by_one(features, all_rows=True)
    call = Call(each, each.indices, (), tables.rows)
    if call.lookups:
        with torch.cuda.device_of(each.indices[0]):
            found = sources(call, tables.as_numbers())
            tables.catch_up(sorted(set(each.tables)), found.others, found.keys, call.first_key)


def embedding_catch_up_all(*arguments: Sequence) -> None:
    """Brings every row up to date."""
    tables = Tables(*arguments)
    if tables.rows:
        device = tables.weights[0].device
        with torch.cuda.device_of(tables.weights[0]):
            tables.catch_up(range(len(tables.rows)), on_device(tables.as_numbers(), device))


def embedding_mark_steps(last_steps: Sequence[Tensor], features: Features, steps: Sequence[int]) -> None:
    """Rows that get a gradient are as of their table's step."""
    each, rows = _one_by_one(features, all_rows=False), [last.size(0) for last in last_steps]
    call = Call(each, each.indices, last_steps, rows)
    if call.lookups:
        with torch.cuda.device_of(each.indices[0]):
            mark_steps(call, [steps[t] for t in each.tables])


def embedding_bag_exact(*arguments: Sequence, features: Features, concat: bool) -> list[Tensor]:
    """The results of all features, or with ``concat`` the one of all, of rows as of the last step."""
    tables = Tables(*arguments)
    outs, parts = bag_results(tables.weights, features, concat)
    with torch.cuda.device_of(outs[0]):
        lookup(Call(features, list(map(matrix_of, parts)), tables.weights, tables.rows), tables)
    return outs


def embedding_bag_exact_update(
    grad_outs: Sequence[Tensor | None], *arguments: Sequence, features: Features, hyper: Sequence[float]
) -> list[Tensor]:
    """AdamW's step on the rows that were looked up, after the steps that they missed."""
    tables = Tables(*arguments)
    adamw = OPTIMIZERS.index("adamw")
    return embedding_bag_update(grad_outs, tables.weights, tables.states, features, adamw, hyper, behind=tables)
