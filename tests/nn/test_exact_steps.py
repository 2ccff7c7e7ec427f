"""Exact Adam under every kind of backward, against torch's dense optimizer; restarts; whole models."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exact_adam import bag, close, draw, make
from failing import Fails
from torch.utils.checkpoint import checkpoint

import rankkernels as rk
from rankkernels.ops import _exact_table

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")


def ids(step: int) -> torch.Tensor:
    return draw(step)[0][:, None]


# Each yields where a step follows: torch's and a stepped one; a fused one has stepped by then.


def twice(look_up, step):
    (look_up(ids(step)).sin() * look_up(ids(step + 500)).cos()).sum().backward()
    yield


def kept_for_a_second_backward(look_up, step):
    loss = look_up(ids(step)).sin().sum()
    loss.backward(retain_graph=True)
    yield
    loss.backward()
    yield


def two_forwards_before_two_backwards(look_up, step):
    losses = [look_up(ids(i)).sin().sum() for i in (step, step + 500)]
    losses[1].backward()
    yield
    losses[0].backward()
    yield


def checkpointed(look_up, step):
    halves = [checkpoint(look_up, ids(i), use_reentrant=False) for i in (step, step + 500)]
    (halves[0].sin() * halves[1]).sum().backward()
    yield


def without_grad(look_up, step):
    with torch.no_grad():
        look_up(ids(step + 700))
    look_up(ids(step)).sin().sum().backward()
    yield


def failed(look_up, step):
    with pytest.raises(ArithmeticError):
        Fails.apply(look_up(ids(step))).sum().backward()
    look_up(ids(step + 500)).sin().sum().backward()
    yield


def asked_by_name(look_up, step):
    (grad,) = torch.autograd.grad(look_up(ids(step)).sin().sum(), look_up.weight)
    look_up(ids(step + 500)).mul(1 + grad.to_dense().sum()).sum().backward()
    yield


BACKWARDS = [twice, kept_for_a_second_backward, two_forwards_before_two_backwards, checkpointed, without_grad, failed,
             asked_by_name]  # fmt: skip


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stepped"])
def test_backwards(backward, fused):
    module, optimizer = make("AdamW", fused)
    dense = bag()
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(25):
        for look_up, take_step in ((module, optimizer.step), (dense, theirs.step)):
            for _ in backward(look_up, step):
                take_step()
                look_up.weight.grad = None
    close(module.weight, dense.weight)
    assert optimizer.state[module.weight]["step"] == theirs.state[dense.weight]["step"]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stepped"])
def test_scaled_losses(fused):
    """A power of two as the scale changes no bit; an overflow is no step at all."""
    results = []
    for scale in (None, 1024.0):
        module, optimizer = make("Adam", fused, bag(dtype=torch.float32, sparse=not fused))
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        if fused:
            rk.optim.fuse(module, optimizer, grad_scaler=scaler)
        for step in range(20):
            module.zero_grad()
            loss = module(ids(step)).sin().sum()
            if scaler is None:
                loss.backward()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if not fused:
                scaler.step(optimizer)
                scaler.update()
            if fused and step == 10:
                (scaler.scale(module(ids(step)).sum()) * torch.inf).backward()
        results.append(module.weight.detach())
        assert optimizer.state[module.weight]["step"] == 20
    assert torch.equal(*results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_and_resumed_thirty_times(tmp_path):
    """By SIGKILL at random moments, in a step or while it saves: each time from the last whole file. Bit for bit what a
    process comes to that saves as often and is never disturbed."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rk.__file__).parents[1])}
    done = subprocess.run([sys.executable, here / "killed.py", tmp_path], env=environment, text=True, timeout=120,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, disturbed, undisturbed = done.stdout.split()
    assert int(killed) == 30 and disturbed == undisturbed


@pytest.fixture
def read_behind(monkeypatch):
    """embedding_fm reads rows that lag behind, as on a GPU."""
    module = importlib.import_module("rankkernels.ops.embedding_fm")
    monkeypatch.setattr(module, "_is_read_behind", _exact_table.lag_behind)


def trained_fm(lookups: int, autocast: bool, steps: int = 6) -> list[torch.Tensor]:
    """What ``embedding_fm`` returns in steps of exact Adam with so many lookups each, its other inputs' gradients,
    and the tables in the end."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.nn.Parameter(torch.randn(R, 4, generator=generator)) for R in (30, 20)]
    optimizer, found = rk.optim.Adam(tables, lr=0.1, exact=True), []
    for _ in range(steps):
        loss = torch.zeros(())
        for _ in range(lookups):
            linear, dense = (torch.randn(n, generator=generator).requires_grad_() for n in ((1, 8), (5, 3)))
            ids = [torch.randint(R, (5,), generator=generator) for R in (30, 20)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outs = rk.ops.embedding_fm(tables, ids, linear, dense, optimizer=optimizer)
            found += [linear, dense, *outs]
            loss = loss + sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)
        loss.backward()
    return [t for f in found for t in (f.detach(), f.grad) if t is not None] + [t.detach() for t in tables]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_fm_of_rows_that_lag_behind_is_that_of_rows_up_to_date(lookups, autocast, request):
    expected = trained_fm(lookups, autocast)
    request.getfixturevalue("read_behind")
    actual = trained_fm(lookups, autocast)
    assert [t.dtype for t in actual] == [torch.float32] * len(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["up to date", "behind"])
def test_deepfm_has_the_losses_of_torch_rechub_with_dense_adam(way, request):
    if way == "behind":
        request.getfixturevalue("read_behind")
    rechub = pytest.importorskip("torch_rechub.models.ranking")
    from torch_rechub.basic.features import DenseFeature, SparseFeature

    torch.manual_seed(0)
    features = [SparseFeature(f"c{i}", 300, 8) for i in range(4)]
    deep = [*features, DenseFeature("age")]
    theirs = rechub.DeepFM(deep, features, {"dims": [16], "dropout": 0})
    with torch.no_grad():
        for table in theirs.embedding.parameters():
            table.mul_(500)
    ours = rk.DeepFM([rk.SparseFeature(f.name, 300, 8) for f in features] + [rk.DenseFeature("age")],
                     [rk.SparseFeature(f.name, 300, 8) for f in features], {"dims": [16], "dropout": 0})  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    rk.optim.fuse(ours, rk.optim.Adam(ours.embedding.parameters(), lr=1e-3, exact=True))
    rest = [p for name, p in ours.named_parameters() if not name.startswith("embedding.")]
    optimizers = [torch.optim.Adam(theirs.parameters(), lr=1e-3), torch.optim.Adam(rest, lr=1e-3)]
    hidden = torch.randn(4, 300)
    for _ in range(50):
        x = {f"c{i}": (torch.rand(64) ** 3 * 300).long() for i in range(4)} | {"age": torch.rand(64)}
        y = (sum(hidden[i][x[f"c{i}"]] for i in range(4)) > 0).float()
        losses = [F.binary_cross_entropy(model(x), y) for model in (ours, theirs)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for model, loss in zip((ours, theirs), losses):
            model.zero_grad()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, their in zip(ours.embedding.parameters(), theirs.embedding.parameters()):
        torch.testing.assert_close(mine.detach(), their.detach(), rtol=1e-4, atol=1e-5)
