"""FuxiCTR models with batches: those of its model zoo that are no part of the package, in a few lines of its layers,
and what its data loaders would give. Imports FuxiCTR."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import (
    DIN_Attention,
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    InnerProductInteraction,
    LogisticRegression,
    MLP_Block,
)
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

#: What FuxiCTR's configuration files say of every model.
SETTINGS = {"optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC", "logloss"], "verbose": 0}


def feature_map(specs: Mapping[str, dict], D: int, folder: str = ".") -> FeatureMap:
    """A map of the features ``specs``, {name: specification}, and the label "label"."""
    features = FeatureMap("generated", folder)
    features.features = OrderedDict((name, {"source": "", **spec}) for name, spec in specs.items())
    features.labels, features.default_emb_dim = ["label"], D
    features.num_fields = features.get_num_fields()
    return features


class _Model(BaseModel):
    """What all have in common: the end of their construction, and the sigmoid."""

    def __init__(self, feature_map: FeatureMap, learning_rate: float = 1e-3, **settings):
        super().__init__(feature_map, **{"model_root": feature_map.data_dir, **SETTINGS, **settings})
        self.learning_rate = learning_rate

    def finish(self) -> None:
        self.compile(SETTINGS["optimizer"], SETTINGS["loss"], self.learning_rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"y_pred": self.output_activation(self.logits(self.get_inputs(inputs)))}


class DeepFM(_Model):
    """FactorizationMachine and MLP_Block over the fields."""

    def __init__(self, feature_map: FeatureMap, D: int, mlp: Mapping, **settings):
        super().__init__(feature_map, model_id="DeepFM", **settings)
        self.embedding_layer = FeatureEmbedding(feature_map, D)
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(feature_map.sum_emb_out_dim(), output_dim=1, **mlp)
        self.finish()

    def logits(self, X: Mapping[str, Tensor]) -> Tensor:
        fields = self.embedding_layer(X)
        return self.fm(X, fields) + self.mlp(fields.flatten(1))


class NFM(_Model):
    """LogisticRegression, and MLP_Block over the fields' bi-interaction."""

    def __init__(self, feature_map: FeatureMap, D: int, mlp: Mapping, **settings):
        super().__init__(feature_map, model_id="NFM", **settings)
        self.embedding_layer = FeatureEmbedding(feature_map, D)
        self.lr_layer = LogisticRegression(feature_map, use_bias=False)
        self.bi_pooling_layer = InnerProductInteraction(feature_map.num_fields, output="bi_interaction")
        self.dnn = MLP_Block(D, output_dim=1, **mlp)
        self.finish()

    def logits(self, X: Mapping[str, Tensor]) -> Tensor:
        return self.lr_layer(X) + self.dnn(self.bi_pooling_layer(self.embedding_layer(X)))


class DIN(_Model):
    """DIN_Attention of each field or tuple of target fields over its sequences, MLP_Block over all fields."""

    def __init__(
        self,
        feature_map: FeatureMap,
        D: int,
        targets: Sequence[str | tuple[str, ...]],
        sequences: Sequence[str | tuple[str, ...]],
        attention: Mapping,
        mlp: Mapping,
        **settings,
    ):
        super().__init__(feature_map, model_id="DIN", **settings)
        self.din_target_field, self.din_sequence_field, self.width = targets, sequences, D
        self.embedding_layer = FeatureEmbeddingDict(feature_map, D)
        self.attention_layers = nn.ModuleList(DIN_Attention(D * len(_all(target)), **attention) for target in targets)
        self.dnn = MLP_Block(feature_map.sum_emb_out_dim(), output_dim=1, **mlp)
        self.finish()

    def logits(self, X: Mapping[str, Tensor]) -> Tensor:
        found = self.embedding_layer(X)
        for attention, target, sequence in zip(self.attention_layers, self.din_target_field, self.din_sequence_field):
            sequence = _all(sequence)
            history = torch.cat([found[f] for f in sequence], dim=-1)
            mask = X[sequence[0]].long() != 0
            pooled = attention(torch.cat([found[f] for f in _all(target)], dim=-1), history, mask)
            found.update(zip(sequence, pooled.split(self.width, dim=-1)))
        return self.dnn(self.embedding_layer.dict2tensor(found, flatten_emb=True))


def _all(fields: str | tuple[str, ...]) -> tuple[str, ...]:
    return (fields,) if isinstance(fields, str) else fields


def history_ids(B: int, L: int, rows: int, shortest: int = 0) -> Tensor:
    """Ids [B, L] of histories of ``shortest`` to L items, padded at the front with 0, as FuxiCTR's loader does."""
    lengths = torch.randint(shortest, L + 1, (B, 1))
    return torch.randint(1, rows, (B, L)) * (torch.arange(L) >= L - lengths)


def long_batch(
    specs: Mapping[str, dict], B: int, L: int, shortest: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A batch of LongCTR's loader: the features of no item, those of the items [B (L + 1)] with the target last, and
    the mask [B, L]."""
    others = {f: torch.randint(1, s["vocab_size"], (B,)) for f, s in specs.items() if s.get("source") != "item"}
    others["label"] = torch.randint(0, 2, (B,)).double()
    items = {f: s["vocab_size"] for f, s in specs.items() if s.get("source") == "item"}
    mask = history_ids(B, L, 2, shortest)
    with_target = torch.cat([mask, mask.new_ones(B, 1)], 1)
    ids = {f: (torch.randint(1, rows, (B, L + 1)) * with_target).flatten() for f, rows in items.items()}
    return others, ids, mask.float()
