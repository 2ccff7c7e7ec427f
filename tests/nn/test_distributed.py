"""Coalesced sparse gradients under DistributedDataParallel, and clipped by their norm: two processes on gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import rankkernels as rk

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]
PROCESSES, B, STEPS, LIMIT = 2, 12, 4, 0.5


class Tables(nn.Module):
    """Both modules that have sparse gradients."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.many = rk.TableBatchedEmbeddingBag([20, 30], [4, 6], modes=["sum", "mean"], sparse=sparse)
        self.one = rk.EmbeddingBag(20, 5, mode="max", sparse=sparse)

    def forward(self, ids: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.many(ids), self.one(ids[0])], 1)


def tables(sparse: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Tables(sparse)


def batch(step: int, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randint(0, rows, (B, 3), generator=generator) for rows in (20, 30)]


def train(rank: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    module = nn.parallel.DistributedDataParallel(tables())
    optimizer = rk.optim.Adam(module.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(batch(step, rank)).sin().sum().backward()
        assert all(p.grad.is_sparse for p in module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
        optimizer.step()
    torch.save(module.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_both_batches(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=PROCESSES)
    module = tables()
    optimizer = rk.optim.Adam(module.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(PROCESSES):
            (module(batch(step, rank)).sin().sum() / PROCESSES).backward()
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
        optimizer.step()
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    for name, value in module.state_dict().items():
        assert torch.equal(saved[0][name], saved[1][name])
        torch.testing.assert_close(saved[0][name], value)
    assert not torch.equal(saved[0]["many.weights.0"], tables().many.weights[0])


def test_clipped_like_dense_gradients():
    """Also where two backwards have accumulated."""
    results = []
    for sparse in (False, True):
        module = tables(sparse)
        for rank in range(2):
            module(batch(0, rank)).sin().sum().backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
        results.append([norm, *(p.grad.to_dense() for p in module.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert results[0][0] > LIMIT
