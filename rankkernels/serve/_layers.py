"""Hidden layers of any library, read for inference: normalizations folded into the products before them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankkernels.adoption import _adapters, _said
from rankkernels.nn._transparency import is_untouched
from rankkernels.nn.layers import BatchNormDice, Dice
from rankkernels.ops._rank_plan import DICE, DICE_BATCH_NORM, LEAKY, RELU, SIGMOID


class NotServed(ValueError):
    """``freeze`` has no way to compute what a model does; the text names the module or the feature."""


class Hidden(NamedTuple):
    """W x + b and an activation, in float64; vectors are [out]."""

    weight: Tensor
    bias: Tensor
    activation: int
    alpha: Tensor | None = None
    v_scale: Tensor | None = None
    v_shift: Tensor | None = None
    epsilon: float = 0.0


class Network(NamedTuple):
    """Hidden layers, at least one, and the output layer's weight [H] and bias."""

    hidden: list[Hidden]
    out_weight: Tensor
    out_bias: float


def kind_of(module: nn.Module) -> type:
    """The class that says what a module computes: ours, where ``accelerate`` gives it one."""
    _, ours = _said(module, module, _adapters())
    return ours if isinstance(ours, type) else type(module)


def plain(module: nn.Module, path: str) -> nn.Module:
    """``module``, if calling it is nothing but its class's forward."""
    if not is_untouched(module, type(module)):
        raise NotServed(f"freeze: {path} has a hook or a forward of its own: {module!r}")
    return module


def read_network(modules: Iterable[nn.Module], path: str) -> Network:
    """Linear layers, each with what follows it, the last one with one unit and nothing behind it; a normalization may
    stand before the first."""
    found: list[tuple[nn.Linear, list[nn.Module]]] = []
    norm = None
    for module in modules:
        plain(module, path)
        if type(module) is nn.Linear:
            found.append((module, []))
        elif not found and norm is None and isinstance(module, nn.BatchNorm1d):
            norm = module
        elif not found:
            raise NotServed(f"freeze: {path} begins with {module!r}, expected nn.Linear")
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            found[-1][1].append(module)
    if not found or found[-1][1] or found[-1][0].out_features != 1:
        raise NotServed(f"freeze: {path} must end with nn.Linear of one unit, got {found[-1] if found else 'nothing'}")
    *layers, (last, _) = found
    weight, bias = _affine(last)
    if layers:
        network = Network([_hidden(*layer, path) for layer in layers], weight[0], float(bias))
    else:
        one = torch.ones(1, dtype=torch.float64)
        network = Network([Hidden(weight, bias, LEAKY, one)], one, 0.0)
    if norm is not None:
        (first, *rest), (scale, shift) = network.hidden, _scale_and_shift(norm, path)
        first = first._replace(weight=first.weight * scale, bias=first.bias + first.weight @ shift)
        network = network._replace(hidden=[first, *rest])
    return network


def _affine(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.detach().cpu().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().cpu().double()
    return weight, bias


def _scale_and_shift(norm: nn.BatchNorm1d, path: str) -> tuple[Tensor, Tensor]:
    """What the normalization is by its running statistics: scale y + shift."""
    if type(norm) is not nn.BatchNorm1d or norm.running_mean is None:
        raise NotServed(f"freeze: {path} has a normalization without running statistics: {norm!r}")
    scale = (norm.running_var.detach().cpu().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu().double()
    shift = -norm.running_mean.detach().cpu().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().cpu().double()


def _hidden(linear: nn.Linear, behind: list[nn.Module], path: str) -> Hidden:
    weight, bias = _affine(linear)
    if behind and isinstance(behind[0], nn.BatchNorm1d):
        scale, shift = _scale_and_shift(behind[0], path)
        weight, bias, behind = weight * scale[:, None], bias * scale + shift, behind[1:]
    if len(behind) > 1:
        raise NotServed(f"freeze: {path} has {behind} behind a linear layer, expected one activation at most")
    return Hidden(weight, bias, *_activation(behind[0] if behind else nn.Identity(), len(weight), path))


def _activation(module: nn.Module, units: int, path: str) -> tuple:
    """Its number, and the parameters that ``Hidden`` has of it."""
    kind = kind_of(module)

    def each(alpha: Tensor | float) -> Tensor:
        return torch.as_tensor(alpha).detach().cpu().double().flatten().expand(units).clone()

    if kind is Dice:
        return DICE, each(module.alpha), None, None, float(module.epsilon)
    if issubclass(kind, BatchNormDice):
        return DICE_BATCH_NORM, each(module.alpha), *_scale_and_shift(module.bn, path)
    if kind is nn.PReLU:
        return LEAKY, each(module.weight)
    if kind is nn.LeakyReLU:
        return LEAKY, each(module.negative_slope)
    if kind is nn.Identity:
        return LEAKY, each(1.0)
    if kind is nn.ReLU:
        return (RELU,)
    if kind is nn.Sigmoid:
        return (SIGMOID,)
    raise NotServed(
        f"freeze: {path} has the activation {module!r}; served are relu, leakyrelu, prelu, sigmoid, none and Dice"
    )
