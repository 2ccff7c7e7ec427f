"""DeepCTR-Torch's DeepFM and DIN at the shapes of practice: each with a batch, and the step of their ``fit``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN, DeepFM
from torch import Tensor, nn


def step(model: nn.Module, X: Tensor) -> Callable[[], float]:
    """Forward, loss, the tables' regularization, backward, dense Adam."""
    model.compile("adam", "binary_crossentropy")
    model.train()
    y = (torch.arange(len(X)) % 3 == 0).float()

    def run() -> float:
        loss = model.loss_func(model(X).squeeze(), y, reduction="sum")
        model.optim.zero_grad()
        total = loss + model.get_regularization_loss() + model.aux_loss
        total.backward()
        model.optim.step()
        return total.item()

    return run


def deepfm(rows: int, B: int = 4096, fields: int = 26, numbers: int = 13, D: int = 16):
    columns = [SparseFeat(f"C{i}", rows, D) for i in range(fields)] + [DenseFeat(f"I{i}") for i in range(numbers)]
    X = torch.cat([torch.randint(0, rows, (B, fields)).float(), torch.randn(B, numbers)], 1)
    return DeepFM(columns, columns), lambda m: step(m, X)


def din(rows: int = 10_000, B: int = 2048, L: int = 50, D: int = 32, **options: object):
    """User, item and category, and the histories of the last two; a third of their positions is padding."""
    columns = [SparseFeat(name, rows, D) for name in ("user", "item", "category")]
    for name in ("item", "category"):
        history = SparseFeat(f"hist_{name}", rows, D, embedding_name=name)
        columns.append(VarLenSparseFeat(history, L, length_name="length"))
    lengths = torch.randint(L // 3, L + 1, (B, 1))
    items, categories = (torch.randint(1, rows, (B, L)) * (torch.arange(L) < lengths) for _ in range(2))
    X = torch.cat([torch.randint(1, rows, (B, 3)), items, lengths, categories], 1).float()
    return DIN(columns, ["item", "category"], **options), lambda m: step(m, X)
