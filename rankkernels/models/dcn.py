"""Deep & Cross networks: DCN, DCN v2, EDCN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels.models._lists import check_lists, check_pooled
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.interaction import CrossLayer, CrossNetMix, CrossNetV2, CrossNetwork
from rankkernels.nn.layers import LR, MLP


def _check_features(model: str, features: Sequence) -> None:
    check_lists(model, features=features)
    for feature in features:
        check_pooled(model, feature)


class DCN(nn.Module):
    """Wang et al., "Deep & Cross Network" (2017): a cross network beside an MLP, then a linear layer and a sigmoid.
    torch-rechub's ``DCN``.

    Args:
        features: sparse, pooled sequence and dense features; their widths may differ.
        n_cross_layers: layers of the cross network.
        mlp_params: arguments of ``MLP``: dims, activation, dropout; there is no output layer.

    Raises:
        TypeError: what is no feature in ``features``.
        ValueError: no features, a sequence with ``pooling="concat"``.
    """

    def __init__(self, features: Sequence, n_cross_layers: int, mlp_params: Mapping):
        super().__init__()
        _check_features("DCN", features)
        self.features = features
        self.dims = sum(f.embed_dim for f in features)
        self.embedding = EmbeddingLayer(features)
        self.cn = CrossNetwork(self.dims, n_cross_layers)
        self.mlp = MLP(self.dims, output_layer=False, **mlp_params)
        self.linear = LR(self.dims + mlp_params["dims"][-1])

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        embeddings = self.embedding(x, self.features, squeeze_dim=True)
        y = self.linear(torch.cat([self.cn(embeddings), self.mlp(embeddings)], dim=1))
        return torch.sigmoid(y.squeeze(1))


#: How DCN v2's cross network and its MLP are put together.
STRUCTURES = ("crossnet_only", "stacked", "parallel")


class DCNv2(nn.Module):
    """Wang et al., "DCN V2" (2021), then a linear layer and a sigmoid. torch-rechub's ``DCNv2``.

    Args:
        features: sparse, pooled sequence and dense features; their widths may differ.
        n_cross_layers: layers of the cross network.
        mlp_params: arguments of ``MLP``: dims, activation, dropout; there is no output layer.
        model_structure: an MLP beside the cross network ("parallel"), behind it ("stacked"), or none ("crossnet_only").
        use_low_rank_mixture: ``CrossNetMix``, else ``CrossNetV2``.
        low_rank: rank of an expert's matrices.
        num_experts: number of experts.
        **kwargs: ignored, as in torch-rechub.

    Raises:
        TypeError: what is no feature in ``features``.
        ValueError: no features, a sequence with ``pooling="concat"``, another ``model_structure``.
    """

    def __init__(
        self, features: Sequence, n_cross_layers: int, mlp_params: Mapping, model_structure: str = "parallel",
        use_low_rank_mixture: bool = True, low_rank: int = 32, num_experts: int = 4, **kwargs: object,
    ):  # fmt: skip
        super().__init__()
        _check_features("DCNv2", features)
        if model_structure not in STRUCTURES:
            raise ValueError(f"DCNv2: model_structure must be one of {', '.join(STRUCTURES)}, got {model_structure!r}")
        self.features = features
        self.dims = final_dim = sum(f.embed_dim for f in features)
        self.embedding = EmbeddingLayer(features)
        if use_low_rank_mixture:
            self.crossnet = CrossNetMix(self.dims, n_cross_layers, low_rank=low_rank, num_experts=num_experts)
        else:
            self.crossnet = CrossNetV2(self.dims, n_cross_layers)
        self.model_structure = model_structure
        if model_structure == "stacked":
            self.stacked_dnn = MLP(self.dims, output_layer=False, **mlp_params)
            final_dim = mlp_params["dims"][-1]
        if model_structure == "parallel":
            self.parallel_dnn = MLP(self.dims, output_layer=False, **mlp_params)
            final_dim = mlp_params["dims"][-1] + self.dims
        self.linear = LR(final_dim)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        embeddings = self.embedding(x, self.features, squeeze_dim=True)
        out = self.crossnet(embeddings)
        if self.model_structure == "stacked":
            out = self.stacked_dnn(out)
        if self.model_structure == "parallel":
            out = torch.cat([out, self.parallel_dnn(embeddings)], dim=1)
        return torch.sigmoid(self.linear(out).squeeze(1))


#: What joins EDCN's two networks between layers.
BRIDGES = ("hadamard_product", "pointwise_addition", "concatenation", "attention_pooling")


class BridgeModule(nn.Module):
    """EDCN's bridge between two networks' layers, x and h [B, input_dim] -> [B, input_dim]. torch-rechub's
    ``BridgeModule``.

    Args:
        input_dim: width.
        bridge_type: hadamard_product, pointwise_addition, concatenation or attention_pooling.

    Raises:
        ValueError: another ``bridge_type``.
    """

    def __init__(self, input_dim: int, bridge_type: str):
        super().__init__()
        if bridge_type not in BRIDGES:
            raise ValueError(f"EDCN: bridge_type must be one of {', '.join(BRIDGES)}, got {bridge_type!r}")
        self.bridge_type = bridge_type

        def attention() -> nn.Sequential:
            layers = nn.Linear(input_dim, input_dim), nn.ReLU(), nn.Linear(input_dim, input_dim, bias=False)
            return nn.Sequential(*layers, nn.Softmax(dim=-1))

        if bridge_type == "concatenation":
            self.concat_pooling = nn.Sequential(nn.Linear(input_dim * 2, input_dim), nn.ReLU())
        elif bridge_type == "attention_pooling":
            self.attention_x = attention()
            self.attention_h = attention()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self.bridge_type == "hadamard_product":
            return x * h
        if self.bridge_type == "pointwise_addition":
            return x + h
        if self.bridge_type == "concatenation":
            return self.concat_pooling(torch.cat([x, h], dim=-1))
        return self.attention_x(x) * x + self.attention_h(h) * h


class RegulationModule(nn.Module):
    """EDCN's gates of the fields before its two networks, x [B, sum(dims)] -> two of the same. torch-rechub's
    ``RegulationModule``, whose softmax is over each field's single gate, and so 1.

    Args:
        num_fields: number of fields.
        dims: width of each field.
        tau: temperature.
        use_regulation: without it x is returned twice.
    """

    def __init__(self, num_fields: int, dims: Sequence[int], tau: float, use_regulation: bool = True):
        super().__init__()
        self.use_regulation = use_regulation
        if use_regulation:
            self.num_fields = num_fields
            self.dims = dims
            self.tau = tau
            self.g1 = nn.Parameter(torch.ones(num_fields))
            self.g2 = nn.Parameter(torch.ones(num_fields))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.use_regulation:
            return x, x
        field = torch.repeat_interleave(
            torch.tensor(self.dims, device=x.device), output_size=sum(self.dims)
        )  # of each column
        first, second = ((g / self.tau).unsqueeze(1).softmax(1).squeeze(1)[field] for g in (self.g1, self.g2))
        return first * x, second * x


class EDCN(nn.Module):
    """Chen et al., "Enhancing Explicit and Implicit Feature Interactions" (2021): a cross network and an MLP with a
    bridge behind each layer, then a linear layer and a sigmoid. torch-rechub's ``EDCN``.

    Args:
        features: sparse, pooled sequence and dense features; their widths may differ.
        n_cross_layers: layers of both networks.
        mlp_params: arguments of ``MLP``: activation, dropout. A layer's MLP is twice as wide as the input, whatever
            its dims say.
        bridge_type: hadamard_product, pointwise_addition, concatenation or attention_pooling.
        use_regulation_module: whether fields are gated before each layer.
        temperature: of the gates.

    Raises:
        TypeError: what is no feature in ``features``.
        ValueError: no features, a sequence with ``pooling="concat"``, no layers, another ``bridge_type``.
    """

    def __init__(
        self, features: Sequence, n_cross_layers: int, mlp_params: Mapping, bridge_type: str = "hadamard_product",
        use_regulation_module: bool = True, temperature: float = 1,
    ):  # fmt: skip
        super().__init__()
        _check_features("EDCN", features)
        if n_cross_layers < 1:
            raise ValueError(f"EDCN: n_cross_layers must be positive, got {n_cross_layers}")
        self.features = features
        self.n_cross_layers = n_cross_layers
        self.num_fields = len(features)
        self.fea_dims = [f.embed_dim for f in features]
        self.dims = sum(self.fea_dims)
        self.embedding = EmbeddingLayer(features)

        def each(make) -> nn.ModuleList:
            return nn.ModuleList([make() for _ in range(n_cross_layers)])

        regulation = self.num_fields, self.fea_dims, temperature, use_regulation_module
        self.cross_layers = each(lambda: CrossLayer(self.dims))
        self.bridge_modules = each(lambda: BridgeModule(self.dims, bridge_type))
        self.regulation_modules = each(lambda: RegulationModule(*regulation))
        mlp_params = {**mlp_params, "dims": [self.dims, self.dims]}
        self.mlps = each(lambda: MLP(self.dims, output_layer=False, **mlp_params))
        self.linear = LR(self.dims * 3)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        bridged = self.embedding(x, self.features, squeeze_dim=True)
        first = None
        for regulate, cross, mlp, bridge in zip(
            self.regulation_modules, self.cross_layers, self.mlps, self.bridge_modules
        ):
            crossed, deep = regulate(bridged)
            first = crossed if first is None else first
            crossed = crossed + cross(first, crossed)
            deep = mlp(deep)
            bridged = bridge(crossed, deep)
        return torch.sigmoid(self.linear(torch.cat([crossed, deep, bridged], dim=1)).squeeze(1))
