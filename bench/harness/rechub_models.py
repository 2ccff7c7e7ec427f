"""Every model of torch-rechub, built of a few features of one kind each, and a batch for all of them. Imports
torch-rechub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_rechub.basic import features
from torch_rechub.basic.layers import CapsuleNetwork
from torch_rechub.models import matching, multi_task, ranking
from torch_rechub.models.matching.dssm_senet import DSSM as DSSMSenet


@dataclass(frozen=True)
class Sizes:
    """Samples, positions, rows, width; hidden layers of an MLP, and of the attention's; dropout of the MLPs."""

    B: int
    L: int
    V: int
    D: int
    dims: tuple[int, ...]
    attention: tuple[int, ...]
    dropout: float = 0.0


class Features:
    """Of one model: their tables are kept on them."""

    def __init__(self, sizes: Sizes):
        V, D = sizes.V, sizes.D
        self.sizes = sizes
        self.user = [features.SparseFeature("user", V, D), features.SparseFeature("city", V, D)]
        self.item = [features.SparseFeature("item", V, D, padding_idx=0)]
        self.sparse = [*self.user, *self.item]
        self.dense = [features.DenseFeature("age"), features.DenseFeature("price")]
        self.weight = [features.DenseFeature("weight")]
        self.pooled = [self._sequence("tags", "mean")]
        self.history = [self._sequence("hist")]
        self.negative = [self._sequence("negative")]
        self.negative_item = [features.SparseFeature("negative_item", V, D, shared_with="item")]
        # SASRec: sequences of one table that one of them owns
        self.sequences = [features.SequenceFeature("seq", V, D, pooling="concat")]
        for name in ("hist", "negative"):
            self.sequences.append(features.SequenceFeature(name, V, D, pooling="concat", shared_with="seq"))
        # DeepFFM: one row for each pair of id and field
        self.linear = [features.SparseFeature(f"linear_{n}", V, 1) for n in ("user", "city", "item")]
        self.cross = [features.SparseFeature(f"linear_{n}", V * 3, D) for n in ("user", "city", "item")]

    def _sequence(self, name: str, pooling: str = "concat") -> features.SequenceFeature:
        V, D = self.sizes.V, self.sizes.D
        return features.SequenceFeature(name, V, D, pooling, shared_with="item", padding_idx=0)

    @property
    def mlp(self) -> dict:
        return {"dims": list(self.sizes.dims), "dropout": self.sizes.dropout, "activation": "prelu"}

    @property
    def bottom(self) -> dict:
        """An expert's, or what tasks share."""
        return {"dims": list(self.sizes.dims[:1])}

    @property
    def tower(self) -> dict:
        return {"dims": [*self.sizes.dims[:1], self.sizes.D], "activation": "prelu"}

    @property
    def attention(self) -> dict:
        return {"dims": list(self.sizes.attention)}


_TASKS = ["classification", "classification"]


def _sine(f: Features) -> nn.Module:
    s = f.sizes
    return matching.SINE(["hist"], ["item"], ["negative"], s.V, s.D, s.D, 6, 2, s.L)


#: Of each model, by its name in torch-rechub, what makes it of ``Features``.
MODELS: dict[str, Callable[[Features], nn.Module]] = {
    "WideDeep": lambda f: ranking.WideDeep(f.sparse + f.dense, f.sparse + f.pooled, f.mlp),
    "DeepFM": lambda f: ranking.DeepFM(f.sparse + f.pooled + f.dense, f.sparse + f.pooled, f.mlp),
    "DCN": lambda f: ranking.DCN(f.sparse + f.dense, 2, f.mlp),
    "DCNv2": lambda f: ranking.DCNv2(f.sparse + f.dense, 2, f.mlp),
    "DCNv2-stacked": lambda f: ranking.DCNv2(f.sparse, 2, f.mlp, "stacked", False),
    "EDCN": lambda f: ranking.EDCN(f.sparse, 2, f.mlp),
    "AFM": lambda f: ranking.AFM(f.sparse + f.pooled, f.sizes.D),
    "FiBiNet": lambda f: ranking.FiBiNet(f.sparse, f.mlp),
    "DeepFFM": lambda f: ranking.DeepFFM(f.linear, f.cross, f.sizes.D, f.mlp),
    "FatDeepFFM": lambda f: ranking.FatDeepFFM(f.linear, f.cross, f.sizes.D, 1, f.mlp),
    "BST": lambda f: ranking.BST(f.user + f.dense, f.history, f.item, f.mlp, nhead=2, dropout=0.0),
    "DIN": lambda f: ranking.DIN(f.user + f.pooled, f.history, f.item, f.bottom, f.attention),
    "DIEN": lambda f: ranking.DIEN(f.user + f.dense, f.history, f.negative, f.item, f.bottom),
    "AutoInt": lambda f: ranking.AutoInt(f.sparse, f.dense, 2, 2, f.sizes.dropout, f.mlp),
    "DSSM": lambda f: matching.DSSM(f.user, f.item, f.tower, f.tower),
    "DSSM-senet": lambda f: DSSMSenet(f.user, f.sparse, f.tower, f.tower),
    "FaceBookDSSM": lambda f: matching.FaceBookDSSM(f.user, f.item, f.negative_item, f.tower, f.tower),
    "YoutubeDNN": lambda f: matching.YoutubeDNN(f.user + f.pooled, f.item, f.negative, f.tower),
    "YoutubeSBC": lambda f: matching.YoutubeSBC(f.user, f.item, f.weight, f.tower, f.tower, f.sizes.B),
    "MIND": lambda f: matching.MIND(f.user, f.history, f.item, f.negative, f.sizes.L),
    "GRU4Rec": lambda f: matching.GRU4Rec(f.user, f.history, f.item, f.negative, f.tower),
    "SASRec": lambda f: matching.SASRec(f.sequences, f.sizes.L),
    "ComirecDR": lambda f: matching.ComirecDR(f.user, f.history, f.item, f.negative, f.sizes.L),
    "ComirecSA": lambda f: matching.ComirecSA(f.user, f.history, f.item, f.negative),
    "NARM": lambda f: matching.NARM(f.history[0], f.sizes.D, 0.1, 0.1),
    "SINE": _sine,
    "STAMP": lambda f: matching.STAMP(f.history[0], 0.1, 0.1),
    "SharedBottom": lambda f: multi_task.SharedBottom(f.sparse + f.dense, _TASKS, f.bottom, [f.mlp, f.mlp]),
    "ESMM": lambda f: multi_task.ESMM(f.user, f.item, f.mlp, f.mlp),
    "MMOE": lambda f: multi_task.MMOE(f.sparse + f.pooled, _TASKS, 2, f.bottom, [f.mlp, f.mlp]),
    "PLE": lambda f: multi_task.PLE(f.sparse, _TASKS, 2, 2, 1, f.bottom, [f.mlp, f.mlp]),
    "AITM": lambda f: multi_task.AITM(f.sparse, 2, f.bottom, [f.mlp, f.mlp]),
}

#: What ``accelerate`` finds no layer of ours in.
WITHOUT_OUR_LAYERS = ("NARM", "SINE", "STAMP")


def build(name: str, sizes: Sizes) -> nn.Module:
    """The model of that name. What torch-rechub leaves as it lay in memory is made random."""
    model = MODELS[name](Features(sizes))
    for module in model.modules():
        if isinstance(module, CapsuleNetwork) and module.bilinear_type == 2:
            nn.init.normal_(module.w)
    return model


def batch(sizes: Sizes) -> dict[str, Tensor]:
    """For every model; of two samples the sequences are shorter, or empty."""
    B, L, V = sizes.B, sizes.L, sizes.V
    generator = torch.Generator().manual_seed(3)
    x = {n: torch.randint(1, V, (B,), generator=generator) for n in ("user", "city", "item", "negative_item")}
    x |= {f"linear_{n}": x[n] for n in ("user", "city", "item")}
    x |= {n: torch.randint(1, V, (B, L), generator=generator) for n in ("hist", "negative", "tags", "seq")}
    x["hist"][0, 2:] = x["tags"][1] = x["tags"][2, 1:] = 0
    return x | {n: torch.rand(B, generator=generator) + 0.1 for n in ("age", "price", "weight")}


def output(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a model returns, in one piece."""
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])
