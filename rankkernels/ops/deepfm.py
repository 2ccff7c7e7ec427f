"""The whole of DeepFM but its sigmoid, in eval: csrc/cpu/deepfm.

Each block of samples is looked up and goes through the FM and the MLP while it is in L2. There is no backward, and no
kernel but the CPU's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels.ops import _exact_table
from rankkernels.ops._autograd import differentiable
from rankkernels.ops._checks import check_strided, raise_documented
from rankkernels.ops._embedding_checks import check_forward
from rankkernels.ops._features import MODES, Features, LookupBatch, names_of
from rankkernels.ops._library import define, lib
from rankkernels.ops._table import OPS
from rankkernels.ops._tracing import must_stay_transparent
from rankkernels.ops.linear import MIN_MULTIPLY_ADDS

# One id a sample: ``indices`` are [B]. ``dense`` [B, n] are appended to the embeddings; ``mlp`` holds the weight and
# the bias of each layer, the last with one unit, with relu between layers.
define(
    "deepfm(Tensor[] weights, Tensor[] indices, int[] tables, str names, Tensor linear_weight, Tensor? dense, "
    "Tensor[] mlp) -> Tensor"
)


def _features(weights: list[Tensor], indices: list[Tensor], tables: list[int]) -> Features:
    n = len(indices)
    return Features(indices, [], [], tables, [MODES.index("none")] * n, [-1] * n, [-1] * len(weights))


def _check(weights, indices, tables, names, linear_weight, dense, mlp):
    """Ranks, sizes, dtypes and devices; the texts are those of csrc/cpu/deepfm/deepfm.cpp."""
    check = torch._check
    check_forward(weights, _features(weights, indices, tables), names, False)
    names = names_of(names, len(indices))
    device, D, B = weights[0].device, weights[tables[0]].size(1), indices[0].numel()

    def fits(t: Tensor) -> bool:
        return t.dtype == torch.float32 and t.device == device

    for t, w in enumerate(weights):
        check(
            w.size(1) == D and fits(w),
            lambda: f"deepfm: weights[{t}] must be [R, {D}] torch.float32, got shape {list(w.shape)} and {w.dtype}",
        )
    for f, ids in enumerate(indices):
        check(
            ids.dim() == 1 and ids.size(0) == B,
            lambda: f"deepfm: {names[f]} must be [{B}], got shape {list(ids.shape)}",
        )
    width = len(indices) * D
    check(
        linear_weight.numel() == width and fits(linear_weight),
        lambda: (
            f"deepfm: linear_weight must have one value a column of the embeddings, {width}, and their dtype and "
            f"device, torch.float32 on {device}, got shape {list(linear_weight.shape)} and {linear_weight.dtype} on "
            f"{linear_weight.device}"
        ),
    )
    if dense is not None:
        check(
            dense.dim() == 2 and dense.size(0) == B and fits(dense),
            lambda: (
                f"deepfm: dense must be [B, n] with B = {B} like the embeddings, torch.float32 on {device}, got "
                f"shape {list(dense.shape)} and {dense.dtype} on {dense.device}"
            ),
        )
        width = width + dense.size(1)
    check(
        len(mlp) >= 4 and len(mlp) % 2 == 0,
        lambda: f"deepfm: mlp must be the weight and the bias of each of two layers or more, got {len(mlp)} tensors",
    )
    for i in range(0, len(mlp), 2):
        w, b = mlp[i : i + 2]
        out = "H" if i + 2 < len(mlp) else 1
        check(
            w.dim() == 2 and w.size(1) == width and b.dim() == 1 and b.size(0) == w.size(0)
            and (out == "H" or w.size(0) == 1),
            lambda: (
                f"deepfm: mlp's layer {i // 2} must have a weight [{out}, {width}] and its bias, got shapes "
                f"{list(w.shape)} and {list(b.shape)}"
            ),
        )  # fmt: skip
        for t in (w, b):
            check(fits(t), lambda: f"deepfm: mlp's layer {i // 2} must be torch.float32, got {t.dtype} on {t.device}")
        width = w.size(0)


@torch.library.register_fake("rankkernels::deepfm", lib=lib)
def _(weights, indices, tables, names, linear_weight, dense, mlp):
    _check(weights, indices, tables, names, linear_weight, dense, mlp)
    return weights[0].new_empty((indices[0].size(0), 1))


@torch.library.impl(lib, "deepfm", "CompositeExplicitAutograd")
def _in_parts(weights, indices, tables, names, linear_weight, dense, mlp):
    check_strided("deepfm", (*weights, *indices, linear_weight, dense, *mlp))
    _check(weights, indices, tables, names, linear_weight, dense, mlp)
    features = _features(weights, indices, tables)
    x, fm, linear = torch.ops.rankkernels.embedding_fm.default(weights, *features, names, linear_weight, dense)
    for i in range(0, len(mlp), 2):
        x = F.linear(x.relu() if i else x, mlp[i], mlp[i + 1])
    return fm + linear + x


_deepfm = differentiable(torch.ops.rankkernels.deepfm.default, _in_parts)


def run_op(
    weights: Sequence[Tensor], indices: Sequence[Tensor], tables: Sequence[int], names: str, linear_weight: Tensor,
    dense: Tensor | None, mlp: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """fm + linear + mlp, [B, 1]: what ``embedding_fm`` and an MLP of relu layers make of the schema's arguments."""
    with raise_documented():
        return _deepfm(weights, indices, tables, names, linear_weight, dense, mlp)


@functools.cache
def _has_kernel() -> bool:
    return OPS["deepfm"].kernel("cpu") is not None


def has_kernel_for(batch: LookupBatch) -> bool:
    """Whether one pass may be the faster way to evaluate a batch: with the kernel, without a backward, and with one id
    a sample and feature."""
    if must_stay_transparent() or torch.is_grad_enabled() or not _has_kernel():
        return False
    return not any(batch.features.modes) and not batch.features.known


def is_faster(batch: LookupBatch, first_weight: Tensor) -> bool:
    """Whether, where ``has_kernel_for``, there is so much to multiply that packing the MLP's weights pays. The first of
    these is [H, in]."""
    ids, *_ = batch.features.indices
    return ids.numel() * first_weight.numel() >= MIN_MULTIPLY_ADDS


def is_served(batch: LookupBatch, linear_weight: Tensor, mlp: Iterable[Tensor]) -> bool:
    """Whether the op takes these tensors, where ``has_kernel_for`` the batch."""
    tensors = chain(batch.weights, batch.dense, (linear_weight,), mlp)
    with _exact_table.as_plain():
        return all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)


def run_batch(batch: LookupBatch, linear_weight: Tensor, mlp: Sequence[Tensor]) -> Tensor:
    """The op on a batch."""
    features, columns = batch.features, batch.dense_columns()
    arguments = batch.weights, features.indices, features.tables, batch.names, linear_weight, columns, mlp
    if _exact_table.in_use and _exact_table.any_exact(batch.weights):
        return _exact_table.read(functools.partial(run_op, *arguments), batch.weights, features, batch.names)
    return run_op(*arguments)
