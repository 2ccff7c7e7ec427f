"""The gradients of lookup + FM + linear term. Kernels: csrc/cpu/embedding/fm_kernel.h, csrc/cuda/embedding/fm.cuh
and _triton/embedding_fm.py.

The gradients of the embeddings, of the FM and of the linear term become that of the lookups in one pass, and from there
go the way of every lookup: one dense or coalesced sparse gradient a table, or an optimizer's step. On the CPU the last
two add the FM's and the linear term's part where a row's gradient is summed, if every embedding is a row of a table of
its own feature's: the gradient of the lookups, as large as the embeddings, is then never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._autograd import differentiable
from rankkernels.ops._checks import FLOATING
from rankkernels.ops._embedding_checks import check_features
from rankkernels.ops._features import Features
from rankkernels.ops._library import define, lib, triton_embeds, triton_serves, triton_serves_tables, without_autocast
from rankkernels.ops._schema import parsed, schema_of
from rankkernels.ops.embedding_bag_update import check_apart, check_update
from rankkernels.ops.fm_interaction import fm_interaction_backward


class Arguments(NamedTuple):
    """The gradients of the results, what the forward returned and was given, and the width of an embedding."""

    grad_embeddings: Tensor | None
    grad_fm: Tensor | None
    grad_linear: Tensor | None
    embeddings: Tensor
    linear_weight: Tensor | None
    dim: int

    @property
    def of_results(self) -> tuple[Tensor | None, ...]:
        return self.grad_embeddings, self.grad_fm, self.grad_linear


# The gradient of the lookups, [B, F * dim], and of the linear weights ([0] without any).
define(
    f"embedding_fm_backward({schema_of(Arguments).replace('int dim', 'SymInt dim')}) "
    "-> (Tensor grad_lookups, Tensor grad_linear_weight)"
)
# The same followed by embedding_bag_backward_sparse, and by embedding_bag_update. ``unchanged``: ``weights`` hold what
# was looked up.
define(
    f"embedding_fm_backward_sparse({schema_of(Arguments)}, Tensor[] weights, bool unchanged, int[] rows, "
    f"{schema_of(Features)}) -> (Tensor[] grad_rows, Tensor[] grad_values, Tensor[] grad_per_sample_weights, "
    "Tensor grad_linear_weight)"
)
define(
    f"embedding_fm_update({schema_of(Arguments)}, Tensor(a!)[] weights, bool unchanged, Tensor(b!)[] states, "
    f"{schema_of(Features)}, int optimizer, float[] hyper) "
    "-> (Tensor[] grad_per_sample_weights, Tensor grad_linear_weight)"
)


class _SparseArguments(NamedTuple):
    """What embedding_fm_backward_sparse takes between ``Arguments`` and ``Features``."""

    weights: list[Tensor]
    unchanged: bool
    rows: list[int]


class _UpdateArguments(NamedTuple):
    """What embedding_fm_update takes between ``Arguments`` and ``Features``."""

    weights: list[Tensor]
    unchanged: bool
    states: list[Tensor]


class _StepArguments(NamedTuple):
    """What embedding_fm_update takes behind ``Features``."""

    optimizer: int
    hyper: list[float]


def check_linear_weight(op, linear_weight, like, width) -> None:
    torch._check(
        linear_weight.numel() == width
        and linear_weight.dtype == like.dtype
        and linear_weight.device == like.device
        and linear_weight.layout == torch.strided,
        lambda: (
            f"{op}: linear_weight must have one value a column of the embeddings, {width}, and their dtype and device, "
            f"{like.dtype} on {like.device}, got shape {list(linear_weight.shape)} and {linear_weight.dtype} on "
            f"{linear_weight.device}"
        ),
    )


def _check(arguments: Arguments, features: int | None = None) -> None:
    """The texts are those of csrc/embedding/fm.h; ``features``: how many, where that is known."""
    op, check = "embedding_fm_backward", torch._check
    grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim = arguments
    check(
        embeddings.dim() == 2,
        lambda: f"{op}: embeddings must have 2 dimensions, got {embeddings.dim()} (shape {list(embeddings.shape)})",
    )
    check(
        embeddings.dtype in FLOATING,
        lambda: f"{op}: embeddings must be float32, float64, float16 or bfloat16, got {embeddings.dtype}",
    )
    check(
        embeddings.layout == torch.strided,
        lambda: f"{op}: embeddings must be a strided tensor, got {embeddings.layout}",
    )
    B, width = embeddings.shape
    check(
        features is None or (dim >= 0 and features * dim == width),
        lambda: (
            f"{op}: embeddings must be [B, F * dim] of {features} features with dim = {dim}, got shape "
            f"{list(embeddings.shape)}"
        ),
    )
    check(
        dim >= 0 and (width % dim == 0 if dim else width == 0),
        lambda: f"{op}: embeddings must have a multiple of dim = {dim} columns, got {width}",
    )
    if linear_weight is not None:
        check_linear_weight(op, linear_weight, embeddings, width)
    for what, t, columns in (
        ("grad_embeddings", grad_embeddings, width), ("grad_fm", grad_fm, 1), ("grad_linear", grad_linear, 1)
    ):  # fmt: skip
        check(
            t is None
            or (what == "grad_linear" and linear_weight is None)
            or (
                t.shape == (B, columns)
                and t.dtype == embeddings.dtype
                and t.device == embeddings.device
                and t.layout == torch.strided
            ),
            lambda: (
                f"{op}: {what} must be [{B}, {columns}] like the embeddings, {embeddings.dtype} on "
                f"{embeddings.device}, got shape {list(t.shape)} and {t.dtype} on {t.device}"
            ),
        )


def _check_with_features(arguments: Arguments, num_tables: int, features: Features) -> None:
    names = [f"indices[{f}]" for f in range(len(features.indices))]
    check_features(num_tables, arguments.embeddings.device, features, names)
    _check(arguments, len(names))


@torch.library.register_fake("rankkernels::embedding_fm_backward", lib=lib)
def _(*arguments):
    a = Arguments(*arguments)
    _check(a)
    return a.embeddings.new_empty(a.embeddings.shape), _new_grad_linear_weight(a)


def _new_grad_linear_weight(a: Arguments) -> Tensor:
    return a.embeddings.new_empty(0) if a.linear_weight is None else a.linear_weight.new_empty(a.linear_weight.shape)


# Where no kernel does both, the separate ops do, each by the best that serves the device.
@torch.library.impl(lib, "embedding_fm_backward", "CompositeExplicitAutograd")
def _default(*arguments):
    a = Arguments(*arguments)
    _check(a)
    if a.grad_fm is not None and a.embeddings.numel():
        fields = a.embeddings.reshape(a.embeddings.size(0), -1, a.dim)
        grad = fm_interaction_backward(a.grad_fm, fields, True).reshape(a.embeddings.shape)
        grad = grad if a.grad_embeddings is None else grad + a.grad_embeddings
    elif a.grad_embeddings is not None:
        grad = a.grad_embeddings.clone(memory_format=torch.contiguous_format)
    else:
        grad = torch.zeros_like(a.embeddings, memory_format=torch.contiguous_format)
    if a.linear_weight is not None and a.grad_linear is not None:
        grad = torch.addcmul(grad, a.grad_linear, a.linear_weight.reshape(1, -1))
    return grad, _grad_linear_weight(a)


def _grad_linear_weight(a: Arguments) -> Tensor:
    if a.linear_weight is None:
        return a.embeddings.new_empty(0)
    if a.grad_linear is None:
        return torch.zeros_like(a.linear_weight, memory_format=torch.contiguous_format)
    grad = a.grad_linear.t() @ a.embeddings
    return grad if grad.shape == a.linear_weight.shape else grad.view(a.linear_weight.shape)


if triton_embeds:

    @torch.library.impl(lib, "embedding_fm_backward", "CUDA")
    def _(*arguments):
        from rankkernels._triton import embedding_fm as kernels

        a = Arguments(*arguments)
        _check(a)
        if not (triton_serves(a.embeddings) and kernels.supports_gradients(a.embeddings, a.dim)):
            return _default(*arguments)
        grad = a.embeddings.new_empty(a.embeddings.shape)
        kernels.lookup_gradients(a.of_results, a.embeddings, a.linear_weight, grad.view(grad.size(0), -1, a.dim))
        return grad, _grad_linear_weight(a)

    @torch.library.impl(lib, "embedding_fm_update", "CUDA")
    def _(*arguments):
        from rankkernels._triton import embedding_fm as kernels

        a, (weights, _unchanged, states), features, step = parsed(
            arguments, Arguments, _UpdateArguments, Features, _StepArguments
        )
        _check_with_features(a, len(weights), features)
        if not (triton_serves_tables(weights) and kernels.supports(weights, features)):
            return update_apart(*arguments)
        like = [a.embeddings[:, : a.dim]] * len(features.indices)
        check_update(like, weights, states, *features, *step)
        check_apart(weights)
        kernels.embedding_fm_update(a.of_results, a.embeddings, a.linear_weight, weights, states, features, *step)
        return [], _grad_linear_weight(a)


without_autocast(torch.ops.rankkernels.embedding_fm_backward.default)


def _of_lookups(a: Arguments, features: Features) -> tuple[list[Tensor], Tensor]:
    """The gradients of each feature's lookups, and of the linear weights."""
    grad, grad_linear_weight = torch.ops.rankkernels.embedding_fm_backward.default(*a)
    return list(grad.split_with_sizes([a.dim] * len(features.indices), 1)), grad_linear_weight


# The ops in turn are the fakes, too.
@torch.library.register_fake("rankkernels::embedding_fm_backward_sparse", lib=lib)
@torch.library.impl(lib, "embedding_fm_backward_sparse", "CompositeExplicitAutograd")
def backward_sparse_apart(*arguments):
    a, (weights, _unchanged, rows), features = parsed(arguments, Arguments, _SparseArguments, Features)
    _check_with_features(a, len(rows), features)
    grad_outs, grad_linear_weight = _of_lookups(a, features)
    rest = torch.ops.rankkernels.embedding_bag_backward_sparse.default(grad_outs, weights, rows, *features)
    return *rest, grad_linear_weight


@torch.library.register_fake("rankkernels::embedding_fm_update", lib=lib)
@torch.library.impl(lib, "embedding_fm_update", "CompositeExplicitAutograd")
def update_apart(*arguments):
    a, (weights, _unchanged, states), features, step = parsed(
        arguments, Arguments, _UpdateArguments, Features, _StepArguments
    )
    _check_with_features(a, len(weights), features)
    grad_outs, grad_linear_weight = _of_lookups(a, features)
    grad_psw = torch.ops.rankkernels.embedding_bag_update.default(grad_outs, weights, states, *features, *step)
    return grad_psw, grad_linear_weight


embedding_fm_backward = differentiable(torch.ops.rankkernels.embedding_fm_backward.default, _default)


class FmGradients(NamedTuple):
    """The gradients of ``embedding_fm``'s results: see ``_fused_step.Gradients``."""

    arguments: Arguments
    unchanged: bool  # whether the tables hold what was looked up

    def lookups(self, features: Features) -> list[int]:
        return list(range(len(features.indices)))

    def update(self, weights: Sequence[Tensor]) -> tuple[torch._ops.OpOverload, tuple]:
        return torch.ops.rankkernels.embedding_fm_update.default, (*self.arguments, weights, self.unchanged)

    def of_inputs(self, returned: tuple) -> tuple:
        return returned

    def of_lookups(self, features: Features) -> tuple:
        return _of_lookups(self.arguments, features)


def without_dense(
    grads: Sequence[Tensor | None], embeddings: Tensor, width: int
) -> tuple[Sequence[Tensor | None], Tensor, Tensor | None]:
    """The gradients and the embeddings without the dense columns, and the gradient of these."""
    if embeddings.size(1) == width:
        return grads, embeddings, None
    grad, *rest = grads
    if grad is None:
        return grads, embeddings[:, :width], None
    return (grad[:, :width], *rest), embeddings[:, :width], grad[:, width:]
