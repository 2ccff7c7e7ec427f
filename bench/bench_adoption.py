"""Training steps of other libraries' models, accelerated and not: with the library's own loss and optimizer.

The losses of the first steps are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankkernels as rk
from bench.harness import machine
from bench.harness.peers import missing

STEPS = 6


def deepctr_deepfm(rows: int = 10_000, B: int = 4096, fields: int = 26, dense: int = 13, D: int = 16):
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    columns = [SparseFeat(f"C{i}", rows, D) for i in range(fields)] + [DenseFeat(f"I{i}") for i in range(dense)]
    X = torch.cat([torch.randint(0, rows, (B, fields)).float(), torch.randn(B, dense)], 1)
    return DeepFM(columns, columns), X


def deepctr_din(rows: int = 10_000, B: int = 1024, L: int = 50, D: int = 32, **options):
    """User, item and category, and the histories of the last two; a third of the positions is padding."""
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIN

    columns = [SparseFeat(name, rows, D) for name in ("user", "item", "category")]
    for name in ("item", "category"):
        feature = SparseFeat(f"hist_{name}", rows, D, embedding_name=name)
        columns.append(VarLenSparseFeat(feature, L, length_name="length"))
    lengths = torch.randint(L // 3, L + 1, (B, 1))
    ids = torch.randint(1, rows, (B, 3)), *(torch.randint(1, rows, (B, L)) for _ in range(2))
    histories = [i * (torch.arange(L) < lengths) for i in ids[1:]]
    return DIN(columns, ["item", "category"], **options), torch.cat(
        [ids[0], histories[0], lengths, histories[1]], 1
    ).float()


DEEPCTR = {
    "DeepFM, 26 tables x 10,000 rows, B4096 D16 [256, 128]": deepctr_deepfm,
    "DIN, B1024 L50 D64, attention [64, 16] Dice": deepctr_din,
    "DIN, B1024 L50 D64, attention [64, 16] sigmoid, softmax": lambda: deepctr_din(
        att_activation="sigmoid", att_weight_normalization=True
    ),
}


def deepctr_step(model: nn.Module, X: Tensor, y: Tensor) -> Callable[[], float]:
    """A step of their ``fit``."""
    model.compile("adam", "binary_crossentropy")

    def step() -> float:
        loss = model.loss_func(model(X).squeeze(), y, reduction="sum")
        model.optim.zero_grad()
        total = loss + model.get_regularization_loss() + model.aux_loss
        total.backward()
        model.optim.step()
        return total.item()

    return step


@pytest.mark.parametrize("name", DEEPCTR)
@pytest.mark.skipif(machine.missing("deepctr-torch"), reason="DeepCTR-Torch is not installed")
def test_deepctr_torch(name, threads, race):
    torch.manual_seed(0)
    untouched, X = DEEPCTR[name]()
    model, y = rk.accelerate(copy.deepcopy(untouched)), torch.randint(0, 2, (len(X),)).float()
    eager, ours = (deepctr_step(m, X, y) for m in (untouched, model))
    torch.testing.assert_close(*(torch.tensor([s() for _ in range(STEPS)]) for s in (ours, eager)), rtol=1e-4, atol=0)
    race(
        lambda: (ours(), None)[1],
        {"eager": lambda: (eager(), None)[1]},
        case=f"DeepCTR-Torch's {name}",
        kind="training step",
        missing=missing("deepctr-torch"),
    )
