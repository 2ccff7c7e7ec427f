"""Lookups of a feature or two by the tables' own calls, where a call of ours costs more than it saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankkernels.ops import _exact_table
from rankkernels.ops._tracing import is_traced

#: Up to so many features, of this width where there are several, and ids of all of them together, with a backward and
#: without, torch's calls are the faster ones: docs/performance/embedding.md.
MOST_FEATURES, MOST_WIDTH, MOST_RECORDED, MOST_UNRECORDED = 3, 32, 2048, 3072
#: Of which torch sums a row's gradient in the precision that the kernel does.
_DTYPES = torch.float32, torch.float64


def are_faster(tables: Sequence[nn.Module], ids: Sequence[Tensor]) -> bool:
    """Whether ``tables`` called in turn are faster than the op, for up to ``MOST_FEATURES`` lookups of each id on its
    own. Under a compiler no size is read, which would specialize the graph on it."""
    if is_traced() or (_exact_table.in_use and _exact_table.any_exact([t.weight for t in tables])):
        return False
    recorded, first = torch.is_grad_enabled(), ids[0]
    if len(ids) * first.numel() > (MOST_RECORDED if recorded else MOST_UNRECORDED):
        return False
    if recorded and any([t.weight.dtype not in _DTYPES for t in tables]):
        return False
    # torch looks ids without memory (meta) up in a table on the CPU, and gives what is there by chance.
    return all([i.is_cpu and i.shape == first.shape for i in ids])


def call(tables: Sequence[nn.Module], ids: Sequence[Tensor]) -> list[Tensor] | None:
    """``table(i)`` of each; None where one of them raises, since the op's error names the feature."""
    try:
        return [table(i) for table, i in zip(tables, ids)]
    except (IndexError, RuntimeError):
        return None
