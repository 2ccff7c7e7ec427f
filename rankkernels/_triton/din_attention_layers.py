"""The hidden layers of DIN attention as its Triton kernels take them: each normalization folded into a product.

A normalization is an affine map once its mean m and variance are known, r = (variance + eps)^-1/2. In eval a product
gives y = gamma (z - m) r + beta, and a Dice's v = v_scale y + v_shift. In training m and r are those of the batch's
valid rows; a product gives x = (z - m) r, and y = y_scale x + y_shift, v = v_scale x + v_shift. There

    G = dL/dx = y_scale dy + v_scale dv - u - w x,    dz = r G

with u and w the means over rows of what is normalized and of its product with x. A layer with both a normalization and
Dice's has y = gamma x + beta, so Dice's statistics follow: mean beta, variance gamma^2 var / (var + eps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.reference import Hidden


class Layer(NamedTuple):
    """A hidden layer as the kernels take it, in float32: its weight [H, in] and bias [H] with the normalization folded
    into them, its ``vectors``; in training ``r`` and the variance that were folded."""

    weight: Tensor
    bias: Tensor
    vectors: dict[str, Tensor]
    r: Tensor | None = None
    var: Tensor | None = None


def plain(hidden: Hidden) -> Layer:
    """Without a normalization."""
    bias = hidden.bias.float()
    vectors = {} if hidden.alpha is None else {"alpha": hidden.alpha.float().expand(bias.numel())}
    return Layer(hidden.weight.float(), bias, vectors)


def folded(hidden: Hidden) -> Layer:
    """In eval: y = gamma r z + (beta - gamma r mean)."""
    weight, bias, vectors, *_ = plain(hidden)
    norm, dice = hidden.norm, hidden.dice_norm
    if norm is not None:
        s = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
        weight, bias = weight * s[:, None], (bias - norm.running_mean) * s + norm.bias
    if dice is not None:
        s = dice.weight.float() * torch.rsqrt(dice.running_var.float() + dice.eps)
        vectors |= {"v_scale": s, "v_shift": dice.bias - dice.running_mean * s}
    return Layer(weight, bias, vectors)


def normalized(hidden: Hidden, mean: Tensor, var: Tensor) -> Layer:
    """In training: the product gives x = r (z - mean)."""
    weight, bias, vectors, *_ = plain(hidden)
    norm, dice = hidden.norm, hidden.dice_norm
    r = torch.rsqrt(var + (dice if norm is None else norm).eps)
    if norm is not None:
        vectors |= {"y_scale": norm.weight.float(), "y_shift": norm.bias.float()}
    else:
        vectors |= {"y_scale": 1 / r, "y_shift": mean}
    if dice is not None:
        scale = dice.weight.float()
        if norm is not None:
            scale = scale * norm.weight * torch.rsqrt((norm.weight * r) ** 2 * var + dice.eps)
        vectors |= {"v_scale": scale, "v_shift": dice.bias.float()}
    return Layer(weight * r[:, None], (bias - mean) * r, vectors, r, var)


def unfolded(hidden: Hidden, grad_weight: Tensor, grad_bias: Tensor, sums: Sequence[Tensor]) -> list[Tensor]:
    """In eval: gradients of the parameters of ``hidden``, in the order of the op's ``params``."""
    norm, dice, grads = hidden.norm, hidden.dice_norm, []
    grad_alpha, _, _, of_v, of_vx = sums
    if norm is not None:
        r = torch.rsqrt(norm.running_var.float() + norm.eps)
        s = norm.weight * r
        grad_s = (grad_weight * hidden.weight).sum(1) + grad_bias * (hidden.bias - norm.running_mean)
        grads += [grad_s * r, grad_bias]
        grad_weight, grad_bias = grad_weight * s[:, None], grad_bias * s
    if hidden.alpha is not None:
        grads.append(grad_alpha.sum(0, keepdim=True) if hidden.alpha.numel() == 1 else grad_alpha)
    if dice is not None:
        grads += [(of_vx - dice.running_mean * of_v) * torch.rsqrt(dice.running_var.float() + dice.eps), of_v]
    return [grad_weight, grad_bias, *grads]


def means(hidden: Hidden, layer: Layer, sums: Tensor, n: Tensor | int) -> tuple[Tensor, list[Tensor]]:
    """In training: u and w [2, H], and gradients of the normalizations' parameters and alpha, as in ``params``."""
    grad_alpha, of_y, of_yx, of_v, of_vx = sums
    norm, dice, grads = hidden.norm, hidden.dice_norm, []
    if dice is not None:
        grads = [of_vx, of_v]
    if norm is None:
        u, w = dice.weight * of_v, dice.weight * of_vx
    else:
        if dice is not None:
            # v = beta' + gamma' n, n = s x with s = gamma r', r' = (gamma^2 q + eps')^-1/2 and q = var r^2, the mean of
            # x^2: dL/dy = dy + gamma' r' (dv - mean(dv) - n mean(dv n))
            q = layer.var * layer.r**2
            dice_r = torch.rsqrt(norm.weight**2 * q + dice.eps)
            s, k = norm.weight * dice_r, dice.weight * dice_r
            grads = [s * of_vx, of_v]
            of_yx = of_yx + k * of_vx * (1 - s**2 * q)
            u, w = norm.weight * (of_y + k * of_v), norm.weight * (of_yx + k * s**2 * of_vx)
        else:
            u, w = norm.weight * of_y, norm.weight * of_yx
    if hidden.alpha is not None:
        grads.insert(0, grad_alpha.sum(0, keepdim=True) if hidden.alpha.numel() == 1 else grad_alpha)
    if norm is not None:
        grads = [of_yx, of_y, *grads]
    return torch.stack([u / n, w / n]), grads
