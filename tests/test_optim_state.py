"""Optimizers of tables: mixed precision, clipping by row, state to and from torch's, a restart in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
ROOT = Path(__file__).parent.parent
KINDS = pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW"])


def bag(seed: int = 0, **options) -> rk.EmbeddingBag:
    torch.manual_seed(seed)
    return rk.EmbeddingBag(30, 9, mode="sum", **options)


def ids(step: int) -> torch.Tensor:
    return torch.randint(0, 25, (16, 3), generator=torch.Generator().manual_seed(step))


def make(kind: str, fused: bool, grad_scaler=None, **options):
    module = bag(sparse=not fused)
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.05, **options)
    if fused:
        rk.optim.fuse(module, optimizer, grad_scaler=grad_scaler)
    return module, optimizer


def train(module, optimizer, steps, scaler=None):
    for step in steps:
        module.weight.grad = None
        loss = module(ids(step)).sin().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        step_with(module, optimizer, scaler)


def step_with(module, optimizer, scaler) -> None:
    if module.fused_optimizer is None and scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif module.fused_optimizer is None:
        optimizer.step()


@KINDS
@pytest.mark.parametrize("fused", [True, False])
def test_scaled_loss(kind, fused):
    """A power of two as the scale changes no bit; an overflow changes nothing at all."""
    plain, optimizer = make(kind, fused)
    train(plain, optimizer, range(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, optimizer = make(kind, fused, scaler)
    train(scaled, optimizer, range(2), scaler)
    before = [t.clone() for t in (scaled.weight, *filter(torch.is_tensor, optimizer.state[scaled.weight].values()))]
    scaled.weight.grad = None
    scaler.scale(scaled(ids(9)).sum() * torch.inf).backward()
    step_with(scaled, optimizer, scaler)
    after = [scaled.weight, *filter(torch.is_tensor, optimizer.state[scaled.weight].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and optimizer.state[scaled.weight]["step"] == 2
    train(scaled, optimizer, range(2, 4), scaler)
    assert torch.equal(plain.weight, scaled.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_clipped_by_row(fused):
    limit = 3.0
    module, optimizer = make("SGD", fused, max_row_norm=limit)
    before = module.weight.detach().clone().requires_grad_()
    out = nn.functional.embedding_bag(ids(0), before, mode="sum").sin().sum()
    (grad,) = torch.autograd.grad(out, before)
    norms = grad.norm(dim=1, keepdim=True)
    assert (norms > limit).any() and ((norms < limit) & (norms > 0)).any()
    train(module, optimizer, [0])
    torch.testing.assert_close(module.weight, before - 0.05 * grad * (limit / norms.clamp(min=limit)))


@pytest.mark.parametrize(
    "kind, theirs",
    [("SGD", "SGD"), ("Adagrad", "Adagrad"), ("Adam", "SparseAdam"), ("Adam", "Adam"), ("AdamW", "AdamW")],
)
def test_state_to_torch_and_back(kind, theirs):
    """Ours, then torch's, then ours: the same as ours all along (a dense optimizer takes no step between)."""
    straight, optimizer = make(kind, False)
    train(straight, optimizer, range(6))
    module, first = make(kind, False)
    train(module, first, range(2))
    other = getattr(torch.optim, theirs)(module.parameters(), lr=1.0)
    rk.optim.to_torch(first, other)
    assert other.param_groups[0]["lr"] == 0.05
    if theirs in ("SGD", "Adagrad", "SparseAdam"):
        train(module, other, range(2, 4))
    else:
        train(module, first, range(2, 4))
        rk.optim.to_torch(first, other)
    second = getattr(rk.optim, kind)(module.parameters(), lr=1.0)
    second.load_state_dict(other.state_dict())
    assert set(second.param_groups[0]) == set(first.param_groups[0])
    train(module, second, range(4, 6))
    torch.testing.assert_close(module.weight, straight.weight)


def test_state_that_does_not_fit():
    module, optimizer = make("RowWiseAdagrad", False)
    train(module, optimizer, range(1))
    with pytest.raises(ValueError, match="to_torch: Adagrad has no place for the state of RowWiseAdagrad"):
        rk.optim.to_torch(optimizer, torch.optim.Adagrad(module.parameters()))
    for kind, message in (
        ("Adagrad", r"must have sum of shape \[30, 9\], got"),
        ("Adam", "must have exp_avg of shape"),
    ):
        with pytest.raises(ValueError, match=f"{kind}: the state of table 0 {message}"):
            getattr(rk.optim, kind)(module.parameters()).load_state_dict(optimizer.state_dict())
    theirs = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="SGD: there is no momentum here"):
        rk.optim.SGD(module.parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="SGD: max_row_norm must be positive or None"):
        rk.optim.SGD(module.parameters(), max_row_norm=-1.0)


CONTINUE = """
import sys
sys.path.insert(0, "tests")
import torch, test_optim_state as t
path, kind, fused = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
module, optimizer = t.make(kind, fused)
saved = torch.load(path)
module.load_state_dict(saved["module"])
optimizer.load_state_dict(saved["optimizer"])
t.train(module, optimizer, range(3, 6))
torch.save(module.state_dict(), path)
"""


@KINDS
def test_continued_in_a_new_process(kind, tmp_path):
    never_stopped, optimizer = make(kind, True)
    train(never_stopped, optimizer, range(6))
    module, optimizer = make(kind, True)
    train(module, optimizer, range(3))
    path = tmp_path / "saved.pt"
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", CONTINUE, path, kind, "True"], cwd=ROOT, check=True)
    assert torch.equal(torch.load(path)["weight"], never_stopped.weight)


def test_rowwise_adagrad_is_fbgemms():
    """On the CPU, over 100 steps; FBGEMM has float32 alone, and what is summed in another order rounds apart."""
    reason = "FBGEMM (fbgemm-gpu-cpu, one binary for each torch release) is not installed"
    pytest.importorskip("fbgemm_gpu", reason=reason, exc_type=ImportError)
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    ours = rk.TableBatchedEmbeddingBag([40, 600], 16)
    rk.optim.fuse(ours, rk.optim.RowWiseAdagrad(ours.parameters(), lr=0.05, eps=1e-6))
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [(w.size(0), 16, EmbeddingLocation.HOST, ComputeDevice.CPU) for w in ours.weights],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05, eps=1e-6,
    )  # fmt: skip
    for own, weight in zip(theirs.split_embedding_weights(), ours.weights):
        own.copy_(weight.detach())
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randint(0, w.size(0), (100, 5), generator=generator) for w in ours.weights]
        out, expected = ours(batch), theirs(torch.cat([i.flatten() for i in batch]), torch.arange(0, 1001, 5))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.sin().sum().backward()
        expected.sin().sum().backward()
    for own, weight in zip(theirs.split_embedding_weights(), ours.weights):
        torch.testing.assert_close(own, weight.detach(), rtol=1e-6, atol=1e-6)
