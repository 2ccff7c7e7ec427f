"""Our dense parts on TorchRec's tables. TorchRec goes with one torch: `make test-all` runs this where it has both."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import rankkernels as rk

pytest.importorskip("torchrec", reason="torchrec is not installed; `make test-all` has a venv with one that fits")

from torchrec.modules.deepfm import FactorizationMachine  # noqa: E402
from torchrec_ranks import LR, STEPS, WAYS, train_all  # noqa: E402

from bench.harness.ranks import run  # noqa: E402
from rankkernels import torchrec as rktr  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
B, L, D = 7, 5, 8


def deepfm() -> rk.DeepFM:
    torch.manual_seed(0)
    sparse = [
        rk.SparseFeature(name, rows, D, initializer=rk.RandomNormal(0, 1)) for name, rows in (("u", 20), ("i", 30))
    ]
    tags = rk.SequenceFeature("tags", 9, D, "mean", padding_idx=0, initializer=rk.RandomNormal(0, 1))
    return rk.DeepFM([*sparse, tags, rk.DenseFeature("age")], [*sparse, tags], {"dims": [16]})


def din() -> rk.DIN:
    torch.manual_seed(0)
    item = {"vocab_size": 30, "embed_dim": D, "padding_idx": 0, "initializer": rk.RandomNormal(0, 1)}
    user = rk.SparseFeature("u", 20, D, initializer=rk.RandomNormal(0, 1))
    history = rk.SequenceFeature("history", pooling="concat", shared_with="i", **item)
    return rk.DIN([user, rk.DenseFeature("age")], [history], [rk.SparseFeature("i", **item)], {"dims": [16]},
                  {"dims": [12], "activation": "dice"}, mask_padding=True)  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = {"u": torch.randint(20, (B,)), "i": torch.randint(1, 30, (B,)), "age": torch.rand(B)}
    lengths = torch.randint(1, L + 1, (B, 1))
    lengths[2] = 0  # an empty history
    padded = torch.arange(L) >= lengths
    return x | {name: torch.randint(1, rows, (B, L)).masked_fill(padded, 0) for name, rows in
                (("tags", 9), ("history", 30))}  # fmt: skip


class OnTorchRec(nn.Module):
    """A model of ours in parts: tables of TorchRec's, and an arch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.is_din = isinstance(model, rk.DIN)
        if self.is_din:
            self.features = [*model.features, *model.history_features, *model.target_features]
            self.bags = rktr.collection_of(model, model.features, pooled=True)
            self.rows = rktr.collection_of(model, self.features[len(model.features) :], pooled=False)
            self.arch = rktr.DINArch(D, ["history"], ["i"], {"dims": [16]}, {"dims": [12], "activation": "dice"},
                                     keys=["u"], dense_dim=1)  # fmt: skip
        else:
            self.features = model.deep_features
            self.bags = rktr.collection_of(model, model.deep_features, pooled=True)
            self.arch = rktr.DeepFMArch(["u", "i", "tags"], D, {"dims": [16]}, dense_dim=1)
        self.arch.load_state_dict(rktr.dense_state_dict(model))

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        jagged, dense = rktr.keyed_jagged_of(x, self.features), x["age"][:, None]
        if self.is_din:
            return self.arch(self.rows(jagged), self.bags(jagged), dense)
        return self.arch(self.bags(jagged), dense)


@pytest.mark.parametrize("make", [deepfm, din])
def test_as_our_model(make):
    """Outputs, and after steps the weights, which come back."""
    ours, parts, x = make(), OnTorchRec(make()), batch()
    models = ours, parts
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in models]
    for _ in range(3):
        outs = [m(x) for m in models]
        torch.testing.assert_close(*outs)
        for optimizer, out in zip(optimizers, outs):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
    back = make()
    back.load_state_dict(parts.arch.state_dict(), strict=False)
    rktr.load_collection(back, parts.bags)
    if make is din:
        rktr.load_collection(back, parts.rows)
    for (name, a), b in zip(ours.state_dict().items(), back.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    assert not torch.equal(back.mlp.mlp[0].weight, make().mlp.mlp[0].weight)


@pytest.mark.parametrize("make", [deepfm, din])
def test_our_models_take_keyed_jagged_tensors(make):
    model, x = make().eval(), batch()
    features = model.deep_features if make is deepfm else OnTorchRec(model).features
    again = rktr.batch_of(rktr.keyed_jagged_of(x, features), features, {"age": x["age"]})
    torch.testing.assert_close(model(again), model(x))


def test_torchrecs_own_is_no_factorization_machine():
    """It adds up products of different columns, of one field and of two."""
    x = torch.randn(4, 3, D, dtype=torch.float64)
    theirs = FactorizationMachine()([x])
    flat = x.flatten(1)
    torch.testing.assert_close(theirs, (flat.sum(1, keepdim=True) ** 2 - (flat**2).sum(1, keepdim=True)) / 2)
    pairs = sum((x[:, f] * x[:, g]).sum(1, keepdim=True) for f in range(3) for g in range(f))
    torch.testing.assert_close(rk.fm_interaction(x), pairs)
    assert not torch.allclose(theirs, pairs)
    torch.testing.assert_close(FactorizationMachine()([x[:, :, :1]]), rk.fm_interaction(x[:, :, :1]))  # of one column


def test_wrong_arguments():
    parts, x = OnTorchRec(deepfm()), batch()
    jagged = rktr.keyed_jagged_of(x, parts.features)
    with pytest.raises(ValueError, match=r"DeepFMArch: dense features must be \[B, 1\], got none"):
        parts.arch(parts.bags(jagged))
    with pytest.raises(ValueError, match="DINArch: each history needs its target"):
        rktr.DINArch(D, ["a", "b"], ["c"], {}, {})
    with pytest.raises(ValueError, match="sparse feature 'tags' must have one id a sample"):
        rktr.batch_of(jagged, [rk.SparseFeature("tags", 9, D)])
    with pytest.raises(ValueError, match="history 'tags' has no padding_idx"):
        rktr.batch_of(jagged, [rk.SequenceFeature("tags", 9, D, "concat")])


def parts_of_deepfm() -> nn.Module:
    return OnTorchRec(deepfm())


def parts_of_din() -> nn.Module:
    return OnTorchRec(din())


def labelled(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(B, generator=generator)[: B // 2 * 2]
    return {name: column[order] for name, column in batch().items()} | {"label": (order % 2).float()}


@pytest.fixture(scope="module")
def trained():
    """What each of some processes trained."""
    makes = parts_of_deepfm, parts_of_din
    return functools.cache(lambda n: run(n, train_all, makes, labelled))


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("make", [parts_of_deepfm, parts_of_din])
def test_processes_with_sharded_tables_train_as_one(trained, make, processes):
    """Under DistributedModelParallel, by tables and by rows, the tables' optimizer in the backward."""
    found = [of_rank[make.__name__] for of_rank in trained(processes)]
    parts, losses = make(), []
    optimizer = torch.optim.SGD(parts.parameters(), lr=LR)
    for step in range(STEPS):
        x = labelled(step)
        loss = nn.functional.binary_cross_entropy(parts(x), x["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for way in WAYS:
        together = [sum(of_step) / processes for of_step in zip(*(of_rank[way][0] for of_rank in found))]
        torch.testing.assert_close(together, losses, rtol=1e-5, atol=1e-6)
        rows = 0
        for of_rank in found:
            for name, shards in of_rank[way][1].items():
                for row, values in shards:
                    torch.testing.assert_close(values, parts.state_dict()[name][row : row + len(values)])
                    rows += len(values)
        assert rows == sum(len(value) for name, value in parts.state_dict().items() if "embedding" in name)
