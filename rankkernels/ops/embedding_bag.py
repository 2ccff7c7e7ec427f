"""Embedding lookups, pooled or not, of one table or of many in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops import _exact_table, _onnx
from rankkernels.ops._autograd import register_autograd
from rankkernels.ops._checks import raise_documented
from rankkernels.ops._embedding_checks import check_forward, check_values, report_values, row_of
from rankkernels.ops._features import MODES, Features, join_names, names_of
from rankkernels.ops._fused_step import FusedLookup, Optimizer
from rankkernels.ops._library import define, lib, no_cuda, triton_embeds, triton_serves_tables
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import OPS, notice_reference
from rankkernels.ops._tracing import is_exporting
from rankkernels.ops.embedding_bag_backward import table_gradients
from rankkernels.ops.embedding_bag_exact import bag_exact
from rankkernels.ops.embedding_bag_update import BagGradients

# ``names``, one a line, are the features' for error messages, or empty. ``concat`` gives one tensor [B, all widths],
# ``sparse`` makes the tables' gradients sparse.
define(
    f"embedding_bag(Tensor[] weights, {schema_of(Features)}, str names, *, bool concat=False, bool sparse=False) "
    "-> Tensor[]"
)


@torch.library.register_fake("rankkernels::embedding_bag", lib=lib)
def _(weights, *rest, concat=False, sparse=False):
    *features, names = rest
    features = Features(*features)
    check_forward(weights, features, names, concat)
    of_feature = [weights[t] for t in features.tables]
    bags = [features.bags_of(f) if ids.dim() else 1 for f, ids in enumerate(features.indices)]
    if concat:
        return [of_feature[0].new_empty((bags[0], sum(w.size(1) for w in of_feature)))]
    return [
        w.new_empty((*(ids.shape if features.mode(f) == "none" else (bags[f],)), w.size(1)))
        for f, (w, ids) in enumerate(zip(of_feature, features.indices))
    ]


def _feature_reference(weights: list[Tensor], features: Features, f: int) -> Tensor:
    """One feature's lookup."""
    table, ids, padding = features.tables[f], features.indices[f], features.padding_idx[f]
    frozen_row = None if features.frozen_rows[table] < 0 else features.frozen_rows[table]
    if features.mode(f) == "none":
        return reference.embedding(weights[table], ids, frozen_row)
    return reference.embedding_bag(
        weights[table],
        ids,
        features.offsets_of(f),
        features.mode(f),
        features.per_sample_weights_of(f),
        None if padding < 0 else padding,
        frozen_row,
    )


def _looked_up(weights: list[Tensor], features: Features, concat: bool) -> list[Tensor]:
    """By ids that all have to be rows; the arguments, checked."""
    outs = [_feature_reference(weights, features, f) for f in range(len(features.indices))]
    return [torch.cat(outs, 1)] if concat else outs


def _reference(weights, *rest, concat=False, sparse=False):
    *features, names = rest
    features = Features(*features)
    check_forward(weights, features, names, concat)
    return _looked_up(weights, features.as_rows(), concat)


@torch.library.impl(lib, "embedding_bag", "CompositeExplicitAutograd")
def _default(weights, *rest, concat=False, sparse=False):
    *features, names = rest
    features = Features(*features)
    check_forward(weights, features, names, concat)
    notice_reference("embedding_bag", weights[0])
    features, F = features.as_rows(), len(features.indices)
    check_values(features, [w.size(0) for w in weights], names_of(names, F), [True] * F)
    return _looked_up(weights, features, concat)


if triton_embeds:

    @torch.library.impl(lib, "embedding_bag", "CUDA")
    def _(weights, *rest, concat=False, sparse=False):
        from rankkernels._triton.embedding_bag import embedding_bag

        *features, names = rest
        features = Features(*features)
        check_forward(weights, features, names, concat)
        if not triton_serves_tables(weights):
            return _default(weights, *rest, concat=concat, sparse=sparse)
        report_values(features, [w.size(0) for w in weights], names_of(names, len(features.indices)))
        return embedding_bag(weights, features, concat)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    weights, *features, _names = inputs
    features = Features(*features)
    ctx.set_materialize_grads(False)  # rows of a result that nobody uses get no gradient, not one of zeros
    ctx.features, ctx.rows = features.without_tensors(), [w.size(0) for w in weights]
    ctx.sparse = keyword_only_inputs["sparse"]
    ctx.widths = [weights[t].size(1) for t in features.tables] if keyword_only_inputs["concat"] else None
    ctx.save_for_backward(*features.tensors(), *(weights if features.need_values() else ()))


def _backward(ctx, grad_outs):
    saved = iter(ctx.saved_tensors)
    features, values = ctx.features.with_tensors(saved), list(saved)
    if ctx.widths:
        (grad_out,) = grad_outs
        grad_outs = [None] * len(ctx.widths) if grad_out is None else grad_out.split_with_sizes(ctx.widths, 1)
    grad_weights, grad_psw = table_gradients(grad_outs, values, ctx.rows, features, ctx.sparse)
    return grad_weights, *features.gradients(grad_psw), None


def _to_onnx(weights, *rest, concat=False, sparse=False):
    *features, _names = rest
    outs = _onnx.embedding_bag(weights, Features(*features))
    return [torch.cat(outs, 1)] if concat else outs


_forward = register_autograd("embedding_bag", _reference, _backward, _setup_context, _to_onnx)


class _FusedBag(FusedLookup):
    """Its inputs are the per-sample weights."""

    op = "embedding_bag"

    def __init__(self, optimizer: Optimizer, weights: Sequence[Tensor], features: Features, names: str, concat: bool):
        super().__init__(optimizer, weights, features)
        self.names = names
        self.widths = [self.weights[t].size(1) for t in self.features.tables] if concat else None

    def run(self, *per_sample_weights):
        if _exact_table.in_use and _exact_table.lag_behind(self.weights, self.features):
            tables = _exact_table.of_each(self.weights)
            return bag_exact(tables, self.features, self.names, self.widths is not None)
        return torch.ops.rankkernels.embedding_bag.default(
            self.weights, *self.features, self.names, concat=self.widths is not None
        )

    def gradients(self, grads, saved):
        if self.widths is not None:
            (grad,) = grads
            grads = grad.split_with_sizes(self.widths, 1)
        return (BagGradients(list(grads)),)

    def of_inputs(self, of_per_sample_weights):
        return of_per_sample_weights


def outside_graph(function: Callable, *arguments):
    """Runs ``function`` outside torch.compile's graph: the number of rows that a backward finds depends on the data."""
    return torch.compiler.disable(function)(*arguments)  # not a decorator: that would import the compiler


def no_backward() -> bool:
    """Whether no backward will follow, so that its data-dependent shapes need no break of a graph."""
    return not torch.is_grad_enabled() or is_exporting()


def run_op(
    weights: Sequence[Tensor], features: Features, names: str, concat: bool = False, sparse: bool = False,
    optimizer: Optimizer | None = None, up_to_date: bool = False,
) -> list[Tensor]:  # fmt: skip
    """The op, or the op with an optimizer's step in its backward. ``up_to_date``: see ``_exact_table``."""
    if _exact_table.in_use and not up_to_date and _exact_table.any_exact(weights):
        arguments = weights, features, names, concat, sparse, optimizer
        if torch.compiler.is_compiling():
            return outside_graph(run_op, *arguments)
        run, no_grad = partial(run_op, *arguments, up_to_date=True), not torch.is_grad_enabled()
        by_itself = (no_grad or optimizer is not None) and not is_exporting()
        by_itself = by_itself and _exact_table.lag_behind(weights, features)
        if by_itself and no_grad:
            run = partial(bag_exact, _exact_table.of_each(weights), features, names, concat)
        return _exact_table.read(run, weights, features, names, by_itself)
    if (sparse or optimizer is not None) and no_backward():
        sparse, optimizer = False, None
    if torch.compiler.is_exporting():
        features = features.without_empty_lists()
    if (sparse or optimizer is not None) and torch.compiler.is_compiling():
        return outside_graph(run_op, weights, features, names, concat, sparse, optimizer)
    with raise_documented():
        if optimizer is not None:
            return list(_FusedBag(optimizer, weights, features, names, concat)(*features.per_sample_weights))
        return _forward(weights, *features, names, concat=concat, sparse=sparse)


def _rows(what: str, values: Sequence[int | None] | None, tables: Sequence[int], weights: Sequence[Tensor]) -> list:
    """Rows of ``tables`` as the schema has them: counted from the table's beginning, -1 for none."""
    if values is None:
        return [-1] * len(tables)
    found = []
    for value, t in zip(values, tables):
        if value is None:
            found.append(-1)
            continue
        R = weights[t].size(0) if weights[t].dim() == 2 else 0
        found.append(row_of("embedding_bag", what, value, R))
    return found


_NUMBER = {mode: number for number, mode in enumerate(MODES)}


def to_schema(weights, indices, offsets, per_sample_weights, modes, tables, padding_idx, frozen_rows, names):
    """The features and their names in the schema's form, from the public functions' arguments."""
    n = len(indices)
    tables = list(range(n)) if tables is None else tables
    for what, values, kind, expected in (
        ("modes", modes, "feature", n), ("tables", tables, "feature", n), ("padding_idx", padding_idx, "feature", n),
        ("names", names, "feature", n), ("frozen_rows", frozen_rows, "table", len(weights)),
    ):  # fmt: skip
        if values is not None and len(values) != expected:
            raise ValueError(f"embedding_bag: {what} must have one entry a {kind}, {expected}, got {len(values)}")
    try:
        numbers = [_NUMBER[mode] for mode in modes]
    except (KeyError, TypeError):
        unknown = next(mode for mode in modes if mode not in MODES)
        raise ValueError(f"embedding_bag: unknown mode {unknown!r}, expected one of {', '.join(MODES)}") from None
    if n and not 0 <= min(tables) <= max(tables) < len(weights):
        f, t = next((f, t) for f, t in enumerate(tables) if not 0 <= t < len(weights))
        raise ValueError(f"embedding_bag: feature {f} has table {t} of {len(weights)}")

    def tensors(values):
        if values is None or all(v is None for v in values):
            return []
        absent = weights[0].new_empty(0) if len(weights) else None  # an eighth of a small call
        return [absent if v is None else v for v in values]

    features = Features(
        indices,
        tensors(offsets),
        tensors(per_sample_weights),
        tables,
        numbers,
        _rows("padding_idx", padding_idx, tables, weights),
        _rows("frozen_rows", frozen_rows, range(len(weights)), weights),
    )
    return features, "" if names is None else join_names(names)


def table_batched_embedding_bag(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    modes: Sequence[str],
    tables: Sequence[int] | None = None,
    offsets: Sequence[Tensor | None] | None = None,
    per_sample_weights: Sequence[Tensor | None] | None = None,
    padding_idx: Sequence[int | None] | None = None,
    frozen_rows: Sequence[int | None] | None = None,
    names: Sequence[str] | None = None,
    concat: bool = False,
    sparse: bool = False,
    optimizer: Optimizer | None = None,
) -> list[Tensor]:
    """Many features looked up in many tables, in one call.

    Args:
        weights: the tables, each [R, D] with rows and width of its own.
        indices: one tensor a feature, int32 or int64: any shape for mode none, [B, L] for a pooled feature, or [N] with
            ``offsets``.
        modes: "none", "sum", "mean" or "max" a feature.
        tables: the table of each feature, by position in ``weights``; one each in order by default.
        offsets: where the bags of a pooled feature start, [B], or None.
        per_sample_weights: factors of the shape of the indices for a sum or a mean, or None. The mean divides by the
            number of ids.
        padding_idx: the id that a feature's pooling leaves out, or None; negative ones count from the table's end.
        frozen_rows: the row of a table that gets no gradient, or None; negative ones likewise.
        names: what error messages call the features; by default indices[0], indices[1], ...
        concat: write all features side by side into one tensor. Each must be pooled or have 1-D indices, with one
            number of bags and one dtype for all.
        sparse: give the tables sparse gradients, coalesced, as ``torch.optim.SparseAdam``, ``Adagrad`` and ``SGD`` take
            them. Under ``torch.compile`` the lookup is then a break in the graph, with an optimizer too.
        optimizer: one of ``rankkernels.optim``, to step on the rows looked up in the backward itself; the tables get
            no ``grad`` then.

    Returns:
        One tensor a feature: indices.shape + [D] for mode none, [B, D] otherwise; an empty bag is zeros. With
        ``concat`` a list of the one tensor [B, sum of the widths].

    Raises:
        IndexError: an id outside its table (on the CPU; other devices have their own report).
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: lists of another length than the features or the tables, an unknown mode or table, a padding index
            that is no row.
    """
    features, joined_names = to_schema(
        weights, indices, offsets, per_sample_weights, modes, tables, padding_idx, frozen_rows, names
    )
    return run_op(weights, features, joined_names, concat, sparse, optimizer)


def without_rest(
    weight: Tensor, ids: Tensor, offsets: Tensor, per_sample_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The ids [N] of bags that end at ``offsets[-1]``, and their factors, without those behind it. On a GPU, whose
    kernels pass over ids outside a table, those become such ids: their number would be waited for."""
    kernels = OPS["embedding_bag"].kernel("cuda") and (no_cuda is None or triton_serves_tables([weight]))
    if ids.is_cuda and kernels and os.environ.get("RANKKERNELS_CHECK_IDS", "ignore") == "ignore":
        position = torch.arange(ids.numel(), device=ids.device)
        return ids.where(position < offsets[-1], -1), per_sample_weights
    end = int(offsets[-1])
    if end < ids.numel():
        ids, per_sample_weights = ids[:end], None if per_sample_weights is None else per_sample_weights[:end]
    return ids, per_sample_weights


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Pooled rows of one table: weight [R, D], indices [B, L] or [N] with offsets [B] -> [B, D].

    Semantics: ``reference.embedding_bag`` and ``torch.nn.functional.embedding_bag``, plus a mean with
    ``per_sample_weights``. See ``table_batched_embedding_bag`` for the arguments and the errors.
    """
    return table_batched_embedding_bag(
        [weight],
        [indices],
        modes=[mode],
        offsets=[offsets],
        per_sample_weights=[per_sample_weights],
        padding_idx=[padding_idx],
        frozen_rows=[padding_idx],
        names=["indices"],
        sparse=sparse,
    )[0]
