"""Every model of torch-rechub with a layer of ours, accelerated and not: the same outputs, gradients and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankkernels as rk

features_ = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
basic = pytest.importorskip("torch_rechub.basic.layers")
ranking = pytest.importorskip("torch_rechub.models.ranking")
matching = pytest.importorskip("torch_rechub.models.matching")
dssm_senet = pytest.importorskip("torch_rechub.models.matching.dssm_senet")
multi_task = pytest.importorskip("torch_rechub.models.multi_task")
B, L, V, D = 9, 5, 12, 8
pytestmark = pytest.mark.usefixtures("float64")


def sequence(name, **arguments):
    return features_.SequenceFeature(name, V, D, shared_with="item", padding_idx=0, **arguments)


class Features:
    """Of one model: their tables are kept on them."""

    def __init__(self):
        self.user = [features_.SparseFeature("user", V, D), features_.SparseFeature("city", V, D)]
        self.item = [features_.SparseFeature("item", V, D, padding_idx=0)]
        self.sparse = [*self.user, *self.item]
        self.dense = [features_.DenseFeature("age"), features_.DenseFeature("price")]
        self.pooled = [sequence("tags", pooling="mean")]
        self.history = [sequence("hist", pooling="concat")]
        self.negative = [sequence("negative", pooling="concat")]
        self.negative_item = [features_.SparseFeature("negative_item", V, D, shared_with="item")]
        # SASRec: sequences of one table that one of them owns
        self.sequences = [features_.SequenceFeature("seq", V, D, pooling="concat")]
        for name in ("hist", "negative"):
            self.sequences.append(features_.SequenceFeature(name, V, D, pooling="concat", shared_with="seq"))
        # DeepFFM: one row for each pair of id and field
        self.linear = [features_.SparseFeature(f"linear_{n}", V, 1) for n in ("user", "city", "item")]
        self.cross = [features_.SparseFeature(f"linear_{n}", V * 3, D) for n in ("user", "city", "item")]


MLP = {"dims": [7, 6], "dropout": 0.1, "activation": "prelu"}
TOWER = {"dims": [7, D], "activation": "prelu"}
TASKS = ["classification", "classification"]
MODELS = {
    "WideDeep": lambda f: ranking.WideDeep(f.sparse + f.dense, f.sparse + f.pooled, MLP),
    "DeepFM": lambda f: ranking.DeepFM(f.sparse + f.pooled + f.dense, f.sparse + f.pooled, MLP),
    "DCN": lambda f: ranking.DCN(f.sparse + f.dense, 2, MLP),
    "DCNv2": lambda f: ranking.DCNv2(f.sparse + f.dense, 2, MLP),
    "DCNv2-stacked": lambda f: ranking.DCNv2(f.sparse, 2, MLP, "stacked", False),
    "EDCN": lambda f: ranking.EDCN(f.sparse, 2, MLP),
    "AFM": lambda f: ranking.AFM(f.sparse + f.pooled, D),
    "FiBiNet": lambda f: ranking.FiBiNet(f.sparse, MLP),
    "DeepFFM": lambda f: ranking.DeepFFM(f.linear, f.cross, D, MLP),
    "FatDeepFFM": lambda f: ranking.FatDeepFFM(f.linear, f.cross, D, 1, MLP),
    "BST": lambda f: ranking.BST(f.user + f.dense, f.history, f.item, MLP, nhead=2),
    "DIN": lambda f: ranking.DIN(f.user + f.pooled, f.history, f.item, {"dims": [7]}, {"dims": [6]}),
    "DIEN": lambda f: ranking.DIEN(f.user + f.dense, f.history, f.negative, f.item, {"dims": [7]}),
    "AutoInt": lambda f: ranking.AutoInt(f.sparse, f.dense, 2, 2, 0.1, MLP),
    "DSSM": lambda f: matching.DSSM(f.user, f.item, TOWER, TOWER),
    "DSSM-senet": lambda f: dssm_senet.DSSM(f.user, f.sparse, TOWER, TOWER),
    "FaceBookDSSM": lambda f: matching.FaceBookDSSM(f.user, f.item, f.negative_item, TOWER, TOWER),
    "YoutubeDNN": lambda f: matching.YoutubeDNN(f.user + f.pooled, f.item, f.negative, TOWER),
    "YoutubeSBC": lambda f: matching.YoutubeSBC(f.user, f.item, [features_.DenseFeature("weight")], TOWER, TOWER, B),
    "MIND": lambda f: matching.MIND(f.user, f.history, f.item, f.negative, L),
    "GRU4Rec": lambda f: matching.GRU4Rec(f.user, f.history, f.item, f.negative, TOWER),
    "SASRec": lambda f: matching.SASRec(f.sequences, L),
    "ComirecDR": lambda f: matching.ComirecDR(f.user, f.history, f.item, f.negative, L),
    "ComirecSA": lambda f: matching.ComirecSA(f.user, f.history, f.item, f.negative),
    "SharedBottom": lambda f: multi_task.SharedBottom(f.sparse + f.dense, TASKS, {"dims": [7]}, [MLP, MLP]),
    "ESMM": lambda f: multi_task.ESMM(f.user, f.item, MLP, MLP),
    "MMOE": lambda f: multi_task.MMOE(f.sparse + f.pooled, TASKS, 2, {"dims": [7]}, [MLP, MLP]),
    "PLE": lambda f: multi_task.PLE(f.sparse, TASKS, 2, 2, 1, {"dims": [7]}, [MLP, MLP]),
    "AITM": lambda f: multi_task.AITM(f.sparse, 2, {"dims": [7]}, [MLP, MLP]),
}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = {n: torch.randint(1, V, (B,), generator=generator) for n in ("user", "city", "item", "negative_item")}
    x |= {f"linear_{n}": x[n] for n in ("user", "city", "item")}
    x |= {n: torch.randint(1, V, (B, L), generator=generator) for n in ("hist", "negative", "tags", "seq")}
    x["hist"][0, 2:] = x["tags"][1] = x["tags"][2, 1:] = 0
    return x | {n: torch.rand(B, generator=generator) + 0.1 for n in ("age", "price", "weight")}


def assert_reported(ours: nn.Module, theirs: nn.Module):
    """Every layer of torch-rechub is in the report: replaced by the class that it has now, or left with a reason."""
    report = {e.path: e for e in rk.explain(ours).entries}
    before, after = dict(theirs.named_modules()), dict(ours.named_modules())
    assert report.keys() == {path for path, m in before.items() if type(m).__module__.startswith("torch_rechub.")}
    for path, entry in report.items():
        assert (entry.cls, entry.library) == (type(before[path]).__name__, "torch-rechub")
        assert entry.done == (entry.replaced_by is not None) == (type(after[path]) is not type(before[path]))
        assert entry.done != bool(entry.reason)


def flat(y) -> torch.Tensor:
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])


def test_no_model_is_left_out():
    without_our_layers = {"NARM", "SINE", "STAMP"}
    theirs = {*ranking.__all__, *matching.__all__, *multi_task.__all__} - without_our_layers
    assert theirs <= {name.split("-")[0] for name in MODELS} and len(theirs) == 27


@pytest.mark.parametrize("build", [
    lambda f: matching.NARM(f.history[0], D, 0.1, 0.1),
    lambda f: matching.STAMP(f.history[0], 0.1, 0.1),
], ids=["NARM", "STAMP"])  # fmt: skip
def test_models_without_our_layers_are_left(build):
    model = build(Features())
    with pytest.warns(UserWarning, match="0 layers are replaced, 0 more can be, 1 are left"):
        rk.accelerate(model)
    assert [(e.path, e.reason) for e in rk.explain(model).left] == [("", "its own forward runs, over the layers below")]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_accelerated(name, training):
    torch.manual_seed(0)
    theirs = MODELS[name](Features())
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, basic.CapsuleNetwork) and module.bilinear_type == 2:
            nn.init.normal_(module.w)  # torch-rechub leaves it as it lay in memory
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    ours = rk.accelerate(copy.deepcopy(theirs))
    assert_reported(ours, theirs)
    found = []
    for model in (theirs, ours):
        model.train(training)
        torch.manual_seed(1)
        y = flat(model(batch()))
        (y * torch.linspace(-1, 1, len(y))).sum().backward()
        grads = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
        with torch.no_grad():
            torch.manual_seed(1)
            found.append([y.detach(), *grads, *model.buffers(), flat(model(batch()))])
    assert found[0][0].numel() >= B and any(g.abs().max() > 0 for g in found[0][1:-1] if g.numel())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
