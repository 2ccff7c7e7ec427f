"""The whole of DeepFM but its sigmoid, in eval: kernels in csrc/cpu/deepfm.h.

Each block of samples is looked up, interacts and goes through the MLP while it is in the second-level cache. There is
no backward, and no kernel but the CPU's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels.ops._library import differentiable, lib
from rankkernels.ops.embedding_bag import MODES, raise_index_errors

# One id a sample: ``indices`` are [B]. ``dense`` [B, n] stand behind the embeddings; ``mlp`` are the weight and the
# bias of each layer, the last of one unit, with relu between two.
lib.define(
    "deepfm(Tensor[] weights, Tensor[] indices, int[] tables, str[] names, Tensor linear_weight, Tensor? dense, "
    "Tensor[] mlp) -> Tensor"
)


@torch.library.register_fake("rankkernels::deepfm", lib=lib)
def _(weights, indices, tables, names, linear_weight, dense, mlp):
    return weights[0].new_empty((indices[0].size(0), 1))


@torch.library.impl(lib, "deepfm", "CompositeExplicitAutograd")
def in_parts(weights, indices, tables, names, linear_weight, dense, mlp):
    n = len(indices)
    features = [], [], tables, [MODES.index("none")] * n, [-1] * n, [-1] * len(weights), names
    x, fm, linear = torch.ops.rankkernels.embedding_fm.default(weights, indices, *features, linear_weight, dense)
    for i in range(0, len(mlp), 2):
        x = F.linear(x.relu() if i else x, mlp[i], mlp[i + 1])
    return fm + linear + x


_deepfm = differentiable(torch.ops.rankkernels.deepfm.default, in_parts)


def call(*arguments) -> Tensor:
    """fm + linear + mlp, [B, 1]: what ``embedding_fm`` and an MLP of relu layers make of the schema's arguments."""
    with raise_index_errors():
        return _deepfm(*arguments)
