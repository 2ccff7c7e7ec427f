"""The gradient of a linear layer's weight, dW = dy^T x. Kernel: csrc/cpu/dense/linear_weight_grad_kernel.h."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels.ops._autograd import register_autograd
from rankkernels.ops._checks import check_strided
from rankkernels.ops._library import define, lib

define("linear_weight_grad(Tensor dy, Tensor x) -> Tensor")


def _check(dy, x):
    check, op = torch._check, "linear_weight_grad"
    for name, t in (("dy", dy), ("x", x)):
        check(t.dim() == 2, lambda: f"{op}: {name} must have 2 dimensions, got {t.dim()} (shape {list(t.shape)})")
        check(t.dtype == torch.float32, lambda: f"{op}: {name} must be torch.float32, got {t.dtype}")
    check(x.size(0) == dy.size(0), lambda: f"{op}: x must have the rows of dy, {dy.size(0)}, got {x.size(0)}")
    check(x.device == dy.device, lambda: f"{op}: x must be on {dy.device} like dy, got {x.device}")


@torch.library.register_fake("rankkernels::linear_weight_grad", lib=lib)
def _(dy, x):
    _check(dy, x)
    return x.new_empty(dy.size(1), x.size(1))


@torch.library.impl(lib, "linear_weight_grad", "CompositeExplicitAutograd")
def _default(dy, x):
    check_strided("linear_weight_grad", (dy, x))
    _check(dy, x)
    return dy.t() @ x


def _backward(ctx, grad):
    dy, x = ctx.saved_tensors
    return x @ grad.t(), dy @ grad


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


register_autograd("linear_weight_grad", _default, _backward, _setup_context)


def linear_weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x of dy [N, M] and x [N, K] -> [M, K]; float32 on the CPU, any strides. Raises RuntimeError for others."""
    return torch.ops.rankkernels.linear_weight_grad.default(dy, x)
