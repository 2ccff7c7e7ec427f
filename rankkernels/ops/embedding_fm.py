"""Lookup, FM and linear term in one pass over the tables. Kernels: csrc/cpu/embedding_fm.h, csrc/cuda/embedding_fm.cuh.

The forward looks the features of a few samples up and combines them while they are in the cache. The backward turns the
gradients of the embeddings, of the FM and of the linear term into that of the lookups, in one pass, and from there goes
the way of every lookup: one dense or coalesced sparse gradient a table, or an optimizer's step. On the CPU the last two
add the FM's and the linear term's part where a row's gradient is summed, if every embedding is a row of a table of its
own feature's: the gradient of the lookups, as large as the embeddings, is then never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels.ops._library import (
    FLOATING,
    check_first_derivative,
    differentiable,
    lib,
    raise_documented,
    register_autograd,
)
from rankkernels.ops.embedding_bag import (
    FEATURES,
    Optimizer,
    distinct,
    in_schema,
    needs_values,
    no_backward,
    outside_graph,
    sparse_gradients,
    table_gradients,
)
from rankkernels.ops.embedding_bag_checks import check_features, names_of
from rankkernels.ops.fm_interaction import fm_interaction_backward

# ``embeddings`` [B, F * D + n] are the lookups side by side, as of embedding_bag with concat, and then the columns of
# ``dense`` [B, n], if any; ``fm`` is [B, 1], ``linear`` too, but [0, 1] where there is no ``linear_weight`` (any shape
# of F * D values).
lib.define(
    f"embedding_fm(Tensor[] weights, {FEATURES}, str names, Tensor? linear_weight, Tensor? dense, *, "
    "bool sparse=False) -> (Tensor embeddings, Tensor fm, Tensor linear)"
)
# The gradient of the lookups, [B, F * D], and of the linear weights ([0] without any).
lib.define(
    "embedding_fm_backward(Tensor? grad_embeddings, Tensor? grad_fm, Tensor? grad_linear, Tensor embeddings, "
    "Tensor? linear_weight, SymInt dim) -> (Tensor grad_lookups, Tensor grad_linear_weight)"
)
# The same followed by embedding_bag_backward_sparse, and by embedding_bag_update. ``unchanged``: ``weights`` hold what
# was looked up.
_GRADS = (
    "Tensor? grad_embeddings, Tensor? grad_fm, Tensor? grad_linear, Tensor embeddings, Tensor? linear_weight, int dim"
)
lib.define(
    f"embedding_fm_backward_sparse({_GRADS}, Tensor[] weights, bool unchanged, int[] rows, {FEATURES}) -> (Tensor[] "
    "grad_rows, Tensor[] grad_values, Tensor[] grad_per_sample_weights, Tensor grad_linear_weight)"
)
lib.define(
    f"embedding_fm_update({_GRADS}, Tensor(a!)[] weights, bool unchanged, Tensor(b!)[] states, {FEATURES}, "
    "int optimizer, float[] hyper) -> (Tensor[] grad_per_sample_weights, Tensor grad_linear_weight)"
)


def _check_linear_weight(op, linear_weight, like, width) -> None:
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


def _check(weights, tables, names, embeddings, linear_weight, dense) -> None:
    """The texts are those of csrc/embedding_fm_arguments.h."""
    D, names = weights[tables[0]].size(1), names_of(names, len(tables))
    for f, t in enumerate(tables):
        torch._check(
            weights[t].size(1) == D,
            lambda: (
                f"embedding_fm: features must have one width, but that of {names[f]} is {weights[t].size(1)} and "
                f"that of {names[0]} {D}"
            ),
        )
    if linear_weight is not None:
        _check_linear_weight("embedding_fm", linear_weight, weights[tables[0]], len(tables) * D)
    if dense is not None:
        torch._check(
            dense.dim() == 2
            and dense.size(0) == embeddings.size(0)
            and dense.dtype == embeddings.dtype
            and dense.device == embeddings.device
            and dense.layout == torch.strided,
            lambda: (
                f"embedding_fm: dense must be [B, n] with B = {embeddings.size(0)} like the embeddings, "
                f"{embeddings.dtype} on {embeddings.device}, got shape {list(dense.shape)} and {dense.dtype} on "
                f"{dense.device}"
            ),
        )


def _lookups(weights, rest) -> Tensor:
    """The embeddings without dense columns; the arguments, checked."""
    *features, names, linear_weight, dense = rest
    (embeddings,) = torch.ops.rankkernels.embedding_bag.default(weights, *features, names, concat=True)
    _check(weights, features[3], names, embeddings, linear_weight, dense)
    return embeddings


def _check_backward(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim, features=None) -> None:
    """The texts are those of csrc/embedding_fm_arguments.h; ``features``: how many, where that is known."""
    op, check = "embedding_fm_backward", torch._check
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
        _check_linear_weight(op, linear_weight, embeddings, width)
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


def _with_dense(embeddings: Tensor, dense: Tensor | None) -> Tensor:
    return embeddings if dense is None else torch.cat([embeddings, dense], 1)


def _check_features_of_backward(num_tables, grads, dim, features) -> None:
    embeddings, names = grads[3], [f"indices[{f}]" for f in range(len(features[0]))]
    check_features(num_tables, embeddings.device, *features, names)
    _check_backward(*grads, dim, len(names))


@torch.library.register_fake("rankkernels::embedding_fm", lib=lib)
def _(weights, *rest, sparse=False):
    embeddings, (linear_weight, dense) = _lookups(weights, rest), rest[-2:]
    B = embeddings.size(0)
    fm, linear = (embeddings.new_empty((n, 1)) for n in (B, 0 if linear_weight is None else B))
    return _with_dense(embeddings, dense), fm, linear


@torch.library.register_fake("rankkernels::embedding_fm_backward", lib=lib)
def _(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim):
    _check_backward(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim)
    grad = embeddings.new_empty(embeddings.shape)
    return grad, embeddings.new_empty(0) if linear_weight is None else linear_weight.new_empty(linear_weight.shape)


# Where no kernel does both, the separate ops do, each by the best that serves the device.
@torch.library.impl(lib, "embedding_fm", "CompositeExplicitAutograd")
def _reference(weights, *rest, sparse=False):
    embeddings, (linear_weight, dense) = _lookups(weights, rest), rest[-2:]
    fields = embeddings.view(embeddings.size(0), len(rest[0]), -1) if embeddings.numel() else None
    fm = (
        embeddings.new_zeros((embeddings.size(0), 1))
        if fields is None
        else torch.ops.rankkernels.fm_interaction.default(fields, True)
    )
    if linear_weight is None:
        linear = embeddings.new_empty((0, 1))
    else:
        linear = F.linear(embeddings, linear_weight.reshape(1, -1))
    return _with_dense(embeddings, dense), fm, linear


@torch.library.impl(lib, "embedding_fm_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim):
    _check_backward(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, dim)
    grad = torch.zeros_like(embeddings, memory_format=torch.contiguous_format)
    grad_linear_weight = embeddings.new_empty(0)
    if grad_fm is not None and embeddings.numel():
        fields = embeddings.reshape(embeddings.size(0), -1, dim)
        grad = fm_interaction_backward(grad_fm, fields, True).reshape(embeddings.shape)
    if grad_embeddings is not None:
        grad = grad + grad_embeddings
    if linear_weight is not None:
        grad_linear_weight = torch.zeros_like(linear_weight, memory_format=torch.contiguous_format)
        if grad_linear is not None:
            grad = torch.addcmul(grad, grad_linear, linear_weight.reshape(1, -1))
            grad_linear_weight = (grad_linear.t() @ embeddings).view(linear_weight.shape)
    return grad, grad_linear_weight


@torch.library.impl(lib, "embedding_fm_backward_sparse", "CompositeExplicitAutograd")
def backward_sparse_apart(*arguments):
    *grads, dim, weights, _unchanged, rows = arguments[:9]
    _check_features_of_backward(len(rows), grads, dim, arguments[9:])
    grad, grad_linear_weight = torch.ops.rankkernels.embedding_fm_backward.default(*grads, dim)
    rest = torch.ops.rankkernels.embedding_bag_backward_sparse.default(
        list(grad.split([dim] * len(arguments[9]), 1)), weights, rows, *arguments[9:]
    )
    return *rest, grad_linear_weight


@torch.library.register_fake("rankkernels::embedding_fm_update", lib=lib)
@torch.library.impl(lib, "embedding_fm_update", "CompositeExplicitAutograd")
def update_apart(*arguments):
    *grads, dim, weights, _unchanged = arguments[:8]
    _check_features_of_backward(len(weights), grads, dim, arguments[9:16])
    grad, grad_linear_weight = torch.ops.rankkernels.embedding_fm_backward.default(*grads, dim)
    grad_psw = torch.ops.rankkernels.embedding_bag_update.default(
        list(grad.split([dim] * len(arguments[9]), 1)), weights, *arguments[8:]
    )
    return grad_psw, grad_linear_weight


_embedding_fm_backward = differentiable(torch.ops.rankkernels.embedding_fm_backward.default, _reference_backward)


def _without_dense(grads, embeddings, width):
    """The gradients and the embeddings without the dense columns, and the gradient of these."""
    if embeddings.size(1) == width:
        return grads, embeddings, None
    grad, *rest = grads
    if grad is None:
        return grads, embeddings[:, :width], None
    return (grad[:, :width], *rest), embeddings[:, :width], grad[:, width:]


def _versions(weights) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights]


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    weights, *lists, tables, modes, padding_idx, frozen_rows, _names, linear_weight, _dense = inputs
    ctx.set_materialize_grads(False)
    ctx.has_linear, ctx.dim, ctx.sparse = linear_weight is not None, weights[0].size(1), keyword_only_inputs["sparse"]
    lists = [weights if needs_values(modes, lists[2]) else [], *lists]
    ctx.features = tables, modes, padding_idx, frozen_rows
    ctx.rows, ctx.lengths = [w.size(0) for w in weights], [len(values) for values in lists]
    if ctx.sparse:  # Not saved: tables that an optimizer's step in between has changed are no error.
        ctx.weights, ctx.versions = weights, _versions(weights)
    ctx.save_for_backward(output[0], *(t for values in lists for t in values), *([linear_weight] * ctx.has_linear))


def _backward(ctx, *grads):
    embeddings, *saved = ctx.saved_tensors
    linear_weight = saved.pop() if ctx.has_linear else None
    it = iter(saved)
    weights, *lists = ([next(it) for _ in range(n)] for n in ctx.lengths)
    if all(g is None for g in grads):
        return [None] * len(ctx.rows), *([None] * len(v) for v in lists), *[None] * 7
    grads, embeddings, grad_dense = _without_dense(grads, embeddings, len(ctx.features[0]) * ctx.dim)
    arguments = *grads, embeddings, linear_weight, ctx.dim
    if ctx.sparse:
        check_first_derivative("embedding_fm with sparse gradients")
        grad_rows, values, grad_psw, grad_linear_weight = torch.ops.rankkernels.embedding_fm_backward_sparse.default(
            *arguments, ctx.weights, ctx.versions == _versions(ctx.weights), ctx.rows, *lists, *ctx.features
        )
        grad_weights = sparse_gradients(set(ctx.features[0]), grad_rows, values, ctx.rows)
    else:
        grad, grad_linear_weight = _embedding_fm_backward(*arguments)
        grad_weights, grad_psw = table_gradients(
            grad.split([ctx.dim] * len(lists[0]), 1), weights, ctx.rows, lists, ctx.features, sparse=False
        )
    return (
        grad_weights, [None] * len(lists[0]), [None] * len(lists[1]), grad_psw, *[None] * 5,
        grad_linear_weight if ctx.has_linear else None, grad_dense,
    )  # fmt: skip


_forward = register_autograd("embedding_fm", _reference, _backward, _setup_context)


class _Updating(torch.autograd.Function):
    """The op with an optimizer's step in its backward; see embedding_bag's."""

    @staticmethod
    def forward(ctx, optimizer, gate, lists, features, names, linear_weight, dense, anchor):
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.rankkernels.embedding_fm.default(*lists, *features, names, linear_weight, dense)
        ctx.optimizer, ctx.gate, ctx.features, (ctx.weights, indices, *_) = optimizer, gate, features, lists
        ctx.has_linear = linear_weight is not None
        values = ctx.weights if needs_values(features[1], []) else []
        ctx.lookups, ctx.versions = len(indices), _versions(ctx.weights)
        ctx.save_for_backward(out[0], *([linear_weight] * ctx.has_linear), *indices, *values)
        gate.lookups.add(ctx)
        return out

    @staticmethod
    def backward(ctx, *grads):
        check_first_derivative("embedding_fm with a fused optimizer")
        embeddings, *saved = ctx.saved_tensors
        linear_weight = saved.pop(0) if ctx.has_linear else None
        if all(g is None for g in grads):
            return [None] * 8
        dim, lists = ctx.weights[0].size(1), [saved[: ctx.lookups], [], []]
        grads, embeddings, grad_dense = _without_dense(grads, embeddings, ctx.lookups * dim)
        arguments, alone = (*grads, embeddings, linear_weight, dim), ctx.gate.alone(ctx)
        if alone and not ctx.optimizer.whole_gradients(ctx.weights, ctx.features[0]):
            unchanged = ctx.versions == _versions(ctx.weights)
            grad_linear_weight = ctx.optimizer.update_fm(arguments, ctx.weights, unchanged, lists, ctx.features)
        else:
            grad, grad_linear_weight = torch.ops.rankkernels.embedding_fm_backward.default(*arguments)
            step = ctx.optimizer.update if alone else ctx.gate.add
            step(list(grad.split([dim] * ctx.lookups, 1)), ctx.weights, lists, ctx.features)
        return *[None] * 5, grad_linear_weight if ctx.has_linear else None, grad_dense, ctx.gate.no_grad


def call(weights, indices, tables, modes, padding_idx, frozen_rows, names, linear_weight=None, dense=None,
         sparse=False, optimizer: Optimizer | None = None):  # fmt: skip
    """The op on arguments in the schema's own form, of features without offsets and per-sample weights."""
    if (sparse or optimizer is not None) and no_backward():
        sparse, optimizer = False, None
    if (sparse or optimizer is not None) and torch.compiler.is_compiling():
        return outside_graph(call, weights, indices, tables, modes, padding_idx, frozen_rows, names, linear_weight,
                             dense, sparse, optimizer)  # fmt: skip
    # What AOTInductor compiles makes None of an empty list.
    absent = [weights[0].new_empty(0)] * len(indices) if torch.compiler.is_exporting() else []
    lists, features = [weights, indices, absent, absent], (tables, modes, padding_idx, frozen_rows)
    with raise_documented():
        if optimizer is not None:
            gate = optimizer.gate(weights)
            weights, tables, frozen_rows = distinct(weights, tables, frozen_rows)
            lists, features = [weights, indices, [], []], (tables, modes, padding_idx, frozen_rows)
            return _Updating.apply(optimizer, gate, lists, features, names, linear_weight, dense, gate.anchor)
        return _forward(*lists, *features, names, linear_weight, dense, sparse=sparse)


def embedding_fm(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    linear_weight: Tensor | None = None,
    dense: Tensor | None = None,
    *,
    modes: Sequence[str] | None = None,
    tables: Sequence[int] | None = None,
    padding_idx: Sequence[int | None] | None = None,
    frozen_rows: Sequence[int | None] | None = None,
    names: Sequence[str] | None = None,
    sparse: bool = False,
    optimizer: Optimizer | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the linear, the FM and the deep part of DeepFM need of F features, from one pass over their tables.

    Semantics: ``table_batched_embedding_bag(..., concat=True)``, ``fm_interaction`` of its fields and
    ``torch.nn.functional.linear`` of all its columns; ``reference.fm_and_linear``. The deep part's dense columns stand
    behind the embeddings at the price of their own bytes, where ``torch.cat`` would move the embeddings again.

    Args:
        weights: the tables, [R, D] with rows of their own and one D.
        indices: of each feature, int32 or int64, [B], or [B, L] for a pooled one.
        linear_weight: F * D values in the tables' dtype, in the order of the embeddings' columns, or None.
        dense: [B, n] in the tables' dtype, n more columns of the result, or None.
        modes: "none", "sum", "mean" or "max" a feature; none for all by default.
        tables, padding_idx, frozen_rows, names, sparse, optimizer: see ``table_batched_embedding_bag``.

    Returns:
        The embeddings and the dense columns [B, F * D + n]; the FM interaction [B, 1]; the linear term [B, 1], or None.

    Raises:
        IndexError: an id outside its table (on the CPU; other devices have their own report).
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: an unknown mode, a padding index that is no row.
    """
    arguments = in_schema(weights, indices, ["none"] * len(indices) if modes is None else modes, tables, padding_idx,
                          frozen_rows, names)  # fmt: skip
    embeddings, fm, linear = call(weights, indices, *arguments, linear_weight, dense, sparse, optimizer)
    return embeddings, fm, None if linear_weight is None else linear
