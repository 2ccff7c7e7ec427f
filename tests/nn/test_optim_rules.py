"""FTRL and the row-wise optimizers against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")


def bag(rows: int, sparse: bool = False) -> rk.EmbeddingBag:
    torch.manual_seed(0)
    return rk.EmbeddingBag(rows, 6, mode="sum", sparse=sparse).double()


def train(module, optimizer, steps: int) -> None:
    for step in range(steps):
        ids = torch.randint(0, 60, (8, 3), generator=torch.Generator().manual_seed(step))
        module(ids).sin().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "lr_power, beta, l1, l2", [(-0.5, 1.0, 12.0, 0.1), (-0.5, 0.0, 0.0, 0.0), (-0.7, 0.5, 12.0, 0.0)]
)
def test_ftrl_by_its_formula_over_500_steps(lr_power, beta, l1, l2, fused, dtype):
    """The paper's algorithm 1 in float64, row by row from its sums; every exact zero is one there."""
    module = bag(60, sparse=not fused).to(dtype)
    optimizer = rk.optim.FTRL(module.parameters(), lr=0.3, lr_power=lr_power, beta=beta, l1=l1, l2=l2)
    if fused:
        rk.optim.fuse(module, optimizer)
    weight = module.weight.detach().clone().double()
    z, n = torch.zeros(60, 6, dtype=torch.float64), torch.zeros(60, 6, dtype=torch.float64)
    for step in range(500):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (8, 3), generator=generator)
        grad_out = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        module(ids).backward(grad_out.to(dtype))
        optimizer.step()
        grad = torch.zeros_like(weight).index_add(0, ids.flatten(), grad_out.to(dtype).double().repeat_interleave(3, 0))
        for i in ids.unique():
            sigma = ((n[i] + grad[i] ** 2) ** -lr_power - n[i] ** -lr_power) / 0.3
            z[i] += grad[i] - sigma * weight[i]
            n[i] += grad[i] ** 2
            solution = (z[i].sign() * l1 - z[i]) / ((beta + n[i] ** -lr_power) / 0.3 + l2)
            weight[i] = torch.where(z[i].abs() <= l1, 0.0, solution)
    ours, tolerance = module.weight.detach(), 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours.double(), weight, rtol=tolerance, atol=tolerance)
    for name, expected in (("z", z), ("n", n)):
        torch.testing.assert_close(
            optimizer.state[module.weight][name].double(), expected, rtol=tolerance, atol=tolerance
        )
    zeros = (weight == 0).sum().item()
    assert (ours == 0).sum().item() == zeros and (zeros > 20) == (l1 > 0)


def test_ftrl_without_regularization_is_adagrad():
    results = []
    for make in (lambda p: rk.optim.FTRL(p, lr=0.1, beta=0.0), lambda p: rk.optim.Adagrad(p, lr=0.1, eps=1e-300)):
        module = bag(60)
        train(rk.optim.fuse(module, optimizer := make(module.parameters())), optimizer, 30)
        results.append(module.weight)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_ftrl_refuses_another_learning_rate():
    """Its weights follow from the state and the rate, so that another one would scale every row at its next lookup."""
    module = bag(60)
    optimizer = rk.optim.FTRL(module.parameters(), lr=1.0)
    rk.optim.fuse(module, optimizer)
    optimizer.param_groups[0]["lr"] = 0.5  # before the first step any may be set
    train(module, optimizer, 1)
    before = module.weight.detach().clone()
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1).step()
    with pytest.raises(RuntimeError, match="FTRL: lr is 0.05 and was 0.5 when the tables first stepped"):
        train(module, optimizer, 1)
    assert torch.equal(before, module.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_rowwise_adam_by_its_formula(fused):
    """FBGEMM's PARTIAL_ROWWISE_ADAM, which has no CPU code: m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)) + eps."""
    module = bag(20, sparse=not fused)
    weight, m, v = module.weight.detach().clone(), torch.zeros(20, 6).double(), torch.zeros(20).double()
    optimizer = rk.optim.RowWiseAdam(module.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.05)
    if fused:
        rk.optim.fuse(module, optimizer)
    for step in range(1, 31):
        ids = torch.randint(0, 20, (8, 3), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(ids).square().sum().backward()
        optimizer.step()
        grad = torch.zeros_like(weight).index_add(0, ids.flatten(), (2 * weight[ids].sum(1)).repeat_interleave(3, 0))
        rows = ids.unique()
        m[rows] = 0.8 * m[rows] + 0.2 * grad[rows]
        v[rows] = 0.9 * v[rows] + 0.1 * grad[rows].square().mean(1)
        direction = m[rows] / (1 - 0.8**step) / ((v[rows] / (1 - 0.9**step)).sqrt() + 1e-3)[:, None]
        weight[rows] -= 0.1 * (direction + 0.05 * weight[rows])
    torch.testing.assert_close(module.weight, nn.Parameter(weight), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("min_shrinkage", [0.0, 0.3])
def test_rowwise_rmsprop_by_its_formula(fused, min_shrinkage):
    """FBGEMM's ROWWISE_RMSPROP_AR: a row decays by the steps since it was last touched, once it comes back."""
    module = bag(40, sparse=not fused)
    weight, v, last = module.weight.detach().clone(), torch.zeros(40).double(), torch.zeros(40).double()
    optimizer = rk.optim.RowWiseRMSprop(module.parameters(), lr=0.1, ema_beta=0.9, eps=1e-3, ar_alpha=2.0,
                                        min_shrinkage=min_shrinkage)  # fmt: skip
    if fused:
        rk.optim.fuse(module, optimizer)
    floored = 0
    for step in range(1, 41):
        ids = torch.randint(0, 40, (5, 2), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(ids).sin().sum().backward()
        optimizer.step()
        grad = torch.zeros_like(weight).index_add(0, ids.flatten(), weight[ids].sum(1).cos().repeat_interleave(2, 0))
        for i in ids.unique():
            elapsed = 1 if last[i] == 0 else step - last[i]
            v[i] = 0.9 * v[i] + 0.1 * grad[i].square().mean()
            keep = max(min_shrinkage, 1 - min(1.0, 0.1 * 2.0 * elapsed))
            weight[i] = keep * weight[i] - 0.1 / (v[i].sqrt() + 1e-3) * grad[i]
            last[i], floored = step, floored + (keep == min_shrinkage)
    torch.testing.assert_close(module.weight, nn.Parameter(weight), rtol=1e-10, atol=1e-12)
    assert floored > 5 and torch.equal(optimizer.state[module.weight]["last_step"], last)


def test_an_initial_value_is_a_number_of_any_type():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.ones(3, 2).to_sparse(1)
    optimizer = rk.optim.Adagrad([weight], initial_accumulator_value=2**70)
    optimizer.step()
    assert (optimizer.state[weight]["sum"] == 2.0**70).all()
