"""What a training loop does around table optimizers, fused and stepped: each has one right value, or an error."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
FUSED = pytest.mark.parametrize("fused", [True, False])


class Scores(nn.Module):
    """A table and a layer behind it."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.table = rk.EmbeddingBag(20, 4, mode="sum", sparse=sparse)
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids).sin())


def make(fused: bool, kind: str = "Adam", **options):
    torch.manual_seed(0)
    model = Scores(sparse=not fused).double()
    optimizer = getattr(rk.optim, kind)(model.table.parameters(), lr=0.1, **options)
    if fused:
        rk.optim.fuse(model, optimizer)
    return model, optimizer


def ids(step: int) -> torch.Tensor:
    return torch.randint(0, 15, (6, 3), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(ids(step)).sum().backward()
        optimizer.step()


def trained(steps, kind: str = "Adam", **options) -> torch.Tensor:
    """The table after plain steps: what a loop with more in it is compared with."""
    model, optimizer = make(False, kind, **options)
    train(model, optimizer, steps)
    return model.table.weight.detach()


def close(table: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(table.detach(), expected, rtol=1e-12, atol=1e-12)


@FUSED
def test_no_grad(fused):
    """A forward that records nothing steps on nothing, whatever follows it."""
    model, optimizer = make(fused)
    with torch.no_grad():
        out = model(ids(0))
    with torch.inference_mode():
        model(ids(0))
    assert not out.requires_grad and not optimizer.state
    train(model, optimizer, range(2))
    close(model.table.weight, trained(range(2)))


@FUSED
def test_a_frozen_table(fused):
    """Looked up without a gradient it may be; a fused one that is to be trained is refused."""
    model, optimizer = make(fused)
    model.table.weight.requires_grad_(False)
    before = model.table.weight.clone()
    with torch.no_grad():
        model(ids(0))
    if fused:
        with pytest.raises(ValueError, match=r"Adam: table 0 of shape \[20, 4\] is frozen"):
            model(ids(0))
    else:
        model(ids(0)).sum().backward()
        optimizer.step()
    assert torch.equal(model.table.weight, before) and not optimizer.state
    model.table.weight.requires_grad_()
    train(model, optimizer, range(2))
    close(model.table.weight, trained(range(2)))


def test_gradient_accumulation():
    """Stepped: one step with the sum. Fused: each backward is a step, as of a loop without accumulation."""
    model, optimizer = make(False)
    for step in range(2):
        model(ids(step)).sum().backward()
    optimizer.step()
    expected, other = make(False)
    (expected(ids(0)).sum() + expected(ids(1)).sum()).backward()
    other.step()
    close(model.table.weight, expected.table.weight.detach())
    model, optimizer = make(True)
    for step in range(2):
        model(ids(step)).sum().backward()
    close(model.table.weight, trained(range(2)))
    assert optimizer.state[model.table.weight]["step"] == 2


@FUSED
@pytest.mark.parametrize("pieces", [1, 2])
def test_checkpointing(fused, pieces):
    """The forward runs again in the backward, and reads the rows as they were; the step is one."""
    model, optimizer = make(fused)
    sum(checkpoint(model, ids(i), use_reentrant=False).sum() for i in range(pieces)).backward()
    optimizer.step()
    expected, other = make(False)
    sum(expected(ids(i)).sum() for i in range(pieces)).backward()
    other.step()
    close(model.table.weight, expected.table.weight.detach())
    assert optimizer.state[model.table.weight]["step"] == 1


def test_reentrant_checkpointing():
    """Its backward inside of the backward is refused fused: later pieces would look up rows that have stepped."""
    model, optimizer = make(True)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    before = model.table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a fused optimizer cannot step in a backward inside of a backward.*=False"):
        checkpoint(lambda ids, s: model(ids) * s, ids(0), scale, use_reentrant=True).sum().backward()
    assert torch.equal(model.table.weight, before) and not optimizer.state
    train(model, optimizer, range(2))
    close(model.table.weight, trained(range(2)))


@FUSED
def test_a_second_backward(fused):
    """Of a graph that is kept: another step with the gradient at the rows that were looked up."""
    model, optimizer = make(fused)
    loss = model.table(ids(0)).sum()
    for _ in range(2):
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
    expected, other = make(False)
    for _ in range(2):
        other.zero_grad()
        expected.table(ids(0)).sum().backward()  # a sum's gradient does not depend on the rows
        other.step()
    close(model.table.weight, expected.table.weight.detach())


def test_a_second_backward_that_needs_the_rows():
    """A maximum's does, and they have stepped: an error, as autograd's for any tensor that was changed in place."""
    torch.manual_seed(0)
    table = rk.EmbeddingBag(20, 4, mode="max")
    rk.optim.fuse(table, rk.optim.SGD(table.parameters(), lr=0.1))
    loss = table(ids(0)).sum()
    loss.backward(retain_graph=True)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(table.weight, before)


@FUSED
def test_an_exception_between_forward_and_backward(fused):
    """The batch is lost, no step is taken; the graph it leaves behind does not hold back the steps that follow."""
    model, optimizer = make(fused)
    train(model, optimizer, range(1))
    kept = None
    try:
        kept = model(ids(7)).sum()
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    train(model, optimizer, range(1, 3))
    close(model.table.weight, trained(range(3)))
    assert kept.requires_grad and optimizer.state[model.table.weight]["step"] == 3


@FUSED
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(fused, set_to_none):
    """Between forward and backward, and after it: no step is lost or doubled."""
    model, optimizer = make(fused)
    for step in range(3):
        loss = model(ids(step)).sum()
        if set_to_none or fused:  # torch cannot zero a sparse gradient and keep it coalesced
            model.zero_grad(set_to_none)
        else:
            model.zero_grad()
        optimizer.zero_grad(set_to_none)
        loss.backward()
        optimizer.step()
    close(model.table.weight, trained(range(3)))


@FUSED
def test_a_learning_rate_scheduler(fused):
    """Step t has the rate of step t, and the scheduler sees that the optimizer has stepped, with step() or without."""
    model, optimizer = make(fused)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    expected, other = make(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.zero_grad()
            model(ids(step)).sum().backward()
            if not fused:
                optimizer.step()
            scheduler.step()
    for step in range(3):
        other.param_groups[0]["lr"] = 0.1 * 0.5**step
        train(expected, other, [step])
    close(model.table.weight, expected.table.weight.detach())


@FUSED
@pytest.mark.parametrize("way", ["swa", "ema"])
def test_averaged_models(fused, way):
    """The average is of the tables as they were after each step; its own table and optimizer state stay apart."""
    model, optimizer = make(fused)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if way == "ema" else None)
    tables = []
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        tables.append(model.table.weight.detach().clone())
    expected = tables[0]
    for table in tables[1:]:
        expected = 0.9 * expected + 0.1 * table if way == "ema" else expected
    close(average.module.table.weight, expected if way == "ema" else torch.stack(tables).mean(0))
    close(tables[-1], trained(range(4)))
    average.eval()
    with torch.no_grad():
        average(ids(0))
    close(model.table.weight, tables[-1])


def test_a_deepcopy_of_a_fused_model_has_an_optimizer_of_its_own():
    model, optimizer = make(True)
    train(model, optimizer, range(2))
    other = copy.deepcopy(model)
    own = other.table.fused_optimizer
    assert own is not optimizer and own.state[other.table.weight]["step"] == 2
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.table.weight.detach().clone()
    train(other, own, range(2, 4))
    close(other.table.weight, trained(range(4)))
    assert torch.equal(model.table.weight, before)


@FUSED
def test_a_table_of_another_dtype_after_its_state_was_made(fused):
    """16 bits keep the state; float64 needs another, and says how to make it."""
    model, optimizer = make(fused)
    model.float()
    train(model, optimizer, range(2))
    model.bfloat16()
    train(model, optimizer, range(2, 3))
    assert optimizer.state[model.table.weight]["step"] == 3
    model.double()
    before = model.table.weight.detach().clone()
    message = r"a table of torch.float64 on cpu has exp_avg of torch.float32 on cpu.*load_state_dict"
    with pytest.raises(RuntimeError, match=f"Adam: {message}"):
        train(model, optimizer, [3])
    assert torch.equal(model.table.weight, before)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [3])
    assert optimizer.state[model.table.weight]["step"] == 4
    assert optimizer.state[model.table.weight]["exp_avg"].dtype == torch.float64
    assert not torch.equal(model.table.weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@FUSED
def test_a_table_on_another_device_after_its_state_was_made(fused):
    model, optimizer = make(fused)
    train(model, optimizer, range(2))
    model.cuda()
    step = [ids(2).cuda()]
    with pytest.raises(RuntimeError, match="Adam: a table of torch.float64 on cuda:0 has exp_avg .* on cpu"):
        model(*step).sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    model(*step).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.table.weight.detach().cpu(), trained(range(3)))


def test_a_fused_table_that_somebody_else_uses():
    """Its gradient goes to ``grad`` as ever, and ``step`` refuses a dense one: a reason to call it."""
    model, optimizer = make(True)
    (model(ids(0)).sum() + model.table.weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match=r"Adam: the gradient of a table of shape \[20, 4\] is dense"):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=["touched", "exact"])
def test_a_table_that_no_feature_looks_up_takes_no_step(options):
    module = rk.TableBatchedEmbeddingBag([20, 30], [4, 6], tables=[1]).double()
    optimizer = rk.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5, **options)
    rk.optim.fuse(module, optimizer)
    before = [w.detach().clone() for w in module.weights]
    module([torch.tensor([[1, 2]])]).sum().backward()
    assert list(optimizer.state_dict()["state"]) == [1]
    assert torch.equal(module.weights[0], before[0]) and not torch.equal(module.weights[1], before[1])
