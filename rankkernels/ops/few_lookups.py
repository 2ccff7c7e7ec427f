"""Lookups of a feature or two by torch's own embedding, where a call of ours costs more than it saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels.ops import _exact_table
from rankkernels.ops._features import MODES, Features
from rankkernels.ops._fused_step import Optimizer
from rankkernels.ops._tracing import is_traced
from rankkernels.ops.embedding_bag import run_op

_NONE = MODES.index("none")
#: Up to so many features, with a backward and without, and ids of all of them together, torch's calls are the faster
#: ones: docs/performance/embedding.md.
MOST_RECORDED, MOST_UNRECORDED, MOST_IDS = 1, 2, 4096
#: Of which torch sums a row's gradient in the precision that the kernel does.
_DTYPES = torch.float32, torch.float64


def is_faster(weights: Sequence[Tensor], features: Features) -> bool:
    """Whether the op is faster than torch's lookup of one feature after the other. Under a compiler no size is read,
    which would specialize the graph on it."""
    most = MOST_RECORDED if torch.is_grad_enabled() else MOST_UNRECORDED
    if len(features.indices) > most or any([mode != _NONE for mode in features.modes]) or is_traced():
        return True
    if sum([ids.numel() for ids in features.indices]) > MOST_IDS:
        return True
    # torch looks ids without memory (meta) up in a table on the CPU, and gives what is there by chance.
    tables = all([w.is_cpu and w.dtype in _DTYPES for w in weights])
    return not (tables and all([ids.is_cpu for ids in features.indices]))


def run_lookups(
    weights: Sequence[Tensor], features: Features, names: str, concat: bool = False, optimizer: Optimizer | None = None
) -> list[Tensor]:
    """``embedding_bag.run_op`` of plain tables, by torch where that is faster."""
    exact = _exact_table.in_use and _exact_table.any_exact(weights)
    if optimizer is None and not exact and not is_faster(weights, features):
        frozen = features.frozen_rows
        try:
            found = [torch.embedding(weights[t], i, frozen[t]) for i, t in zip(features.indices, features.tables)]
        except IndexError:
            pass  # the op's error names the feature
        else:
            return [torch.cat(found, 1)] if concat and len(found) > 1 else found
    return run_op(weights, features, names, concat=concat, optimizer=optimizer)
