"""A table under exact Adam, torch's dense optimizer beside it, and what both are trained on."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

import rankkernels as rk


def options_of(kind: str) -> dict:
    return {"weight_decay": 0.1} if kind == "AdamW" else {}


def bag(R: int = 30, D: int = 5, dtype: torch.dtype = torch.float64, sparse: bool = False) -> rk.EmbeddingBag:
    torch.manual_seed(0)
    module = rk.EmbeddingBag(R, D, mode="sum", sparse=sparse).to(dtype)
    return module


def make(kind: str, fused: bool, module: nn.Module | None = None, **options):
    module = bag(sparse=not fused) if module is None else module
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.01, exact=True, **options_of(kind) | options)
    if fused:
        rk.optim.fuse(module, optimizer)
    return module, optimizer


class Dense:
    """torch's dense optimizer on the same table, given the same gradients."""

    def __init__(self, kind: str, module: nn.Module, dtype: torch.dtype = torch.float64, **options):
        self.weight = nn.Parameter(module.weight.detach().to(dtype, copy=True))
        self.optimizer = getattr(torch.optim, kind)([self.weight], lr=0.01, **options_of(kind) | options)

    def step(self, ids: Tensor, grad: Tensor) -> None:
        self.weight.grad = torch.zeros_like(self.weight).index_add(0, ids, grad.to(self.weight.dtype))
        self.optimizer.step()


def draw(step: int, R: int = 30, D: int = 5, B: int = 3, zipf: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    u = torch.rand(B, generator=generator)
    return ((u**4 if zipf else u) * R).long(), torch.randn(B, D, generator=generator, dtype=torch.float64)


def train(module, optimizer, dense, steps, scale: float = 1e-3) -> None:
    for step in steps:
        ids, grad = draw(step)
        module.zero_grad()
        module(ids[:, None]).backward(scale * grad.to(module.weight.dtype))
        optimizer.step()
        if dense is not None:
            dense.step(ids, scale * grad)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=1e-13)


def behind(kind: str = "AdamW"):
    """A module whose rows lag behind, its optimizer, and what dense Adam has."""
    module, optimizer = make(kind, True)
    dense = Dense(kind, module)
    train(module, optimizer, dense, range(20))
    assert module.weight.ledger.is_behind()
    return module, optimizer, dense.weight.detach()


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
