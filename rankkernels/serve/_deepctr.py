"""DeepFM and DIN of DeepCTR-Torch. A request is by feature names, not by columns of their matrix X."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from deepctr_torch import models
from deepctr_torch.inputs import DenseFeat, SparseFeat
from torch import Tensor, nn

from rankkernels.adoption._deepctr_lookup import by_group, of_tables
from rankkernels.serve._builder import Builder
from rankkernels.serve._layers import NotServed, plain, read_network


def build(model: nn.Module, b: Builder) -> tuple[float, bool] | None:
    """Fills the builder -> the constant of the logit and whether a sigmoid follows; None for another model."""
    if isinstance(model, models.DeepFM):
        _deepfm(model, b)
    elif isinstance(model, models.DIN):
        _din(model, b)
    else:
        return None
    out = plain(model.out, "out")
    if out.task == "multiclass":
        raise NotServed("freeze: the task must be binary or regression, got multiclass")
    return float(out.bias) if out.use_bias else 0.0, out.task == "binary"


def _mlp(dnn: nn.Module, last: nn.Module, path: str) -> Iterable[nn.Module]:
    plain(dnn, path)
    for i, linear in enumerate(dnn.linears):
        yield linear
        if dnn.use_bn:
            yield dnn.bn[i]
        activation = dnn.activation_layers[i]
        if type(activation).__name__ != "Identity":
            yield activation
    yield last


def _add(b: Builder, tables: nn.ModuleDict, feature, **parts) -> int:
    """A lookup, pooled as theirs is."""
    if isinstance(feature, SparseFeat):
        table = b.table(tables[feature.embedding_name], f"the table of feature {feature.name!r}")
        return b.lookup(feature.name, "ids", table, **parts)
    if feature.length_name is not None or feature.combiner not in ("sum", "mean"):
        raise NotServed(
            f"freeze: feature {feature.name!r} is pooled by {feature.combiner} and length {feature.length_name!r}; "
            "served are sum and mean without a length"
        )
    table = b.table(tables[feature.embedding_name], f"the table of feature {feature.name!r}")
    return b.lookup(feature.name, "sequence", table, feature.combiner, 0, **parts)


def _dnn(model: nn.Module, b: Builder) -> None:
    """The MLP, whose last inputs are the dense columns."""
    for column in model.dnn_feature_columns:
        if isinstance(column, DenseFeat):
            b.numbers(column.name, column.dimension, b.columns(column.dimension))
    b.mlp(read_network(_mlp(model.dnn, model.dnn_linear, "dnn"), "dnn"))


def _deepfm(model: nn.Module, b: Builder) -> None:
    linear = plain(model.linear_model, "linear_model")
    one = b.floats(torch.ones(1))
    for column in [*linear.sparse_feature_columns, *linear.varlen_sparse_feature_columns]:
        _add(b, linear.embedding_dict, column, weight=one)
    weights = iter(_weights(linear))
    for column in linear.dense_feature_columns:
        weight = torch.stack([next(weights) for _ in range(column.dimension)])
        b.numbers(column.name, column.dimension, weight=b.floats(weight))
    if model.use_fm:
        plain(model.fm, "fm")
    for column in of_tables(model.dnn_feature_columns):
        at = b.columns(column.embedding_dim) if model.use_dnn else -1
        _add(b, model.embedding_dict, column, column=at, fm=model.use_fm)
    if model.use_dnn:
        _dnn(model, b)


def _weights(linear: nn.Module) -> Sequence[Tensor]:
    return linear.weight.detach().flatten() if linear.dense_feature_columns else ()


def _din(model: nn.Module, b: Builder) -> None:
    sparse = model.sparse_feature_columns
    lengths = [c.length_name for c in model.varlen_sparse_feature_columns if c.length_name is not None]
    if not lengths:
        raise NotServed("freeze: DIN's histories need the length_name of their lengths")
    ordered = [c for c, _ in by_group(sparse, sparse)]
    lookup_of = {}
    for column in ordered:
        lookup_of[column.name] = _add(b, model.embedding_dict, column, column=b.columns(column.embedding_dim))
    for column in model.sparse_varlen_feature_columns:
        _add(b, model.embedding_dict, column, column=b.columns(column.embedding_dim))
    targets = [lookup_of[c.name] for c in ordered if c.name in model.history_feature_list]
    histories = [c for c, _ in by_group(model.history_feature_columns, model.history_feature_columns)]
    found = []
    for column in histories:
        table = b.table(model.embedding_dict[column.embedding_name], f"the table of feature {column.name!r}")
        found.append(b.lookup(column.name, "history", table))
    width = sum(c.embedding_dim for c in histories)
    attention = plain(model.attention, "attention")
    unit = plain(attention.local_att, "attention.local_att")
    if unit.dnn.use_bn:
        raise NotServed("freeze: attention.local_att.dnn normalizes over positions (use_bn)")
    b.attention(
        read_network(_mlp(unit.dnn, unit.dense, "attention.local_att"), "attention.local_att"), found, targets,
        b.columns(width), length=b.input(lengths[0], "ids"), use_softmax=attention.weight_normalization,
        count_padding=True,
    )  # fmt: skip
    _dnn(model, b)
