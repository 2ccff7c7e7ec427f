"""Whole training steps and evaluation passes of DeepFM and DIN, in torch-rechub and in ours: what ``bench_steps.py``
times and ``profile_step.py`` takes apart.

A step is that of torch-rechub's trainer: forward, ``BCELoss``, ``zero_grad``, backward, ``Adam`` with its learning rate
and weight decay, ``loss.item()``. Both libraries train the same weights with the same optimizer, so their losses are
the same. "fused" is the one that is not: ours with ``rankkernels.optim.Adam`` on the rows looked up, in the backward,
and torch's own fused Adam for the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import rankkernels as rk

LIBRARIES = ("torch-rechub", "ours")
ADAM = {"lr": 1e-3, "weight_decay": 1e-5}  # torch-rechub's


def classes(library: str) -> SimpleNamespace:
    """Features and models of a library under the same names."""
    if library == "ours":
        modules = [rk]
    else:
        modules = [importlib.import_module(f"torch_rechub.{m}") for m in ("basic.features", "models.ranking")]
    names = "SparseFeature", "SequenceFeature", "DenseFeature", "DeepFM", "DIN"
    return SimpleNamespace(**{n: next(getattr(m, n) for m in modules if hasattr(m, n)) for n in names})


@dataclass(frozen=True)
class Workload:
    """A model at the shapes of practice: ``build(classes)`` makes it, ``batch()`` what it is trained on."""

    name: str
    id: str
    build: Callable[[SimpleNamespace], nn.Module]
    batch: Callable[[], tuple[dict[str, Tensor], Tensor]]

    def models(self) -> dict[str, nn.Module]:
        """Both libraries' with one state. torch-rechub's embeddings of 1e-4 are made 0.05, so that they matter."""
        torch.manual_seed(0)
        models = {library: self.build(classes(library)) for library in LIBRARIES}
        reference, ours = (models[library] for library in LIBRARIES)
        with torch.no_grad():
            for module in reference.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.mul_(500)
        ours.load_state_dict(reference.state_dict())
        return models


def deepfm(rows: int, B: int = 4096, fields: int = 26, dense: int = 13, D: int = 16, dims=(256, 128)) -> Workload:
    def build(c: SimpleNamespace) -> nn.Module:
        sparse = [c.SparseFeature(f"C{i}", rows, D) for i in range(fields)]
        return c.DeepFM(sparse + [c.DenseFeature(f"I{i}") for i in range(dense)], sparse, {"dims": list(dims)})

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)
        x = {f"C{i}": torch.randint(0, rows, (B,)) for i in range(fields)}
        x |= {f"I{i}": torch.randn(B) for i in range(dense)}
        return x, torch.randint(0, 2, (B,)).float()

    name = f"DeepFM {fields} tables x {rows:,} rows, B{B} D{D} {list(dims)}"
    return Workload(name, f"DeepFM-{rows}", build, batch)


def din(rows: int = 100_000, B: int = 1024, L: int = 50, D: int = 16, attention=(36,), dims=(256, 128)) -> Workload:
    """User, item and category, and the histories of the last two."""

    def build(c: SimpleNamespace) -> nn.Module:
        targets = [c.SparseFeature(f"target_{name}", rows, D) for name in ("item", "category")]
        histories = [
            c.SequenceFeature(f"history_{name}", rows, D, pooling="concat", shared_with=f"target_{name}")
            for name in ("item", "category")
        ]
        user = [c.SparseFeature("user", rows, D)]
        return c.DIN(user, histories, targets, {"dims": list(dims)}, {"dims": list(attention)})

    def batch() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(1)
        x = {name: torch.randint(0, rows, (B,)) for name in ("user", "target_item", "target_category")}
        x |= {name: torch.randint(0, rows, (B, L)) for name in ("history_item", "history_category")}
        return x, torch.randint(0, 2, (B,)).float()

    name = f"DIN 2 histories, 3 tables x {rows:,} rows, B{B} L{L} D{D} {list(attention)}"
    return Workload(name, f"DIN-{rows}", build, batch)


class Step:
    """One training step of ``model`` each call: the loss before it."""

    def __init__(self, model: nn.Module, x: dict[str, Tensor], y: Tensor, fused: bool = False):
        self.model, self.x, self.y = model.train(), x, y
        self.criterion = nn.BCELoss()
        params = list(model.parameters())
        if fused:
            tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
            rk.optim.fuse(model, rk.optim.Adam(tables, **ADAM))
            params = [p for p in params if all(p is not t for t in tables)]
        self.optimizer = torch.optim.Adam(params, **ADAM, fused=fused or None)

    def __call__(self) -> float:
        loss = self.criterion(self.model(self.x), self.y)
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def compiled(model: nn.Module) -> nn.Module:
    """``model`` under torch.compile, its parameters the same objects."""
    return torch.compile(model)
