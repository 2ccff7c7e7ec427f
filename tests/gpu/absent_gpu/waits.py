"""A training step on a GPU waits for nothing: steps of models on CUDA tensors without memory, where reading a value
raises. test_cuda_tracing.py runs this file in a process of its own, by run.py.
"""

from __future__ import annotations

import pytest
import torch
from configurations import Calls
from graphs import WAITING, deepfm, din, loss, on_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bench.gpu import exact_adam
from rankkernels import optim
from rankkernels.nn import EmbeddingBag
from rankkernels.ops import _table


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Those in CUDA C++ are there."""
    found = _table.Op.kernel
    monkeypatch.setattr(_table.Op, "kernel", lambda op, device: op.cuda if device == "cuda" else found(op, device))


def waits(step) -> list[str]:
    """The ops that wait in the second of two steps: the first makes what all others keep."""
    step()
    with Calls() as calls:
        step()
    assert any(name.startswith("rankkernels::") for name in calls.names)
    return [name for name in calls.names if name in WAITING]


def backward(loss: torch.Tensor, scaler: torch.amp.GradScaler | None) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()


OPTIMIZERS = {
    "sgd": optim.SGD, "adagrad": lambda p, **o: optim.Adagrad(p, lr_decay=0.1, **o), "adam": optim.Adam,
    "rowwise_rmsprop": optim.RowWiseRMSprop, "ftrl": optim.FTRL,
}  # fmt: skip


@pytest.mark.parametrize("make", [deepfm, din])
@pytest.mark.parametrize("way", ["dense", "fused", "scaled", "capturable", "scaled capturable"])
def test_a_step_waits_for_nothing(make, way):
    mode, model, x, y = on_cuda(make)
    with mode:
        scaler = torch.amp.GradScaler("cpu") if "scaled" in way else None  # without a GPU, "cuda" turns it off
        if way != "dense":
            tables = optim.Adam(model.embedding.parameters(), capturable="capturable" in way)
            optim.fuse(model, tables, grad_scaler=scaler)
        assert waits(lambda: backward(loss(model, x, y), scaler)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_waits_for_a_scaler(name):
    mode, model, x, y = on_cuda(deepfm)
    with mode:
        scaler = torch.amp.GradScaler("cpu")
        optim.fuse(model, OPTIMIZERS[name](model.embedding.parameters(), lr=0.1), grad_scaler=scaler)
        assert waits(lambda: backward(loss(model, x, y), scaler)) == []


class Waits(Calls):
    """The ops that wait, copies between host and device among them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if self.names[-1] not in WAITING and len(devices) < 2:
            del self.names[-1]
        return result


@pytest.mark.parametrize("make", [deepfm, din])
@pytest.mark.parametrize("wait", [False, True])
def test_no_step_of_exact_adam_waits(make, wait):
    """On meta tensors, as no table under it is a fake one, with what Triton's launches call. 64 fill a history."""
    compiling = pytest.importorskip("bench.gpu.ahead_of_time", reason="Triton is not installed").compiling
    with torch.device("meta"):
        model, x, y = make(B=48, rows=30)
    optim.fuse(model, optim.Adam(model.embedding.parameters(), exact=True))

    def step() -> None:
        loss(model, x, y).backward()
        if wait:
            torch.ones(3).to(y.device)

    with compiling("sm_90", only_counting=True):
        step()
    with Waits() as waits, compiling("sm_90", only_counting=True) as calls:
        for _ in range(2 if wait else 65):
            step()
    assert {"adam_history"} < {call.op for call in calls}
    assert waits.names == ["_to_copy"] * 2 * wait


@pytest.mark.parametrize("op", exact_adam.LOOKUPS)
def test_no_step_of_the_gpu_check_waits(op):
    """It counts the launches of steps in which a wait raises."""
    compiling = pytest.importorskip("bench.gpu.ahead_of_time", reason="Triton is not installed").compiling
    training = exact_adam.Training(exact_adam.LOOKUPS[op], exact_adam.exact_adam, torch.device("meta"), torch.float32)
    counts = []
    for number in range(exact_adam.STEPS):
        with Waits() as waits, compiling("sm_90", only_counting=True) as calls:
            training.step(number)
        counts.append(sum(len(call.launches) for call in calls))
        assert waits.names == [] or number == 0
    assert len(set(counts[exact_adam.FIRST_STEPS :])) == 1


def test_bags_with_their_last_offset_wait_for_nothing():
    bags = EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        bags = bags.to("cuda:0")
        optim.fuse(bags, optim.Adam(bags.parameters()))
        ids, offsets = (torch.zeros(n, dtype=torch.long, device="cuda:0") for n in (7, 4))
        assert waits(lambda: bags(ids, offsets).sum().backward()) == []


def test_a_wait_is_noticed():
    mode, model, x, y = on_cuda(deepfm)

    def step() -> None:
        loss(model, x, y).backward()
        y.sum().item()

    with mode:
        assert waits(step) == ["_local_scalar_dense"]
