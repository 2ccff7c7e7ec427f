"""Training steps of other libraries' models as they are, and of the same models after ``rankkernels.accelerate``: one
state, one optimizer, one batch.

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


def fuxi_step(model: nn.Module, batch: object) -> Callable[[], float]:
    """FuxiCTR's own: forward, loss, backward, clipping, dense Adam."""
    model.train()
    model._max_gradient_norm, model._batch_index = 10.0, 0  # set by its ``fit``
    return lambda: model.train_step(batch).item()


def fuxi_deepfm(rows: int, B: int = 8192, fields: int = 26, numbers: int = 13, D: int = 16):
    from bench.harness import fuxictr_models as fuxi

    specs = {f"I{i}": {"type": "numeric"} for i in range(numbers)}
    specs |= {f"C{i}": {"type": "categorical", "vocab_size": rows, "padding_idx": 0} for i in range(fields)}
    model = fuxi.DeepFM(fuxi.feature_map(specs, D), D, {"hidden_units": [400, 400, 400]})
    batch = {f"I{i}": torch.rand(B) for i in range(numbers)}
    batch |= {f"C{i}": torch.randint(0, rows, (B,)) for i in range(fields)}
    batch["label"] = torch.randint(0, 2, (B,)).float()
    return model, lambda m: fuxi_step(m, batch)


def fuxi_din(B: int = 8192, L: int = 50, D: int = 64, rows: int = 100_000):
    """LongCTR's, at its defaults, attention [64] with Dice and MLP [512, 128, 64], of a user and an item."""
    from model_zoo.LongCTR import DIN

    from bench.harness import fuxictr_models as fuxi

    specs = {f: {"type": "categorical", "source": f, "vocab_size": rows, "padding_idx": 0} for f in ("user", "item")}
    model = DIN(fuxi.feature_map(specs, D), embedding_dim=D, model_root=".", **fuxi.SETTINGS)
    batch = fuxi.long_batch(specs, B, L, shortest=1)
    return model, lambda m: fuxi_step(m, batch)


def fuxi_din_of_fields(B: int = 8192, L: int = 50, D: int = 64, rows: int = 100_000):
    """The zoo's, with Amazon's fields: user, item and category, and the histories of the last two."""
    from bench.harness import fuxictr_models as fuxi

    fields, histories = ("user", "item", "category"), ("item_history", "category_history")
    specs = {f: {"type": "categorical", "vocab_size": rows, "padding_idx": 0} for f in fields}
    specs |= {h: {**specs["item"], "type": "sequence", "share_embedding": h.split("_")[0]} for h in histories}
    attention, mlp = {"attention_units": [64], "hidden_activations": "Dice"}, {"hidden_units": [512, 128, 64]}
    targets, sequences = [("item",), ("category",)], [(h,) for h in histories]
    model = fuxi.DIN(fuxi.feature_map(specs, D), D, targets, sequences, attention, mlp)
    batch = {f: torch.randint(1, rows, (B,)) for f in fields}
    batch |= {h: fuxi.history_ids(B, L, rows, 1) for h in histories}
    batch["label"] = torch.randint(0, 2, (B,)).float()
    return model, lambda m: fuxi_step(m, batch)


#: By the name in the record: the library, and what makes a model and, of a model, its step.
CASES = {
    "FuxiCTR DIN, LongCTR's, B8192 L50 D64 [64] Dice": ("fuxictr", fuxi_din),
    "FuxiCTR DIN, 2 histories, B8192 L50 D64 [64] Dice": ("fuxictr", fuxi_din_of_fields),
    "FuxiCTR DeepFM 26 tables x 1,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(1_000)),
    "FuxiCTR DeepFM 26 tables x 10,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(10_000)),
    "FuxiCTR DeepFM 26 tables x 100,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(100_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_adopted_step(case, threads, race):
    library, make = CASES[case]
    if machine.missing(library):
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    untouched, step_of = make()
    accelerated = rk.accelerate(copy.deepcopy(untouched))
    theirs, ours = step_of(untouched), step_of(accelerated)
    losses = [[step() for _ in range(STEPS)] for step in (theirs, ours)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    race(
        lambda: (ours(), None)[1],
        {"eager": lambda: (theirs(), None)[1]},
        case=case,
        kind="training step, accelerated",
        missing=missing(library),
    )


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
