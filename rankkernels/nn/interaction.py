"""Interactions of features beyond FM: cross networks, FFM, bilinear products."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops, reference
from rankkernels.nn._transparency import is_plain, is_untouched, nobody_follows
from rankkernels.ops._tracing import is_tensor, is_traced
from rankkernels.ops.bilinear_interaction import KINDS, bilinear_interaction
from rankkernels.ops.cross_layer import cross_layer, is_faster
from rankkernels.ops.ffm_interaction import ffm_interaction
from rankkernels.ops.linear import linear
from rankkernels.ops.mixed_cross_layer import is_faster as mixed_layer_is_faster
from rankkernels.ops.mixed_cross_layer import mixed_cross_layer
from rankkernels.ops.mixed_experts import is_faster as experts_are_faster
from rankkernels.ops.mixed_experts import mixed_experts


def _weights_of(linears: nn.Module) -> list[Tensor] | None:
    """The weights of a list of linear layers without bias, where nobody could tell that they are not called."""
    if not is_plain(linears, nn.ModuleList) and type(linears) is not nn.Linear or not nobody_follows():
        return None
    modules = linears._modules.values() if type(linears) is nn.ModuleList else [linears]
    if not all(is_untouched(m, nn.Linear) and m._parameters.get("bias") is None for m in modules):
        return None
    return [m._parameters.get("weight") for m in modules]


def _parameters_of(parameters: nn.Module) -> list[Tensor] | None:
    """The entries of a ``ParameterList`` that has nothing but parameters."""
    return list(parameters._parameters.values()) if is_plain(parameters, nn.ParameterList) else None


def _are_like(x: Tensor, *lists: Sequence[Tensor] | None) -> bool:
    """Whether all are there, and plain tensors of the dtype of ``x``."""
    return is_tensor(x) and all(
        tensors is not None and all(is_tensor(t) and t.dtype == x.dtype for t in tensors) for tensors in lists
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by the faster library; compilers follow torch's own."""
    return (F.linear if is_traced() else linear)(x, weight, bias)


def _end_of_layer(x0: Tensor, product: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x0 * product + bias + x, fused where that is faster and all are of one dtype: under autocast products are not."""
    others = [x0, product] if bias is None else [x0, product, bias]
    if x.dim() == 2 and is_faster(x) and is_tensor(x0) and _are_like(x, others):
        return cross_layer(x0, product, x, bias)
    return x0 * product + x if bias is None else x0 * product + bias + x


class CrossNetwork(nn.Module):
    """DCN's cross network, x_{l+1} = x_0 (w_l . x_l) + b_l + x_l: x [B, input_dim] -> [B, input_dim].

    torch-rechub's ``CrossNetwork``, weights in ``w`` and biases in ``b``; more dimensions before the last are welcome.
    All layers are one op: see ``rankkernels.cross_network``.

    Args:
        input_dim: width of the input.
        num_layers: number of layers.
    """

    def __init__(self, input_dim: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        self.w = nn.ModuleList([nn.Linear(input_dim, 1, bias=False) for _ in range(num_layers)])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros((input_dim,))) for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = _weights_of(self.w), _parameters_of(self.b)
        if not _are_like(x, weights, biases) or not len(weights) == len(biases) == self.num_layers:
            x0 = x
            for i in range(self.num_layers):
                x = x0 * self.w[i](x) + self.b[i] + x
            return x
        if x.dim() == 2:
            return ops.cross_network(x, weights, biases)
        return ops.cross_network(x.reshape(-1, x.shape[-1]), weights, biases).view(x.shape)


class CrossLayer(nn.Module):
    """A layer of a cross network without what it adds to, x_0 (w . x_i) + b: two [B, input_dim] -> the same.

    torch-rechub's ``CrossLayer``.

    Args:
        input_dim: width of the inputs.
    """

    def __init__(self, input_dim: int):
        super().__init__()
        self.w = nn.Linear(input_dim, 1, bias=False)
        self.b = nn.Parameter(torch.zeros(input_dim))

    def forward(self, x_0: Tensor, x_i: Tensor) -> Tensor:
        return torch.addcmul(self.b, self.w(x_i), x_0)


class CrossNetV2(nn.Module):
    """DCN v2's cross network with full matrices, x_{l+1} = x_0 * (W_l x_l) + b_l + x_l: x [B, input_dim] -> the same.

    torch-rechub's ``CrossNetV2``, weights in ``w`` and biases in ``b``, which are outside the product with x_0. What
    follows a layer's GEMM is one pass.

    Args:
        input_dim: width of the input.
        num_layers: number of layers.
    """

    def __init__(self, input_dim: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        self.w = nn.ModuleList([nn.Linear(input_dim, input_dim, bias=False) for _ in range(num_layers)])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros((input_dim,))) for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        weights, x0 = _weights_of(self.w), x
        for i in range(self.num_layers):
            x = _end_of_layer(x0, self.w[i](x) if weights is None else _product(x, weights[i]), x, self.b[i])
        return x


class CrossNetMix(nn.Module):
    """DCN v2's cross network as a mixture of low-rank experts: x [B, input_dim] -> [B, input_dim].

    torch-rechub's ``CrossNetMix``, which has ``u_list``, ``v_list``, ``c_list``, ``bias`` and ``gating``, but here a
    batch of one keeps its dimension. The gates of a layer sum to 1, so that x_0 and the bias stand before the sum over
    the experts, and a layer is two wide products, of all experts' V and the gates, and of all their U, with one op
    between them and one behind; or all of it is one op, in float32 and float64 on a CPU.

    Args:
        input_dim: width of the input.
        num_layers: number of layers.
        low_rank: rank of an expert's matrices.
        num_experts: number of experts.

    Raises:
        ValueError: ``x`` has not two dimensions.
    """

    def __init__(self, input_dim: int, num_layers: int = 2, low_rank: int = 32, num_experts: int = 4):
        super().__init__()
        self.num_layers = num_layers
        self.num_experts = num_experts

        def parameters(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(
                [nn.Parameter(nn.init.xavier_normal_(torch.empty(num_experts, *shape))) for _ in range(num_layers)]
            )

        self.u_list = parameters(input_dim, low_rank)
        self.v_list = parameters(input_dim, low_rank)
        self.c_list = parameters(low_rank, low_rank)
        self.gating = nn.ModuleList([nn.Linear(input_dim, 1, bias=False) for _ in range(num_experts)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(input_dim, 1)) for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"CrossNetMix: x must be [B, {self.gating[0].in_features}], got shape {list(x.shape)}")
        gates, x0 = _weights_of(self.gating), x
        if (lists := self._of_one_op(x, gates)) is not None:
            joined = torch.cat(gates)
            for u, v, c, bias in zip(*lists):
                x = mixed_cross_layer(x0, x, u, v, c, joined, bias.squeeze(1))
            return x
        for i in range(self.num_layers):
            x = _end_of_layer(x0, self._mixed(x, i, gates), x)
        return x

    def _of_one_op(self, x: Tensor, gates: Sequence[Tensor] | None) -> list[Sequence[Tensor]] | None:
        """All layers' u, v, c and biases, where ``mixed_cross_layer`` takes them and is the faster way, else None."""
        if not mixed_layer_is_faster(x):
            return None
        lists = [_parameters_of(p) for p in (self.u_list, self.v_list, self.c_list, self.bias)]
        if not _are_like(x, gates, *lists) or len({self.num_layers, *map(len, lists)}) > 1:
            return None
        return lists if all(b.shape == (x.shape[1], 1) for b in lists[3]) else None

    def _mixed(self, x: Tensor, i: int, gates: Sequence[Tensor] | None) -> Tensor:
        """The experts' sum by the gates and the bias, [B, D], of layer ``i``."""
        u, v, c = self.u_list[i], self.v_list[i], self.c_list[i]
        v = v.transpose(1, 2).flatten(0, 1)  # [E r, D]
        if gates is None:
            projections = torch.cat([_product(x, v), *(gate(x) for gate in self.gating)], 1)
        else:
            projections = _product(x, torch.cat([v, *gates]))
        c = c.to(projections.dtype)  # under autocast products are of another
        fused = _are_like(projections, [c]) and experts_are_faster(projections, c)
        mixed = mixed_experts if fused else reference.mixed_experts
        return _product(mixed(projections, c), u.transpose(0, 1).flatten(1), self.bias[i].squeeze(1))


class FFM(nn.Module):
    """Field-aware second-order interactions: x [B, F, F, D] -> [B, F (F - 1) / 2, 1], or D without ``reduce_sum``.

    torch-rechub's ``FFM``. No parameters. x[:, f, g] is field f's embedding for field g.

    Args:
        num_fields: F.
        reduce_sum: sum over D.
    """

    def __init__(self, num_fields: int, reduce_sum: bool = True):
        super().__init__()
        self.num_fields = num_fields
        self.reduce_sum = reduce_sum

    def forward(self, x: Tensor) -> Tensor:
        n = self.num_fields
        return ffm_interaction(x if x.shape[1:3] == (n, n) else x[:, :n, :n], self.reduce_sum)


class BiLinearInteractionLayer(nn.Module):
    """FiBiNET's bilinear interaction, (W x_f) * x_g of the fields f < g: x [B, F, D] -> [B, F (F - 1) / 2, D].

    torch-rechub's ``BiLinearInteractionLayer``, weights in ``bilinear_layer``.

    Args:
        input_dim: D.
        num_fields: F.
        bilinear_type: field_all, one W; field_each, one a field; field_interaction, one a pair.

    Raises:
        NotImplementedError: another ``bilinear_type``.
    """

    def __init__(self, input_dim: int, num_fields: int, bilinear_type: str = "field_interaction"):
        super().__init__()
        self.bilinear_type = bilinear_type
        if bilinear_type not in KINDS:
            raise NotImplementedError(
                f"BiLinearInteractionLayer: unknown bilinear_type {bilinear_type!r}, expected one of {', '.join(KINDS)}"
            )
        if bilinear_type == "field_all":
            self.bilinear_layer = nn.Linear(input_dim, input_dim, bias=False)
        else:
            n = num_fields if bilinear_type == "field_each" else num_fields * (num_fields - 1) // 2
            self.bilinear_layer = nn.ModuleList([nn.Linear(input_dim, input_dim, bias=False) for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        weights = _weights_of(self.bilinear_layer)
        if x.dim() == 3 and _are_like(x, weights):
            if self.bilinear_type == "field_each":
                weights = weights[: x.shape[1] - 1]  # the last field is the first of no pair
            return bilinear_interaction(x, weights, self.bilinear_type)
        fields, layers = x.split(1, 1), self.bilinear_layer
        of_pair = {
            "field_all": lambda f, pair: layers,
            "field_each": lambda f, pair: layers[f],
            "field_interaction": lambda f, pair: layers[pair],
        }[self.bilinear_type]
        return torch.cat(
            [of_pair(f, p)(fields[f]) * fields[g] for p, (f, g) in enumerate(combinations(range(len(fields)), 2))], 1
        )
