"""What DeepFM and DIN grew from: factorization machines and FNN, PNN, Wide & Deep, the Embedding & MLP base model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels.models._lists import check_lists, check_one_width, check_pooled, look_up_arranged
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.layers import FM, LR, MLP
from rankkernels.nn.lookup_plan import table_name
from rankkernels.ops import pairwise_dot


class WideDeep(nn.Module):
    """Cheng et al., "Wide & Deep Learning" (2016): linear + MLP, then a sigmoid. torch-rechub's ``WideDeep``.

    Args:
        wide_features: sparse, pooled sequence and dense features of the linear part; their widths may differ.
        deep_features: those of the MLP. Features in both lists are looked up once.
        mlp_params: arguments of ``MLP``: dims, activation, dropout, output_layer.

    Raises:
        TypeError: what is no feature in a list of features.
        ValueError: an empty list, a sequence with ``pooling="concat"``.
    """

    def __init__(self, wide_features: Sequence, deep_features: Sequence, mlp_params: Mapping):
        super().__init__()
        check_lists("WideDeep", wide_features=wide_features, deep_features=deep_features)
        for feature in [*wide_features, *deep_features]:
            check_pooled("WideDeep", feature)
        self.wide_features = wide_features
        self.deep_features = deep_features
        self.wide_dims = sum(f.embed_dim for f in wide_features)
        self.deep_dims = sum(f.embed_dim for f in deep_features)
        self.linear = LR(self.wide_dims)
        self.embedding = EmbeddingLayer([*wide_features, *deep_features])
        self.mlp = MLP(self.deep_dims, **mlp_params)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        lists = self.wide_features, self.deep_features
        wide, deep = look_up_arranged(self.embedding, x, lists, (True, True))
        return torch.sigmoid((self.linear(wide) + self.mlp(deep)).squeeze(1))


class EmbeddingMLP(nn.Module):
    """The Embedding & MLP base model of Zhou et al. (2018), which is DIN without its attention: every feature's
    embedding, histories pooled by sum or mean, side by side into an MLP, then a sigmoid. FuxiCTR's ``DNN``.

    Args:
        features: sparse, pooled sequence and dense features; their widths may differ.
        mlp_params: arguments of ``MLP``: dims, activation, dropout, output_layer.

    Raises:
        TypeError: what is no feature in ``features``.
        ValueError: no features, a sequence with ``pooling="concat"``.
    """

    def __init__(self, features: Sequence, mlp_params: Mapping):
        super().__init__()
        name = type(self).__name__
        check_lists(name, features=features)
        for feature in features:
            check_pooled(name, feature)
        self.features = features
        self.all_dims = sum(f.embed_dim for f in features)
        self.embedding = EmbeddingLayer(features)
        self.mlp = MLP(self.all_dims, **mlp_params)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        return torch.sigmoid(self.mlp(self.embedding(x, self.features, squeeze_dim=True)).squeeze(1))


class FactorizationMachine(nn.Module):
    """Rendle, "Factorization Machines" (2010): linear + FM, then a sigmoid; torch-rechub's ``DeepFM`` without its MLP,
    whose linear part is of the embeddings. What ``FNN.from_fm`` begins with.

    Args:
        fm_features: sparse and pooled sequence features of one width.

    Raises:
        TypeError: what is no feature in ``fm_features``.
        ValueError: no features, a dense one, one with ``pooling="concat"``, widths that differ.
    """

    def __init__(self, fm_features: Sequence):
        super().__init__()
        check_one_width("FactorizationMachine", fm_features=fm_features)
        self.fm_features = fm_features
        self.fm_dims = sum(f.embed_dim for f in fm_features)
        self.linear = LR(self.fm_dims)
        self.fm = FM(reduce_sum=True)
        self.embedding = EmbeddingLayer(fm_features)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L]}, -> click probabilities [B]."""
        fields = self.embedding(x, self.fm_features)
        return torch.sigmoid((self.linear(fields.flatten(1)) + self.fm(fields)).squeeze(1))


class FNN(EmbeddingMLP):
    """Zhang et al., "Deep Learning over Multi-field Categorical Data" (2016): an MLP, of tanh unless another activation
    is given, over embeddings that a factorization machine has learnt.

    Args:
        features: sparse and pooled sequence features.
        mlp_params: arguments of ``MLP``: dims, activation, dropout, output_layer.

    Raises:
        TypeError, ValueError: see ``EmbeddingMLP``.
    """

    def __init__(self, features: Sequence, mlp_params: Mapping):
        super().__init__(features, {"activation": nn.Tanh, **mlp_params})

    @classmethod
    def from_fm(cls, fm: nn.Module, mlp_params: Mapping) -> FNN:
        """An ``FNN`` with copies of the tables that ``fm`` has learnt; they are trained further, and ``fm`` stays as it
        is. ``fm`` has ``fm_features`` and an ``embedding``: a ``FactorizationMachine``, or a ``DeepFM``, ours or
        torch-rechub's. The paper's first-order weights are its linear layer's of these embeddings, and its constant is
        the first layer's bias.

        Raises:
            TypeError: ``fm`` has no ``fm_features`` or no ``embedding``.
        """
        if not hasattr(fm, "fm_features") or not hasattr(fm, "embedding"):
            raise TypeError(f"FNN.from_fm: fm must have fm_features and an embedding, got a {type(fm).__name__}")
        tables, features = fm.embedding.embed_dict, [copy.copy(f) for f in fm.fm_features]
        for feature in features:
            feature.embed = copy.deepcopy(tables[table_name(feature)])  # a feature keeps its table
        weight = features[0].embed.weight
        return cls(features, mlp_params).to(weight.device, weight.dtype)


#: What PNN's second signal is.
PRODUCTS = ("inner", "outer")


class PNN(nn.Module):
    """Qu et al., "Product-based Neural Networks" (2016): embeddings and their products, side by side into an MLP, then
    a sigmoid. With ``product="inner"`` FuxiCTR's ``PNN``.

    Args:
        features: sparse and pooled sequence features of one width D; F of them.
        mlp_params: arguments of ``MLP``: dims, activation, dropout, output_layer.
        product: "inner", <f_i, f_j> of the F (F - 1) / 2 pairs i < j, or "outer", f_i f_j^T.
        superpose: of "outer": the paper's superposition, the D x D matrix s s^T of s = f_1 + .. + f_F, which is the sum
            of all f_i f_j^T. Without it the matrices of the pairs i < j themselves, F (F - 1) / 2 D^2 values.

    Raises:
        TypeError: what is no feature in ``features``.
        ValueError: no features, a dense one, one with ``pooling="concat"``, widths that differ, another ``product``.
    """

    def __init__(self, features: Sequence, mlp_params: Mapping, product: str = "inner", superpose: bool = True):
        super().__init__()
        check_one_width("PNN", features=features)
        if product not in PRODUCTS:
            raise ValueError(f"PNN: product must be one of {', '.join(PRODUCTS)}, got {product!r}")
        self.features, self.product, self.superpose = features, product, superpose
        F, D = len(features), features[0].embed_dim
        pairs = F * (F - 1) // 2
        self.product_dims = pairs if product == "inner" else D * D if superpose else pairs * D * D
        self.embedding = EmbeddingLayer(features)
        self.mlp = MLP(F * D + self.product_dims, **mlp_params)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L]}, -> click probabilities [B]."""
        fields = self.embedding(x, self.features)
        y = self.mlp(torch.cat([fields.flatten(1), self._products(fields)], dim=1))
        return torch.sigmoid(y.squeeze(1))

    def _products(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> [B, product_dims]."""
        if self.product == "inner":
            return pairwise_dot(fields)
        if self.superpose:
            of_sum = fields.sum(1)
            return (of_sum[:, :, None] * of_sum[:, None, :]).flatten(1)
        F = fields.shape[1]
        first, second = torch.triu_indices(F, F, 1, device=fields.device)
        return (fields[:, first, :, None] * fields[:, second, None, :]).flatten(1)
