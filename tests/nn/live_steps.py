"""Optimizers whose numbers are on the tables' device, with the ops' definitions and the CPU in the place of a GPU.
test_live_steps.py runs this file in a process of its own, with RANKKERNELS_REFERENCE."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from rankkernels import _live_steps, optim
from rankkernels.nn import EmbeddingLayer, SparseFeature

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
OPTIMIZERS = {
    "sgd": optim.SGD, "adagrad": lambda p, **o: optim.Adagrad(p, lr_decay=0.1, **o), "adam": optim.Adam,
    "adamw": optim.AdamW, "rowwise_adagrad": optim.RowWiseAdagrad, "rowwise_adam": optim.RowWiseAdam,
    "rowwise_rmsprop": lambda p, **o: optim.RowWiseRMSprop(p, ar_alpha=0.1, **o),
    "ftrl": lambda p, **o: optim.FTRL(p, l1=0.01, **o),
}  # fmt: skip
FEATURES = [SparseFeature(name, 7, 4) for name in ("a", "b", "c")]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(_live_steps, "is_live", lambda tables: True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = EmbeddingLayer(FEATURES)

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = {f.name: torch.randint(7, (5,), generator=generator) for f in FEATURES}
        out = self.embedding(x, FEATURES, squeeze_dim=True)
        return (out * torch.randn(out.shape, generator=generator)).sum()


def trained(make, seeds, scaler=None, rates=None, **options) -> tuple[Model, optim.RowOptimizer]:
    model = Model()
    optimizer = make(model.parameters(), lr=0.1, **options)
    optim.fuse(model, optimizer, grad_scaler=scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) if rates else None
    for seed in seeds:
        loss = model.loss(abs(seed)) * (torch.inf if seed < 0 else 1)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if schedule is not None:
            schedule.step()
    return model, optimizer


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capturable_steps_are_the_others(name):
    rates = name != "ftrl"  # which keeps its rate
    expected, _ = trained(OPTIMIZERS[name], range(5), rates=rates)
    model, optimizer = trained(OPTIMIZERS[name], range(5), rates=rates, capturable=True)
    assert_same(model, expected)
    assert all(float(state["step"]) == 5 for state in optimizer.state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("capturable", [False, True])
def test_what_is_infinite_takes_no_step(name, capturable):
    expected, _ = trained(OPTIMIZERS[name], [1, 3])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = trained(OPTIMIZERS[name], [1, -2, 3], scaler, capturable=capturable)
    assert_same(model, expected)
    assert all(isinstance(state["step"], torch.Tensor) and state["step"] == 2 for state in optimizer.state.values())


def test_one_of_many_features_is_infinite():
    model, optimizer = trained(optim.Adam, [], torch.amp.GradScaler("cpu"))
    before = copy.deepcopy(model.state_dict())
    for f in FEATURES:
        x = {g.name: torch.tensor([1, 2]) for g in FEATURES}
        out = model.embedding(x, FEATURES, squeeze_dim=False)
        factor = torch.ones(3, 1)
        factor[FEATURES.index(f)] = torch.nan
        optimizer.grad_scaler.scale((out * factor).sum()).backward()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_steps_with_sparse_gradients_read_what_the_scaler_knows():
    table = nn.Parameter(torch.ones(5, 2))
    optimizer = optim.Adam([table], lr=0.1)
    table.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 2), 8.0), (5, 2), is_coalesced=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([4.0]), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(table, torch.ones(5, 2)) and optimizer.state[table]["step"] == 0
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert torch.allclose(table[1], torch.tensor(0.9)) and optimizer.state[table]["step"] == 1
    assert torch.allclose(optimizer.state[table]["exp_avg"][1], torch.tensor(0.2))


def test_a_graph_takes_capturable_steps_alone(monkeypatch):
    model, optimizer = trained(optim.Adam, [1])
    other, capturable = trained(optim.Adam, [], capturable=True)
    monkeypatch.setattr(_live_steps, "is_captured", lambda tables: True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="Adam: a CUDA graph would repeat .* capturable=True"):
        model.loss(2).backward()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Adam: take a step before a CUDA graph is captured"):
        other.loss(2).backward()
    monkeypatch.undo()
    monkeypatch.setattr(_live_steps, "is_live", lambda tables: True)
    other.loss(1).backward()
    monkeypatch.setattr(_live_steps, "is_captured", lambda tables: True)
    other.loss(2).backward()
    assert all(state["step"] == 2 for state in capturable.state.values())


def test_saved_and_loaded():
    model, optimizer = trained(optim.Adam, [1, 2], capturable=True)
    again = pickle.loads(pickle.dumps(optimizer))
    assert again._live.capturable and [float(s["step"]) for s in again.state.values()] == [2.0] * 3
    plain = optim.Adam(Model().parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert all(s["step"] == 2 for s in plain.state.values()) and float(plain.param_groups[0]["lr"]) == pytest.approx(
        0.1
    )
    optimizer.load_state_dict(plain.state_dict())
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    model.loss(3).backward()
    expected, _ = trained(optim.Adam, [1, 2, 3])
    assert_same(model, expected)
    torchs = torch.optim.Adam(Model().parameters())
    optim.to_torch(optimizer, torchs)
    assert all(s["step"] == 3 for s in torchs.state.values())


def test_what_is_not_capturable(monkeypatch):
    tables = [nn.Parameter(torch.zeros(3, 2))]
    with pytest.raises(ValueError, match="exact=True counts on the host"):
        optim.Adam(tables, exact=True, capturable=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="capturable=True the tables of a group must be on one GPU"):
        optim.Adam(tables, capturable=True)
