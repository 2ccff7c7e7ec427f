"""The lookup of one feature by torch's own embedding, where a call of ours costs more than it saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels.ops import _exact_table
from rankkernels.ops._features import MODES, Features
from rankkernels.ops._fused_step import Optimizer
from rankkernels.ops._tracing import is_traced
from rankkernels.ops.embedding_bag import run_op

_NONE = MODES.index("none")
#: Ids of one feature up to which torch's call is the faster one: docs/performance/embedding.md.
MOST_IDS = 4096
#: Of which torch sums a row's gradient in the precision that the kernel does.
_DTYPES = torch.float32, torch.float64


def is_faster(weights: Sequence[Tensor], features: Features) -> bool:
    """Whether the op is the faster way, forward and backward. Under a compiler no size is read, which would specialize
    the graph on it."""
    if len(features.indices) > 1 or features.modes[0] != _NONE or is_traced():
        return True
    weight = weights[features.tables[0]]
    return features.indices[0].numel() > MOST_IDS or not weight.is_cpu or weight.dtype not in _DTYPES


def run_lookups(
    weights: Sequence[Tensor], features: Features, names: str, concat: bool = False, optimizer: Optimizer | None = None
) -> list[Tensor]:
    """``embedding_bag.run_op`` of tables that nobody parametrized, by torch where that is faster."""
    if optimizer is None and not _exact_table.in_use and not is_faster(weights, features):
        table, (ids,) = features.tables[0], features.indices
        frozen = features.frozen_rows[table]
        try:
            return [F.embedding(ids, weights[table], None if frozen < 0 else frozen)]
        except IndexError:
            pass  # the op's error names the feature
    return run_op(weights, features, names, concat=concat, optimizer=optimizer)
