"""The norm of a sparse tensor, so that ``torch.nn.utils.clip_grad_norm_`` takes the gradients of ``sparse=True``.

torch scales sparse gradients and adds them up, but has no ``linalg.vector_norm`` of them. It is given one here, where
it has none of its own: of the values, coalesced, because what is not stored is zero and adds nothing to a norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OP = "aten::linalg_vector_norm"


def _vector_norm(
    self: Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is not None or keepdim or ord < 0:
        raise NotImplementedError("linalg.vector_norm of a sparse tensor: only of all of it, and of an order from 0")
    values = self.coalesce()._values()
    if values.numel() == 0:
        return torch.linalg.vector_norm(values.new_zeros(1), ord, dtype=dtype)
    return torch.linalg.vector_norm(values, ord, dtype=dtype)


lib = torch.library.Library("aten", "IMPL")
for key in ("SparseCPU", "SparseCUDA"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OP, key):
        lib.impl(OP, _vector_norm, key)
