"""accelerate, explain and restore, whatever the library: what they touch, what they say, and the way back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rankkernels as rk

features_ = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
basic = pytest.importorskip("torch_rechub.basic.layers")
ranking = pytest.importorskip("torch_rechub.models.ranking")


def deepfm() -> nn.Module:
    torch.manual_seed(0)
    features = [features_.SparseFeature(name, 20, 4) for name in ("user", "item")]
    return ranking.DeepFM(features, features, {"dims": [5], "activation": "dice"})


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(0, 20, (7,), generator=generator) for name in ("user", "item")}


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def attributes(model: nn.Module) -> list[list[str]]:
    return [list(m.__dict__) for m in model.modules()]


def test_there_and_back():
    model, untouched = deepfm().eval(), deepfm().eval()
    state, parameters = model.state_dict(), list(model.parameters())
    assert rk.restore(model) is model and classes(model) == classes(untouched)
    for _ in range(2):
        assert rk.accelerate(rk.accelerate(model)) is model
        assert type(model) is rk.DeepFM and type(model.mlp.mlp[2]) is rk.Dice
        model(batch()).sum().backward()  # leaves plans behind
        assert list(model.state_dict()) == list(state) and all(a is b for a, b in zip(model.parameters(), parameters))
        assert rk.restore(model) is model
        assert classes(model) == classes(untouched) and attributes(model) == attributes(untouched)
        assert torch.equal(model(batch()), untouched(batch()))


def test_explain_changes_nothing_and_says_it_all():
    model = nn.Sequential(deepfm(), basic.SumPooling(), nn.Linear(2, 2), nn.EmbeddingBag(3, 4))
    before = classes(model), attributes(model)
    report = rk.explain(model)
    assert (classes(model), attributes(model)) == before
    assert [e.path for e in report.left] == ["1"] and "no kernel" in report.left[0].reason
    assert not any(e.done for e in report.entries) and len(report.replaced) == 8
    assert ("3", "torch", "rankkernels.nn.embedding_bag.EmbeddingBag") in [
        (e.path, e.library, e.replaced_by) for e in report.entries
    ]
    rk.accelerate(model)
    after = rk.explain(model)
    assert [(e.path, e.cls, e.library, e.replaced_by) for e in after.entries] == [
        (e.path, e.cls, e.library, e.replaced_by) for e in report.entries
    ]
    assert all(e.done for e in after.replaced)
    lines = str(after).splitlines()
    assert lines[0] == "Sequential: 8 layers are replaced, 0 more can be, 1 are left"
    assert any(line.split()[:2] == ["0.mlp.mlp.2", "Dice"] for line in lines)


def test_explain_says_what_dense_gradients_cost(caplog):
    """Bytes by count: 8 values of every row, or 9 and three last steps of every row looked up."""
    model = nn.Sequential(deepfm(), nn.Embedding(100, 6), nn.EmbeddingBag(9, 2, sparse=True))
    model[1].half()
    tables = rk.explain(model).tables
    paths = [f"0.embedding.embed_dict.{name}.weight" for name in ("user", "item")]
    assert [(t.path, t.rows, t.width, t.value_bytes, t.can_be_fused) for t in tables] == [
        *((path, 20, 4, 4, True) for path in paths), ("1.weight", 100, 6, 2, False)
    ]  # fmt: skip
    assert [t.dense_bytes for t in tables] == [2560, 2560, 9600]
    assert [t.exact_bytes_a_row for t in tables] == [156, 156, 6 * 3 * (2 + 8) + 12]
    said = str(rk.explain(model)).splitlines()[-3:]
    assert said[0].startswith(
        "3 tables get dense gradients: 140 rows, 1.84 kB. A step of Adam moves all of them, 14.7 kB "
    )
    assert "rankkernels.optim.Adam(parameters of 2 of the tables, exact=True)" in said[1]
    assert "8,192 rows: 1.28 MB in place of 5.12 kB; 16 samples move as much" in said[2]
    with caplog.at_level("INFO", "rankkernels"):
        rk.accelerate(model)
    assert caplog.messages[0].splitlines()[-3:] == said
    model[0].embedding.embed_dict["user"].weight.requires_grad_(False)
    assert [t.path for t in rk.explain(model).tables] == [paths[1], "1.weight"]
    tables = model[0].embedding.requires_grad_().parameters()
    rk.optim.fuse(model[0], rk.optim.Adam(tables, exact=True))
    report = rk.explain(model)
    assert [t.path for t in report.tables] == ["1.weight"] and "optim.fuse" not in str(report)
    model[1].requires_grad_(False)
    assert not rk.explain(model).tables and "dense gradients" not in str(rk.explain(model))


def test_a_model_without_a_known_layer():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="Sequential has no layer of torch-rechub, FuxiCTR or DeepCTR-Torch"):
        assert rk.accelerate(model) is model
    assert not rk.explain(model).entries
    with pytest.warns(UserWarning, match="0 layers are replaced, 0 more can be, 1 are left"):
        rk.accelerate(basic.SumPooling())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = rk.accelerate(rk.FM())
    assert rk.explain(ours).entries[0].reason == "it is one of ours" and type(rk.restore(ours)) is rk.FM


def test_subclasses_are_left():
    class Mine(basic.MLP):
        pass

    with pytest.warns(UserWarning, match="a subclass of MLP: only its author knows"):
        assert type(rk.accelerate(Mine(3))) is Mine


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_the_way_back(copied):
    model = copied(rk.accelerate(deepfm()))
    assert type(model) is rk.DeepFM and classes(rk.restore(model)) == classes(deepfm())


def test_restore_refuses_what_would_be_lost():
    model = rk.accelerate(deepfm())
    parametrize.register_parametrization(model.mlp.mlp[2], "alpha", nn.Tanh())
    with pytest.raises(RuntimeError, match=r"restore: mlp\.mlp\.2 is a ParametrizedDice since it was accelerated"):
        rk.restore(model)
    assert type(model) is rk.DeepFM
    parametrize.remove_parametrizations(model.mlp.mlp[2], "alpha")
    rk.optim.fuse(model, rk.optim.Adagrad(model.embedding.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="restore: the tables of embedding are stepped by a fused optimizer"):
        rk.restore(model)
