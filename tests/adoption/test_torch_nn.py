"""torch's own layers: ``nn.EmbeddingBag`` accelerated, and several ``nn.Embedding`` looked up together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankkernels as rk

ROWS, WIDTHS = (7, 5, 9), (4, 8, 3)


@pytest.mark.parametrize(
    "mode, sparse", [("sum", False), ("mean", False), ("max", False), ("sum", True), ("mean", True)]
)
def test_embedding_bag(mode, sparse):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode, sparse=sparse, padding_idx=2, dtype=torch.float64))
    ours = rk.accelerate(copy.deepcopy(theirs))
    assert type(ours[0]) is rk.EmbeddingBag and repr(ours) == repr(theirs)
    ids = torch.randint(0, 9, (6, 3))
    grads = []
    for model in (theirs, ours):
        y = model(ids)
        y.sin().sum().backward()
        grads.append((y.detach(), model[0].weight.grad.to_dense()))
    torch.testing.assert_close(grads[1], grads[0])
    assert type(rk.restore(ours)[0]) is nn.EmbeddingBag and torch.equal(ours(ids), theirs(ids))


def lookups(padding_idx: int | None = 1) -> tuple[nn.ModuleList, list[torch.Tensor]]:
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(r, d, padding_idx=padding_idx) for r, d in zip(ROWS, WIDTHS))
    return tables, [torch.randint(0, r, shape) for r, shape in zip(ROWS, ((6,), (2, 3), ()))]


def outcome(tables: nn.ModuleList, embeddings: list[torch.Tensor]) -> list[torch.Tensor]:
    tables.zero_grad()
    torch.cat([e.sin().flatten() for e in embeddings]).sum().backward()
    return [*embeddings, *(p.grad for p in tables.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padding_idx", [1, None, -1])
def test_look_up_is_every_table_called(padding_idx):
    tables, ids = lookups(padding_idx)
    several, more = [*tables, tables[0]], [*ids, torch.arange(ROWS[0])]
    expected = outcome(tables, [t(i) for t, i in zip(several, more)])
    found = outcome(tables, rk.look_up(several, more))
    torch.testing.assert_close(found, expected)
    together = {e.grad_fn for e in rk.look_up(tables, ids)}
    assert len(together) == 1  # one node of the graph, which made them all
    with pytest.raises(IndexError, match=r"ids\[1\]\[0\] = 5 is out of range"):
        rk.look_up(tables, [ids[0], torch.tensor([5]), ids[2]])
    with pytest.raises(ValueError, match="one tensor for each of 3 tables, got 2"):
        rk.look_up(tables, ids[:2])
    assert rk.look_up([], []) == []


CHANGES = {
    "hook": lambda t: t.register_forward_hook(lambda module, arguments, out: out * 2),
    "max_norm": lambda t: setattr(t, "max_norm", 0.5),
    "scale_grad_by_freq": lambda t: setattr(t, "scale_grad_by_freq", True),
    "dtype": lambda t: t.double(),
    "forward": lambda t: setattr(t, "forward", lambda ids: nn.functional.embedding(ids, t.weight) + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_look_up_of_a_changed_table(change):
    tables, ids = lookups()
    others = copy.deepcopy(tables)
    for model in (tables, others):
        CHANGES[change](model[0])
    expected = [t(i) for t, i in zip(others, ids)]
    torch.testing.assert_close(rk.look_up(tables, ids), expected)
