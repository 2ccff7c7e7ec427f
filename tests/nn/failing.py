"""What fails on purpose."""

from __future__ import annotations

import torch


class Fails(torch.autograd.Function):
    """A copy whose gradient does not come."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("on the way back")
