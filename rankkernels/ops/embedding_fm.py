"""Lookup, FM and linear term in one pass over the tables.

Kernels: csrc/cpu/embedding/fm_kernel.h, csrc/cuda/embedding/fm.cuh; _triton/embedding_fm.py for ids one a sample.

Looks the features of a few samples up and combines them while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels import reference
from rankkernels.ops import _exact_table, _onnx
from rankkernels.ops._autograd import check_first_derivative, register_autograd
from rankkernels.ops._checks import raise_documented
from rankkernels.ops._embedding_checks import check_forward, report_values
from rankkernels.ops._features import Features, LookupBatch, names_of
from rankkernels.ops._fused_step import FusedLookup, Optimizer
from rankkernels.ops._library import (
    define,
    lib,
    no_autocast,
    triton_embeds,
    triton_serves_tables,
    without_autocast,
)
from rankkernels.ops._schema import schema_of
from rankkernels.ops.embedding_bag import no_backward, outside_graph, to_schema
from rankkernels.ops.embedding_bag_backward import sparse_gradients, table_gradients
from rankkernels.ops.embedding_bag_exact import bag_exact
from rankkernels.ops.embedding_bag_update import BagGradients
from rankkernels.ops.embedding_fm_backward import (
    Arguments,
    FmGradients,
    check_linear_weight,
    embedding_fm_backward,
    without_dense,
)

# ``embeddings`` [B, F * D + n] are the lookups side by side, as embedding_bag with concat gives them, then the columns
# of ``dense`` [B, n], if any. ``fm`` is [B, 1]; so is ``linear``, but [0, 1] without a ``linear_weight``, which has
# F * D values in any shape.
define(
    f"embedding_fm(Tensor[] weights, {schema_of(Features)}, str names, Tensor? linear_weight, Tensor? dense, *, "
    "bool sparse=False) -> (Tensor embeddings, Tensor fm, Tensor linear)"
)


def _check(weights, features, names, embeddings, linear_weight, dense) -> None:
    """The texts are those of csrc/embedding/fm.h."""
    names, widths = names_of(names, len(features.tables)), [weights[t].size(1) for t in features.tables]
    for name, width in zip(names, widths):
        torch._check(
            width == widths[0],
            lambda: (
                f"embedding_fm: features must have one width, but that of {name} is {width} and that of {names[0]} "
                f"{widths[0]}"
            ),
        )
    if linear_weight is not None:
        check_linear_weight("embedding_fm", linear_weight, weights[features.tables[0]], sum(widths))
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


def _lookups(weights, features, names, linear_weight, dense) -> Tensor:
    """The embeddings without dense columns; the arguments, checked."""
    (embeddings,) = torch.ops.rankkernels.embedding_bag.default(weights, *features, names, concat=True)
    _check(weights, features, names, embeddings, linear_weight, dense)
    return embeddings


def _with_dense(embeddings: Tensor, dense: Tensor | None) -> Tensor:
    return embeddings if dense is None else torch.cat([embeddings, dense], 1)


def _linear(embeddings: Tensor, linear_weight: Tensor | None) -> Tensor:
    if linear_weight is None:
        return embeddings.new_empty((0, 1))
    row = 1, linear_weight.numel()
    return F.linear(embeddings, linear_weight if linear_weight.shape == row else linear_weight.reshape(row))


@torch.library.register_fake("rankkernels::embedding_fm", lib=lib)
def _(weights, *rest, sparse=False):
    *features, names, linear_weight, dense = rest
    embeddings = _lookups(weights, Features(*features), names, linear_weight, dense)
    B = embeddings.size(0)
    fm, linear = (embeddings.new_empty((n, 1)) for n in (B, 0 if linear_weight is None else B))
    return _with_dense(embeddings, dense), fm, linear


# Where no kernel does all, the separate ops do, each by the best that serves the device.
@torch.library.impl(lib, "embedding_fm", "CompositeExplicitAutograd")
def _default(weights, *rest, sparse=False):
    *features, names, linear_weight, dense = rest
    features = Features(*features)
    return _combined(_lookups(weights, features, names, linear_weight, dense), features, linear_weight, dense)


def _combined(embeddings: Tensor, features: Features, linear_weight, dense) -> tuple[Tensor, Tensor, Tensor]:
    if embeddings.numel():
        fields = embeddings.view(embeddings.size(0), len(features.indices), -1)
        fm = torch.ops.rankkernels.fm_interaction.default(fields, True)
    else:
        fm = embeddings.new_zeros((embeddings.size(0), 1))
    return _with_dense(embeddings, dense), fm, _linear(embeddings, linear_weight)


if triton_embeds:

    @torch.library.impl(lib, "embedding_fm", "CUDA")
    def _(weights, *rest, sparse=False):
        from rankkernels._triton import embedding_fm as kernels

        *features, names, linear_weight, dense = rest
        features = Features(*features)
        check_forward(weights, features, names, concat=True)
        if not (triton_serves_tables(weights) and kernels.supports(weights, features)):
            return _default(weights, *rest)
        some, B = weights[features.tables[0]], features.indices[0].size(0)
        embeddings = some.new_empty((B, len(features.indices) * some.size(1)))
        _check(weights, features, names, embeddings, linear_weight, dense)
        report_values(features, [w.size(0) for w in weights], names_of(names, len(features.indices)))
        fm = kernels.embedding_fm(weights, features, embeddings)
        return _with_dense(embeddings, dense), fm, _linear(embeddings, linear_weight)


without_autocast(torch.ops.rankkernels.embedding_fm.default)


def _versions(weights) -> list[int]:
    with _exact_table.as_plain():
        return [0 if w.is_inference() else w._version for w in weights]


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    weights, *features, _names, linear_weight, _dense = inputs
    features, (embeddings, *_) = Features(*features), output
    ctx.set_materialize_grads(False)
    ctx.features, ctx.rows, ctx.dim = features.without_tensors(), [w.size(0) for w in weights], weights[0].size(1)
    ctx.sparse = keyword_only_inputs["sparse"]
    if ctx.sparse:  # kept, not saved: tables that an optimizer changed since are no error
        ctx.weights, ctx.versions = weights, _versions(weights)
    values = weights if features.need_values() else ()
    ctx.save_for_backward(embeddings, linear_weight, *features.tensors(), *values)


def _backward(ctx, *grads):
    saved = iter(ctx.saved_tensors)
    embeddings, linear_weight = next(saved), next(saved)
    features, values, F = ctx.features.with_tensors(saved), list(saved), len(ctx.features.indices)
    if all(g is None for g in grads):
        return [None] * len(ctx.rows), *features.gradients(), None, None, None
    grads, embeddings, grad_dense = without_dense(grads, embeddings, F * ctx.dim)
    arguments = Arguments(*grads, embeddings, linear_weight, ctx.dim)
    if ctx.sparse:
        check_first_derivative("embedding_fm with sparse gradients")
        grad_rows, grad_values, grad_psw, grad_linear_weight = (
            torch.ops.rankkernels.embedding_fm_backward_sparse.default(
                *arguments, ctx.weights, ctx.versions == _versions(ctx.weights), ctx.rows, *features
            )
        )
        grad_weights = sparse_gradients(set(features.tables), grad_rows, grad_values, ctx.rows)
    else:
        grad, grad_linear_weight = embedding_fm_backward(*arguments)
        grad_outs = grad.split_with_sizes([ctx.dim] * F, 1)
        grad_weights, grad_psw = table_gradients(grad_outs, values, ctx.rows, features, sparse=False)
    grad_linear_weight = None if linear_weight is None else grad_linear_weight
    return grad_weights, *features.gradients(grad_psw), None, grad_linear_weight, grad_dense


def _to_onnx(weights, *rest, sparse=False):
    *features, _names, linear_weight, dense = rest
    embeddings = torch.cat(_onnx.embedding_bag(weights, Features(*features)), 1)
    fm, linear = reference.fm_and_linear(embeddings, weights[0].size(1), linear_weight)
    return _with_dense(embeddings, dense), fm, embeddings.new_empty((0, 1)) if linear is None else linear


_forward = register_autograd("embedding_fm", _default, _backward, _setup_context, _to_onnx)


def _is_read_behind(weights: Sequence[Tensor], features: Features) -> bool:
    """Whether rows under exact Adam are looked up as they lag behind, for the step to bring them up to date: where that
    takes a sort, which the step needs anyway."""
    return weights[0].device.type != "cpu" and _exact_table.lag_behind(weights, features)


class _FusedFm(FusedLookup):
    """Its inputs are the linear weight and the dense columns."""

    op = "embedding_fm"

    def __init__(self, optimizer: Optimizer, weights: Sequence[Tensor], features: Features, names: str):
        super().__init__(optimizer, weights, features)
        self.names, self.versions = names, _versions(self.weights)
        self.behind = _exact_table.in_use and _is_read_behind(self.weights, self.features)

    def run(self, linear_weight, dense):
        self.has_linear = linear_weight is not None
        if self.behind:
            (embeddings,) = bag_exact(_exact_table.of_each(self.weights), self.features, self.names, concat=True)
            _check(self.weights, self.features, self.names, embeddings, linear_weight, dense)
            with no_autocast():
                return _combined(embeddings, self.features, linear_weight, dense)
        return torch.ops.rankkernels.embedding_fm.default(
            self.weights, *self.features, self.names, linear_weight, dense
        )

    def saved(self, outs, linear_weight, dense):
        embeddings, *_ = outs
        return embeddings, linear_weight

    def gradients(self, grads, saved):
        embeddings, linear_weight, dim = next(saved), next(saved), self.weights[0].size(1)
        grads, embeddings, grad_dense = without_dense(grads, embeddings, len(self.features.indices) * dim)
        unchanged = self.versions == _versions(self.weights)
        of_results = FmGradients(Arguments(*grads, embeddings, linear_weight, dim), unchanged)
        if self.behind:
            of_lookups, grad_linear_weight = of_results.of_lookups(self.features)
            return BagGradients(of_lookups), grad_linear_weight, grad_dense
        return of_results, grad_dense

    def of_inputs(self, of_per_sample_weights, grad_linear_weight, grad_dense):
        return grad_linear_weight if self.has_linear else None, grad_dense


def run_op(
    weights: Sequence[Tensor], features: Features, names: str, linear_weight: Tensor | None = None,
    dense: Tensor | None = None, sparse: bool = False, optimizer: Optimizer | None = None, up_to_date: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of features without offsets and per-sample weights, or the op with an optimizer's step in its backward.
    ``up_to_date``: see ``_exact_table``."""
    if _exact_table.in_use and not up_to_date and _exact_table.any_exact(weights):
        arguments = weights, features, names, linear_weight, dense, sparse, optimizer
        if torch.compiler.is_compiling():
            return outside_graph(run_op, *arguments)
        by_itself = optimizer is not None and not no_backward() and _is_read_behind(weights, features)
        return _exact_table.read(partial(run_op, *arguments, up_to_date=True), weights, features, names, by_itself)
    if (sparse or optimizer is not None) and no_backward():
        sparse, optimizer = False, None
    if (sparse or optimizer is not None) and torch.compiler.is_compiling():
        return outside_graph(run_op, weights, features, names, linear_weight, dense, sparse, optimizer)
    if torch.compiler.is_exporting():
        features = features.without_empty_lists()
    with raise_documented():
        if optimizer is not None:
            return _FusedFm(optimizer, weights, features, names)(linear_weight, dense)
        return _forward(weights, *features, names, linear_weight, dense, sparse=sparse)


def run_batch(batch: LookupBatch, linear_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings with the dense columns behind them, the FM and the linear term, each of the latter [B, 1].

    On the CPU the op writes the dense columns. Elsewhere it would copy the embeddings beside them; joining all of them
    at once is a launch less.
    """
    by_op = all(v.device.type == "cpu" for v in batch.dense)
    out, fm, linear = run_op(
        batch.weights, batch.features, batch.names, linear_weight, batch.dense_columns() if by_op else None,
        optimizer=batch.optimizer,
    )  # fmt: skip
    return out if by_op else torch.cat([out, *batch.dense], 1), fm, linear


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
    ``torch.nn.functional.linear`` of all its columns; ``reference.fm_and_linear``. The deep part's dense columns are
    appended in place, without the extra copy of the embeddings that ``torch.cat`` makes.

    Args:
        weights: the tables, [R, D] with rows of their own and one D.
        indices: of each feature, int32 or int64, [B], or [B, L] for a pooled one.
        linear_weight: F * D values in the tables' dtype, in the order of the embeddings' columns, or None.
        dense: [B, n] in the tables' dtype, n more columns of the result, or None.
        modes: "none", "sum", "mean" or "max" a feature; none for all by default.
        tables: the table of each feature, by position in ``weights``; one each in order by default.
        padding_idx: the id that a feature's pooling leaves out, or None; negative ones count from the table's end.
        frozen_rows: the row of a table that gets no gradient, or None; negative ones likewise.
        names: what error messages call the features; by default indices[0], indices[1], ...
        sparse: give the tables sparse gradients, coalesced.
        optimizer: one of ``rankkernels.optim``, to step on the rows looked up in the backward itself.

    Returns:
        The embeddings and the dense columns [B, F * D + n]; the FM interaction [B, 1]; the linear term [B, 1], or None.

    Raises:
        IndexError: an id outside its table (on the CPU; other devices have their own report).
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: an unknown mode, a padding index that is no row.
    """
    modes = ["none"] * len(indices) if modes is None else modes
    features, joined_names = to_schema(weights, indices, None, None, modes, tables, padding_idx, frozen_rows, names)
    embeddings, fm, linear = run_op(weights, features, joined_names, linear_weight, dense, sparse, optimizer)
    return embeddings, fm, None if linear_weight is None else linear
