"""DeepFM and DIN of FuxiCTR's model zoo. A request is by feature names.

Most of the zoo is no part of the package but of its users' checkouts: models are known by their layers, and what was
built is compared with the model on a few random samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from fuxictr.pytorch import layers
from torch import Tensor, nn

from rankkernels.ops._rank_plan import Plan
from rankkernels.serve._builder import Builder
from rankkernels.serve._frozen import FrozenModel
from rankkernels.serve._layers import Network, NotServed, plain, read_network

_SAMPLES, _LENGTH = 16, 5


def build(model: nn.Module, b: Builder) -> tuple[float, bool] | None:
    """Fills the builder -> the constant of the logit and whether a sigmoid follows; None for another model."""
    modules = dict(model.named_children())
    embedding = modules.get("embedding_layer")
    if isinstance(modules.get("fm"), layers.FactorizationMachine) and isinstance(embedding, layers.FeatureEmbedding):
        constant = _deepfm(model, b)
    elif hasattr(model, "din_target_field") and isinstance(embedding, layers.FeatureEmbeddingDict):
        constant = _din(model, b)
    elif isinstance(modules.get("attention_layers"), layers.DIN_Attention) and hasattr(model, "item_info_dim"):
        constant = _long_din(model, b)
    else:
        return None
    if not isinstance(model.output_activation, (nn.Sigmoid, nn.Identity)):
        raise NotServed(f"freeze: the output activation must be a sigmoid or none, got {model.output_activation!r}")
    return constant, isinstance(model.output_activation, nn.Sigmoid)


class _Fields:
    """The embeddings of a FeatureEmbeddingDict, each feature's a block of the MLP's first weight."""

    def __init__(self, model: nn.Module, embedding: nn.Module, path: str, b: Builder):
        if isinstance(embedding, layers.FeatureEmbedding):
            embedding = plain(embedding, path).embedding_layer
        plain(embedding, path)
        self.specs, self.path, self.b = model.feature_map.features, path, b
        self.tables, self.encoders = embedding.embedding_layers, embedding.feature_encoders

    def __iter__(self) -> Iterable[str]:
        """The features that have an embedding, in the order of the model's inputs."""
        return (f for f in self.specs if f in self.tables)

    def width(self, feature: str) -> int:
        return self.tables[feature].weight.size(1 if self.is_lookup(feature) else 0)

    def is_lookup(self, feature: str) -> bool:
        kind = self.specs[feature]["type"]
        if kind == "numeric":
            return False
        if kind not in ("categorical", "sequence") or type(self.tables[feature]) is not nn.Embedding:
            raise NotServed(f"freeze: feature {feature!r} of type {kind!r} is embedded by {self.tables[feature]!r}")
        return True

    def vector(self, feature: str) -> Tensor:
        """What one number is multiplied with."""
        return plain(self.tables[feature], f"{self.path}.{feature}").weight.detach().cpu().flatten()

    def add(self, feature: str, **parts: object) -> int:
        """A lookup of ids, or of a sequence that is summed."""
        table, kind, mode = self._table(feature), "ids", "none"
        if self.specs[feature]["type"] == "sequence":
            if not isinstance(self.encoders[feature] if feature in self.encoders else None, layers.MaskedSumPooling):
                raise NotServed(f"freeze: the sequence {feature!r} must be summed (MaskedSumPooling)")
            kind, mode = "sequence", "sum"
        elif feature in self.encoders:
            raise NotServed(f"freeze: feature {feature!r} has an encoder, {self.encoders[feature]!r}")
        return self.b.lookup(feature, kind, table, mode, **parts)

    def history(self, feature: str, name: str | None = None) -> int:
        return self.b.lookup(name or feature, "history", self._table(feature), padding_idx=0)

    def _table(self, feature: str) -> int:
        self.is_lookup(feature)
        return self.b.table(self.tables[feature], f"the table of feature {feature!r}")


def _network(block: nn.Module, path: str, output: nn.Module | None = None) -> Network:
    """An MLP_Block, but for the output activation."""
    modules = list(plain(plain(block, path).mlp, path))
    return read_network(modules[:-1] if output is not None and modules[-1] is output else modules, path)


class _Inputs:
    """The MLP's inputs in an order of their own: numbers before what they are multiplied with, histories together."""

    def __init__(self, network: Network, widths: Sequence[tuple[str, int]], b: Builder):
        self.network, self.b, self.kept = network, b, []
        first = network.hidden[0].weight
        if first.size(1) != sum(width for _, width in widths):
            raise NotServed(f"freeze: the MLP takes {first.size(1)} inputs, its features have {dict(widths)}")
        blocks = first.split([width for _, width in widths], 1)
        self.blocks = {name: block for (name, _), block in zip(widths, blocks)}

    def take(self, name: str) -> int:
        """The column where this input begins."""
        return self._keep(self.blocks[name])

    def take_number(self, name: str, vector: Tensor) -> int:
        return self._keep(self.blocks[name] @ vector.to(self.blocks[name].dtype)[:, None])

    def _keep(self, block: Tensor) -> int:
        self.kept.append(block)
        return self.b.columns(block.size(1))

    def done(self) -> None:
        first, *rest = self.network.hidden
        self.b.mlp(self.network._replace(hidden=[first._replace(weight=torch.cat(self.kept, 1)), *rest]))


def _add_fields(fields: _Fields, inputs: _Inputs, features: Iterable[str], fm: bool, b: Builder) -> dict[str, int]:
    """The lookups of these features, by their names, and their numbers."""
    found = {}
    for feature in features:
        if fields.is_lookup(feature):
            found[feature] = fields.add(feature, column=inputs.take(feature), fm=fm)
            continue
        vector = fields.vector(feature)
        b.numbers(feature, 1, inputs.take_number(feature, vector), field=vector if fm else None)
    return found


def _deepfm(model: nn.Module, b: Builder) -> float:
    fm = plain(model.fm, "fm")
    plain(fm.fm_layer, "fm.fm_layer")
    lr = plain(fm.lr_layer, "fm.lr_layer")
    fields = _Fields(model, model.embedding_layer, "embedding_layer", b)
    weights = _Fields(model, lr.embedding_layer, "fm.lr_layer.embedding_layer", b)
    inputs = _Inputs(_network(model.mlp, "mlp"), [(f, fields.width(f)) for f in fields], b)
    _add_fields(fields, inputs, fields, True, b)
    one = b.floats(torch.ones(1))
    for feature in weights:
        if weights.is_lookup(feature):
            weights.add(feature, weight=one)
        else:
            b.numbers(feature, 1, weight=b.floats(weights.vector(feature)))
    inputs.done()
    return 0.0 if lr.bias is None else float(lr.bias)


def _names(fields: str | Sequence[str]) -> list[str]:
    return [fields] if isinstance(fields, str) else list(fields)


def _din(model: nn.Module, b: Builder) -> float:
    fields = _Fields(model, model.embedding_layer, "embedding_layer", b)
    network = _network(model.dnn, "dnn", model.output_activation)
    inputs = _Inputs(network, [(f, fields.width(f)) for f in fields], b)
    pairs = [(_names(t), _names(s)) for t, s in zip(model.din_target_field, model.din_sequence_field)]
    histories = [f for _, sequences in pairs for f in sequences]
    lookups = _add_fields(fields, inputs, (f for f in fields if f not in histories), False, b)
    for i, (targets, sequences) in enumerate(pairs):
        first = [inputs.take(f) for f in sequences][0]
        found = [fields.history(f) for f in sequences]
        _attention(model.attention_layers[i], f"attention_layers.{i}", found, [lookups[t] for t in targets], first, b)
    inputs.done()
    return 0.0


def _long_din(model: nn.Module, b: Builder) -> float:
    """LongCTR's: the history of an item's feature has the feature's name and ``_history``, and 0 where it is padded."""
    fields = _Fields(model, model.embedding_layer, "embedding_layer", b)
    items = [f for f in fields if fields.specs[f].get("source") == "item"]
    context = [f for f in fields if f not in items]
    widths = [(f, fields.width(f)) for f in [*context, *items]]
    histories = [(f"{f}_history", fields.width(f)) for f in items]
    network = _network(model.dnn, "dnn", model.output_activation)
    inputs = _Inputs(network, [*widths, *histories], b)
    lookups = _add_fields(fields, inputs, [*context, *items], False, b)
    first = [inputs.take(name) for name, _ in histories][0]
    found = [fields.history(f, name) for f, (name, _) in zip(items, histories)]
    _attention(model.attention_layers, "attention_layers", found, [lookups[f] for f in items], first, b)
    inputs.done()
    return 0.0


def _attention(
    unit: nn.Module, path: str, histories: Sequence[int], targets: Sequence[int], column: int, b: Builder
) -> None:  # fmt: skip
    plain(unit, path)
    b.attention(
        _network(unit.attention_layer, f"{path}.attention_layer"), histories, targets, column, masked=True,
        use_softmax=unit.use_softmax, count_padding=True,
    )  # fmt: skip


def check(model: nn.Module, b: Builder, plan: Plan, weights: Tensor) -> None:
    """Raises NotServed unless what was built, with the model's own tables, scores random samples as ``model`` does."""
    tables = [weight.cpu().float().contiguous() for weight in b.sources]
    plan = plan._replace(tables=tuple(table._replace(bits=32) for table in plan.tables))
    frozen = FrozenModel(b.inputs, tables, weights, plan.encode())
    x, features, generator = {}, model.feature_map.features, torch.Generator().manual_seed(0)
    for name, kind in frozen.inputs.items():
        shape = (_SAMPLES, _LENGTH) if kind in ("sequence", "history") else (_SAMPLES,)
        if kind == "numbers":
            x[name] = torch.randn(shape, generator=generator)
            continue
        rows = features[name if name in features else name.removesuffix("_history")]["vocab_size"]
        x[name] = torch.randint(0, rows, shape, generator=generator)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        expected = model(_batch(model, x))["y_pred"].flatten().cpu().float()
    finally:
        for module in was_training:
            module.training = True
    if not torch.allclose(frozen(x), expected, rtol=1e-4, atol=1e-5):
        raise NotServed(
            f"freeze: {type(model).__name__}.forward computes something else than FuxiCTR's model with these layers"
        )


def _batch(model: nn.Module, x: Mapping[str, Tensor]) -> object:
    """What the model's loader gives."""
    if not hasattr(model, "item_info_dim"):
        return dict(x)
    items = [f for f in x if f"{f}_history" in x]
    with_target = {f: torch.cat([x[f"{f}_history"], x[f][:, None]], 1).flatten() for f in items}
    mask = (x[f"{items[0]}_history"] != 0).float()
    return {f: v for f, v in x.items() if f in model.feature_map.features and f not in items}, with_target, mask
