"""Steps for which nothing waits: live_steps.py, in a process of its own; and what of them a CPU's steps share."""

from __future__ import annotations

from pathlib import Path

import torch
from process import run_pytest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankkernels import optim
from rankkernels.nn import EmbeddingBag
from rankkernels.ops.embedding_bag_backward import _ascending
from rankkernels.ops.embedding_bag_update import infinite


def test_live_steps():
    run_pytest(Path(__file__).with_name("live_steps.py"), RANKKERNELS_REFERENCE="1")


class Reads(TorchDispatchMode):
    """How often a value is read, which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def stepped(backwards: int, change=lambda grad: grad) -> tuple[int, torch.Tensor]:
    """The values that a step with sparse gradients reads, and the table behind it."""
    torch.manual_seed(0)
    bags = EmbeddingBag(9, 4, mode="sum", sparse=True)
    optimizer = optim.SGD(bags.parameters(), lr=0.5)
    for i in range(backwards):
        bags(torch.tensor([[3, 1, 3], [7, 1, i]])).sum().backward()
    bags.weight.grad = change(bags.weight.grad)
    with Reads() as reads:
        optimizer.step()
    return reads.count, bags.weight.detach()


def test_own_gradients_are_known_to_be_coalesced():
    count, once = stepped(1)
    assert count == 0
    shuffled = lambda grad: torch.sparse_coo_tensor(grad._indices().flip(1), grad._values().flip(0), grad.shape)  # noqa: E731
    count, table = stepped(1, shuffled)
    assert count == 1 and torch.equal(table, once)
    assert len(_ascending) < 3  # of gradients that are gone nothing is kept


def test_rows_that_were_written_to_are_looked_at():
    def reversed_in_place(grad):
        grad._indices().copy_(grad._indices().flip(1))
        return grad

    assert stepped(1, reversed_in_place)[0] == 1


def test_sums_of_gradients_are_looked_at():
    count, table = stepped(2)
    assert count == 1
    torch.manual_seed(0)
    dense = nn.EmbeddingBag(9, 4, mode="sum")
    for i in range(2):
        dense(torch.tensor([[3, 1, 3], [7, 1, i]])).sum().backward()
    torch.testing.assert_close(table, (dense.weight - 0.5 * dense.weight.grad).detach())


def test_one_flag_for_all_features():
    whole = torch.randn(5, 12)
    parts = [*whole.split([3, 4, 5], 1), torch.randn(2, 3, 4), torch.zeros(0, 3)]
    assert infinite(parts) == 0 and infinite(parts).dtype == torch.float32
    for part in parts[:4]:
        for value in (torch.inf, -torch.inf, torch.nan):
            flat = part.select(0, -1).select(-1, -1)
            before = flat.clone()
            flat.fill_(value)
            assert infinite(parts) == 1
            flat.copy_(before)
    whole = torch.randn(5, 13)
    whole[2, 12] = torch.inf  # beside the features
    assert infinite(whole[:, :12].split([3, 9], 1)) == 0
