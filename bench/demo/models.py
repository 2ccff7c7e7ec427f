"""DeepFM, DIN and its base model for the fields of a data set, from the classes of torch-rechub or from ours."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch

EMBED_DIM = 16
#: Embeddings start from N(0, 0.05²). The libraries' default, 1e-4, leaves the first layer with outputs that differ by
#: a few roundings of its bias, which BatchNorm then blows up: not even two runs with 1 and 2 threads stay together.
EMBEDDING_STD = 0.05
#: Of every MLP, as in DIN's own. It is smooth: where a rounding carries a unit over ReLU's kink, the gradient of its
#: sample jumps, and Adam makes a full step of that. ReLU losses part by 1e-4 and more, whoever computes them.
ACTIVATION = "dice"
#: Where each library keeps its models, features and initializers, under the same names.
LIBRARIES = {
    "torch-rechub": (
        "torch_rechub.models.ranking",
        "torch_rechub.basic.features",
        "torch_rechub.basic.initializers",
        "bench.demo.base_model",
    ),
    "rankkernels": ("rankkernels",),
}
CLASSES = "DeepFM", "DIN", "EmbeddingMLP", "SparseFeature", "SequenceFeature", "DenseFeature", "RandomNormal"


@dataclass
class Field:
    """An input of a model, independent of the library that turns it into a feature.

    ``kind`` is ``sparse`` (ids [N]), ``multi`` (ids [N, L], mean-pooled), ``history`` (ids [N, L], pooled by DIN's
    attention against the ``target`` field it shares its table with, by the base model to their mean), ``target`` (ids
    [N]) or ``dense`` (values [N]).
    With ``padded``, id 0 is padding.
    """

    name: str
    kind: str
    vocab_size: int = 0
    shared_with: str | None = None
    padded: bool = False


def classes(library: str) -> SimpleNamespace:
    """The models, features and the initializer of a library."""
    modules = [importlib.import_module(name) for name in LIBRARIES[library]]
    return SimpleNamespace(**{name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in CLASSES})


def build_model(lib: SimpleNamespace, model: str, fields: list[Field]) -> torch.nn.Module:
    """The model for ``fields`` from the classes of either library."""

    def feature(field: Field):
        if field.kind == "dense":
            return lib.DenseFeature(field.name)
        table = dict(
            vocab_size=field.vocab_size,
            embed_dim=EMBED_DIM,
            shared_with=field.shared_with,
            padding_idx=0 if field.padded else None,
            initializer=lib.RandomNormal(0, EMBEDDING_STD),
        )
        if field.kind in ("multi", "history"):
            attended = field.kind == "history" and model == "din"
            return lib.SequenceFeature(field.name, pooling="concat" if attended else "mean", **table)
        return lib.SparseFeature(field.name, **table)

    def features(*kinds):
        return [feature_of[field.name] for field in fields if field.kind in kinds]

    feature_of = {field.name: feature(field) for field in fields}
    if model == "deepfm":
        return lib.DeepFM(
            features("sparse", "multi", "dense"),
            features("sparse", "multi"),
            mlp_params={"dims": [256, 128], "activation": ACTIVATION},
        )
    if model == "base":
        mlp_params = {"dims": [256, 128], "activation": ACTIVATION}
        return lib.EmbeddingMLP(features("history") + features("target") + features("sparse", "multi"), mlp_params)
    return lib.DIN(
        features("sparse", "multi"),
        features("history"),
        features("target"),
        mlp_params={"dims": [256, 128]},
        attention_mlp_params={"dims": [36], "activation": ACTIVATION},
    )
