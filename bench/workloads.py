"""DeepFM and DIN as they are measured, in torch-rechub and in ours: their shapes, batches and training steps.

A step is that of torch-rechub's trainer: forward, ``BCELoss``, ``zero_grad``, backward, ``Adam`` with its learning rate
and weight decay, ``loss.item()``. Both libraries train the same weights with the same optimizer, so their losses are
the same. "fused" is the one that is not: ours with ``rankkernels.optim.Adam`` on the rows looked up, in the backward,
and torch's own fused Adam for the rest. "exact" is that with dense Adam's numbers, which has no coupled weight decay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import rankkernels as rk
from bench.demo.models import Field, classes

#: Who is measured, by the name in the records: the library of ``bench.demo.models``.
LIBRARIES = {"torch-rechub": "torch-rechub", "ours": "rankkernels"}
ADAM = {"lr": 1e-3, "weight_decay": 1e-5}  # torch-rechub's


@dataclass(frozen=True)
class Workload:
    """A model at the shapes of practice: ``build(classes)`` makes it, ``batch(seed)`` what it is trained on."""

    name: str
    id: str
    build: Callable[[SimpleNamespace], nn.Module]
    batch: Callable[..., tuple[dict[str, Tensor], Tensor]]

    def ours(self) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
        """Our model, a batch and its labels, on the current device."""
        return self.build(classes("rankkernels")), *self.batch()

    def models(self) -> dict[str, nn.Module]:
        """Both libraries' with one state. torch-rechub's embeddings of 1e-4 are made 0.05, so that they matter."""
        torch.manual_seed(0)
        models = {name: self.build(classes(library)) for name, library in LIBRARIES.items()}
        reference, ours = models.values()
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

    def batch(seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
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

    def batch(seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        x = {name: torch.randint(0, rows, (B,)) for name in ("user", "target_item", "target_category")}
        x |= {name: torch.randint(0, rows, (B, L)) for name in ("history_item", "history_category")}
        return x, torch.randint(0, 2, (B,)).float()

    name = f"DIN 2 histories, 3 tables x {rows:,} rows, B{B} L{L} D{D} {list(attention)}"
    return Workload(name, f"DIN-{rows}", build, batch)


class Step:
    """One training step of ``model`` each call: the loss before it."""

    def __init__(
        self, model: nn.Module, x: dict[str, Tensor], y: Tensor, fused: bool = False, exact: bool = False, adam=ADAM
    ):
        self.model, self.x, self.y = model.train(), x, y
        self.criterion = nn.BCELoss()
        params = list(model.parameters())
        if fused:
            tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
            rk.optim.fuse(model, rk.optim.Adam(tables, **adam, exact=exact))
            params = [p for p in params if all(p is not t for t in tables)]
        self.optimizer = torch.optim.Adam(params, **adam, fused=fused or None)

    def __call__(self) -> float:
        loss = self.criterion(self.model(self.x), self.y)
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class CycledStep(Step):
    """A step on another of some batches each call: rows that are in all of them would never be idle."""

    def __init__(self, model: nn.Module, batches: Sequence[tuple[dict[str, Tensor], Tensor]], **options):
        super().__init__(model, *batches[0], **options)
        self.batches = itertools.cycle(batches)

    def __call__(self) -> float:
        self.x, self.y = next(self.batches)
        return super().__call__()


#: Of one user's request, as fields of a data set: rows a table, and the length of a history.
ROWS, LENGTH = 100_000, 50
SERVED = {
    "deepfm": [Field(f"C{i}", "sparse", ROWS) for i in range(26)],
    "din": [
        *(Field(f"user_{i}", "sparse", ROWS) for i in range(4)),
        Field("item", "target", ROWS, padded=True),
        Field("category", "target", ROWS, padded=True),
        Field("history_item", "history", ROWS, "item", padded=True),
        Field("history_category", "history", ROWS, "category", padded=True),
    ],
}
