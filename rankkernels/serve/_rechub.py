"""DeepFM and DIN with torch-rechub's attributes: ours, and theirs."""

from __future__ import annotations

from torch import nn

from rankkernels import models
from rankkernels.nn.features import is_dense, is_sequence
from rankkernels.nn.lookup_plan import POOLING, table_name
from rankkernels.serve._builder import Builder
from rankkernels.serve._layers import Network, NotServed, plain, read_network


def build(model: nn.Module, kind: type, b: Builder) -> tuple[float, bool] | None:
    """Fills the builder -> the constant of the logit and whether a sigmoid follows; None for another model."""
    if kind is models.DeepFM:
        return _deepfm(model, b)
    return _din(model, b) if kind is models.DIN else None


def _mlp(module: nn.Module, path: str) -> Network:
    plain(module, path)
    return read_network(plain(module.mlp, path), path)


def _add(model: nn.Module, b: Builder, feature, kind: str, **parts) -> int:
    """A lookup of ``feature``, ids, a sequence or a history."""
    if getattr(feature, "weights", None) is not None:
        raise NotServed(f"freeze: feature {feature.name!r} has per-sample weights")
    oov, known, mode = getattr(feature, "oov", "error"), 0, "none"
    if kind == "sequence":
        mode = POOLING[feature.pooling]
        if mode == "none":
            raise NotServed(f"freeze: feature {feature.name!r} has pooling 'concat' outside of an attention")
    if oov != "error":
        known = feature.vocab_size
    table = b.table(model.embedding.embed_dict[table_name(feature)], f"the table of feature {feature.name!r}")
    needed = kind != "ids" or oov == "hash"
    padding_idx = feature.padding_idx if needed else None
    return b.lookup(feature.name, kind, table, mode, padding_idx, oov, known, **parts)


def _kind(feature) -> str:
    return "sequence" if is_sequence(feature) else "ids"


def _add_columns(model: nn.Module, b: Builder, features: list, **parts) -> None:
    """The features' columns in the order of ``arrange``: dense ones last."""
    for feature in features:
        if not is_dense(feature):
            _add(model, b, feature, _kind(feature), column=b.columns(feature.embed_dim), **parts.get(feature.name, {}))
    for feature in features:
        if is_dense(feature):
            b.numbers(feature.name, feature.embed_dim, b.columns(feature.embed_dim))


def _deepfm(model: nn.Module, b: Builder) -> tuple[float, bool]:
    plain(model.fm, "fm"), plain(model.linear, "linear")
    if not model.fm.reduce_sum or model.linear.sigmoid:
        raise NotServed("freeze: DeepFM's fm must reduce_sum, and its linear have no sigmoid")
    deep, weights = list(model.deep_features), model.linear.fc.weight.detach().flatten()
    of_deep = [f.name for f in deep if not is_dense(f)]
    together, alone = {}, []
    for feature, weight in zip(model.fm_features, weights.split([f.embed_dim for f in model.fm_features])):
        part = {"weight": b.floats(weight), "fm": True}
        if of_deep.count(feature.name) == 1 and feature.name not in together:
            together[feature.name] = part
        else:
            alone.append((feature, part))
    _add_columns(model, b, deep, **together)
    for feature, part in alone:
        _add(model, b, feature, _kind(feature), **part)
    b.mlp(_mlp(model.mlp, "mlp"))
    return float(model.linear.fc.bias), True


def _din(model: nn.Module, b: Builder) -> tuple[float, bool]:
    pooled = [b.columns(f.embed_dim) for f in model.history_features]
    targets = [_add(model, b, f, "ids", column=b.columns(f.embed_dim)) for f in model.target_features]
    _add_columns(model, b, list(model.features))
    masked = getattr(model, "mask_padding", False)
    for i, (feature, unit) in enumerate(zip(model.history_features, model.attention_layers)):
        plain(unit, f"attention_layers.{i}")
        history = _add(model, b, feature, "history")
        b.attention(
            _mlp(unit.attention, f"attention_layers.{i}"), [history], [targets[i]], pooled[i], masked=masked,
            use_softmax=unit.use_softmax,
        )  # fmt: skip
    b.mlp(_mlp(model.mlp, "mlp"))
    return 0.0, True
