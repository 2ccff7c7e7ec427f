"""Training steps of other libraries' models as they are, and of the same models after ``rankkernels.accelerate``: one
state, one optimizer, one batch.

The losses of the first steps are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rankkernels as rk
from bench.harness import machine
from bench.harness.peers import missing

STEPS = 3


def fuxi_step(model: nn.Module, batch: object, fused_adam: bool = False) -> Callable[[], float]:
    """FuxiCTR's own: forward, loss, backward, clipping, dense Adam, that in torch's one-pass form if asked for."""
    model.train()
    for group in model.optimizer.param_groups if fused_adam else ():
        group["fused"] = True
    model._max_gradient_norm, model._batch_index = 10.0, 0  # set by its ``fit``
    return lambda: model.train_step(batch).item()


def fuxi_deepfm(rows: int, mlp=(64, 64, 64), fused_adam: bool = False, B: int = 8192, D: int = 16):
    """The zoo's on Criteo's fields; its MLP's default is [64, 64, 64]. ``fused_adam``: for the accelerated one."""
    from bench.harness import fuxictr_models as fuxi

    specs = {f"I{i}": {"type": "numeric"} for i in range(13)}
    specs |= {f"C{i}": {"type": "categorical", "vocab_size": rows, "padding_idx": 0} for i in range(26)}
    model = fuxi.DeepFM(fuxi.feature_map(specs, D), D, {"hidden_units": list(mlp)})
    batch = {f"I{i}": torch.rand(B) for i in range(13)}
    batch |= {f"C{i}": torch.randint(0, rows, (B,)) for i in range(26)}
    batch["label"] = torch.randint(0, 2, (B,)).float()
    return model, lambda m: fuxi_step(m, batch, fused_adam and m is not model)


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


def deepctr(model: str, *arguments: object, **options: object):
    from bench.harness import deepctr_models

    return getattr(deepctr_models, model)(*arguments, **options)


#: By the name in the record: the library, and what makes a model and, of a model, its step.
CASES = {
    "FuxiCTR DIN, LongCTR's, B8192 L50 D64 [64] Dice": ("fuxictr", fuxi_din),
    "FuxiCTR DIN, 2 histories, B8192 L50 D64 [64] Dice": ("fuxictr", fuxi_din_of_fields),
    "FuxiCTR DeepFM 26 tables x 1,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(1_000)),
    "FuxiCTR DeepFM 26 tables x 10,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(10_000)),
    "FuxiCTR DeepFM 26 tables x 100,000 rows, B8192 D16": ("fuxictr", lambda: fuxi_deepfm(100_000)),
    "FuxiCTR DeepFM 26 tables x 10,000 rows, B8192 D16 [400, 400, 400]": (
        "fuxictr",
        lambda: fuxi_deepfm(10_000, (400, 400, 400)),
    ),
    "FuxiCTR DeepFM 26 tables x 10,000 rows, B8192 D16, fused Adam": (
        "fuxictr",
        lambda: fuxi_deepfm(10_000, fused_adam=True),
    ),
    "FuxiCTR DeepFM 26 tables x 100,000 rows, B8192 D16, fused Adam": (
        "fuxictr",
        lambda: fuxi_deepfm(100_000, fused_adam=True),
    ),
    "DeepCTR-Torch DIN, B2048 L50 D64 [64, 16] Dice": ("deepctr-torch", lambda: deepctr("din")),
    "DeepCTR-Torch DIN, B2048 L50 D64 [64, 16] sigmoid, softmax": (
        "deepctr-torch",
        lambda: deepctr("din", att_activation="sigmoid", att_weight_normalization=True),
    ),
    "DeepCTR-Torch DeepFM 26 tables x 1,000 rows, B4096 D16": ("deepctr-torch", lambda: deepctr("deepfm", 1_000)),
    "DeepCTR-Torch DeepFM 26 tables x 10,000 rows, B4096 D16": ("deepctr-torch", lambda: deepctr("deepfm", 10_000)),
    "DeepCTR-Torch DeepFM 26 tables x 100,000 rows, B4096 D16": ("deepctr-torch", lambda: deepctr("deepfm", 100_000)),
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
