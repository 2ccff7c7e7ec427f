"""accelerate on models that something else holds or has changed: compiled, parallel, copied, without memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rankkernels as rk

features_ = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
ranking = pytest.importorskip("torch_rechub.models.ranking")
B, L, V, D = 6, 5, 20, 4


def lists() -> tuple[list, list, list]:
    user, item = features_.SparseFeature("user", V, D), features_.SparseFeature("item", V, D, padding_idx=0)
    history = features_.SequenceFeature("history", V, D, pooling="concat", shared_with="item", padding_idx=0)
    return [user], [history], [item]


def din() -> nn.Module:
    torch.manual_seed(0)
    model = ranking.DIN(*lists(), {"dims": [5]}, {"dims": [4]})
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"user": (B,), "item": (B,), "history": (B, L)}
    return {name: torch.randint(0, V, shape, generator=generator) for name, shape in shapes.items()}


def outcome(wrapped: nn.Module) -> list[torch.Tensor]:
    """The output, gradients by parameter, and the buffers after one step's forward and backward."""
    wrapped.zero_grad()
    y = wrapped(batch())
    y.sin().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in wrapped.parameters()), *(b.clone() for b in wrapped.buffers())]


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    return model


WRAPPERS = {
    "compile": compiled,
    "compile_in_place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "Sequential": nn.Sequential,
}


def assert_there_and_back(wrapped: nn.Module, called_before: bool = False):
    """Accelerated, ``wrapped`` is what it was; restored, it is so bit for bit."""
    expected, state = outcome(din()), list(wrapped.state_dict())
    if called_before:
        wrapped.eval(), wrapped(batch()), wrapped.train()  # compiled by now
    assert rk.accelerate(wrapped) is wrapped and list(wrapped.state_dict()) == state
    report = rk.explain(wrapped)
    assert len(report.replaced) == 8 and all(e.done for e in report.replaced) and not report.left
    before = [b.clone() for b in wrapped.buffers()]
    torch.testing.assert_close(outcome(wrapped), expected, rtol=1e-4, atol=1e-5)
    for buffer, value in zip(wrapped.buffers(), before):
        buffer.copy_(value)
    rk.restore(wrapped)
    assert not any(e.done for e in rk.explain(wrapped).entries)
    assert all(map(torch.equal, outcome(wrapped), expected))


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped(wrap, called_before):
    assert_there_and_back(WRAPPERS[wrap](din()), called_before)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert_there_and_back(nn.parallel.DistributedDataParallel(din()))
    finally:
        dist.destroy_process_group()


def test_copies_are_accelerated_each_on_its_own():
    model = din()
    rk.accelerate(copy.deepcopy(model))
    assert not any(e.done for e in rk.explain(model).entries)
    assert_there_and_back(copy.deepcopy(model))
    assert_there_and_back(model)


def test_an_optimizer_keeps_its_parameters():
    """Accelerated between two steps, training goes on as if nothing had happened."""
    models = [din(), din()]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in models]
    for step in range(4):
        if step == 2:
            rk.accelerate(models[0])
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(batch()).sin().sum().backward()
            optimizer.step()
    y = [model.eval()(batch()) for model in models]
    torch.testing.assert_close(y[0], y[1], rtol=1e-3, atol=1e-4)


def test_meta_device():
    with torch.device("meta"):
        model = ranking.DIN(*lists(), {"dims": [5]}, {"dims": [4]})
    assert all(e.done for e in rk.explain(rk.accelerate(model)).replaced)
    assert model({name: ids.to("meta") for name, ids in batch().items()}).shape == (B,)
    model.to_empty(device="cpu").load_state_dict(din().state_dict())
    torch.testing.assert_close(outcome(model), outcome(din()), rtol=1e-4, atol=1e-5)
