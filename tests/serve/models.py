"""Models with statistics and embeddings that matter, and requests to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankkernels as rk

R = 40


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, 0, 0.3), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2), nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 1.5 * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0, 0.5)
    return model.eval()


def deepfm(lib=rk, activation: str = "relu", D: int = 6, dims=(9, 5), **options) -> nn.Module:
    """User and item fields, a pooled sequence of each, numbers, and fields of one part alone."""
    age, item = lib.SparseFeature("age", R, D), lib.SparseFeature("item", R, D, **options)
    liked = lib.SequenceFeature("liked", R, D, pooling="mean", shared_with="item", padding_idx=0)
    tags = lib.SequenceFeature("tags", R, D, pooling="sum", padding_idx=2)
    wide = lib.SparseFeature("wide", R, 3)
    numbers = [lib.DenseFeature("price"), lib.DenseFeature("profile", 3)]
    deep = [age, numbers[0], item, wide, liked, tags, numbers[1]]
    only_fm = lib.SparseFeature("only_fm", R, D)
    model = lib.DeepFM(deep, [item, tags, age, only_fm], {"dims": list(dims), "activation": activation})
    return randomized(model)


def din(lib=rk, activation: str = "dice", D: int = 8, attention=(7,), dims=(9, 5), use_softmax=False, **options):
    """Two histories; the first has padding."""
    targets = [lib.SparseFeature("item", R, D), lib.SparseFeature("shop", R, 4)]
    histories = [
        lib.SequenceFeature("items", R, D, pooling="concat", shared_with="item", padding_idx=0),
        lib.SequenceFeature("shops", R, 4, pooling="concat", shared_with="shop", padding_idx=0),
    ]
    features = [lib.SparseFeature("age", R, 5), lib.SparseFeature("hour", R, D)]
    unit = {"dims": list(attention), "activation": activation, "use_softmax": use_softmax}
    return randomized(lib.DIN(features, histories, targets, {"dims": list(dims)}, unit, **options))


#: Whose each feature is.
USER = {"age", "liked", "profile", "items", "shops", "hour"}


def request(model: nn.Module, C: int, L: int = 6, rows: int = R) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One user's features, and those of ``C`` candidates."""
    user, candidates = {}, {}
    for feature in model.embedding.features:
        n = 1 if feature.name in USER else C
        if not hasattr(feature, "vocab_size"):
            value = torch.randn(n, feature.embed_dim).squeeze(1)
        elif hasattr(feature, "pooling"):
            value = torch.randint(0, rows, (n, L)) * (torch.rand(n, L) < 0.7)
        else:
            value = torch.randint(0, rows, (n,))
        (user if n == 1 and feature.name in USER else candidates)[feature.name] = value
    return user, candidates


def batch(user: dict[str, Tensor], candidates: dict[str, Tensor]) -> dict[str, Tensor]:
    C = len(next(iter(candidates.values())))
    return {n: v.expand(C, *v.shape[1:]) for n, v in user.items()} | candidates
