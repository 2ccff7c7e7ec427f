"""The Embedding & MLP base model of torch-rechub's layers: it has no class of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch_rechub.basic.layers import MLP, EmbeddingLayer


class EmbeddingMLP(nn.Module):
    """As ours, in its lines."""

    def __init__(self, features: Sequence, mlp_params: Mapping):
        super().__init__()
        self.features = features
        self.embedding = EmbeddingLayer(features)
        self.mlp = MLP(sum(f.embed_dim for f in features), **mlp_params)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.sigmoid(self.mlp(self.embedding(x, self.features, squeeze_dim=True)).squeeze(1))
