"""Optimizers with ``stochastic_rounding``: what training gains, and that a seed is a run."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

import rankkernels as rk
from rankkernels.ops.embedding_bag_update import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def bag(dtype: torch.dtype, R: int = 256, D: int = 16, value: float = 1.0, tables: int = 1):
    module = rk.TableBatchedEmbeddingBag([R] * tables, D, modes="none", dtype=dtype)
    with torch.no_grad():
        for w in module.weights:
            w.fill_(value)
    return module


def train(module, optimizer, steps: int, slope: float = 1.0) -> None:
    ids = torch.arange(module.weights[0].size(0))
    for _ in range(steps):
        optimizer.zero_grad()
        (slope * module([ids] * len(module.weights)).float()).sum().backward()
        optimizer.step()


@DTYPES
def test_the_mean_of_many_roundings_is_the_number(dtype):
    torch.manual_seed(0)
    module, p, n = bag(dtype, R=4096, D=16, tables=2), 0.3, 2 * 4096 * 16
    spacing = torch.finfo(dtype).eps  # above 1
    optimizer = rk.optim.SGD(module.parameters(), lr=p * spacing, stochastic_rounding=True)
    rk.optim.fuse(module, optimizer)
    train(module, optimizer, 1, slope=-1.0)
    up = torch.stack([(w.detach().double() - 1) / spacing for w in module.weights])
    assert up.unique().tolist() == [0.0, 1.0]
    assert abs(up.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    # Tables, rows and columns are rounded apart: two of them agree as often as chance has it.
    agree = p**2 + (1 - p) ** 2
    for a, b in ((up[0], up[1]), (up[:, 1:], up[:, :-1]), *((up[..., c:], up[..., :-c]) for c in (1, 2, 8))):
        assert abs((a == b).double().mean() - agree) < 5 * math.sqrt(agree * (1 - agree) / a.numel())


@DTYPES
def test_a_table_that_stalls_at_nearest_trains(dtype):
    rate, steps = torch.finfo(dtype).eps / 16, 64  # a quarter of what would move 1 downwards, half a spacing below
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        module = bag(dtype)
        optimizer = rk.optim.SGD(module.parameters(), lr=rate, stochastic_rounding=stochastic)
        rk.optim.fuse(module, optimizer)
        train(module, optimizer, steps)
        moved[stochastic] = 1 - module.weights[0].detach().double()
    assert not moved[False].any()
    # A step's rounding has a variance below spacing^2 / 4.
    deviation = math.sqrt(steps / moved[True].numel()) * torch.finfo(dtype).eps / 2
    assert abs(moved[True].mean() - rate * steps) < 5 * deviation


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_seed_is_a_run(kind):
    """By ``torch.manual_seed``, over a restart with another one, and in a copy."""
    cls = next(c for c in vars(rk.optim).values() if getattr(c, "_kind", None) == kind)

    def start(seed: int):
        module = bag(torch.bfloat16, R=30, D=9, value=0.7, tables=2)
        torch.manual_seed(seed)
        optimizer = cls(module.parameters(), lr=0.01, stochastic_rounding=True)
        return rk.optim.fuse(module, optimizer), optimizer

    runs = []
    for seed in (1, 1, 2):
        module, optimizer = start(seed)
        train(module, optimizer, 6)
        runs.append([w.detach() for w in module.weights])
    assert all(map(torch.equal, *runs[:2])) and not all(map(torch.equal, *runs[1:]))
    first, optimizer = start(1)
    train(first, optimizer, 3)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    file = io.BytesIO()
    torch.save({"module": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, optimizer = start(3)
    second.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.rounding_seed == saved["optimizer"]["param_groups"][0]["rounding_seed"]
    for module, stepper in ((second, optimizer), *((c, c.fused_optimizer) for c in copies)):
        train(module, stepper, 3)
        assert all(torch.equal(w.detach(), right) for w, right in zip(module.weights, runs[0]))


def test_the_default_draws_nothing():
    state = torch.get_rng_state()
    optimizer = rk.optim.Adam([torch.zeros(3, 2)])
    assert torch.equal(torch.get_rng_state(), state) and optimizer.rounding_seed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_tables_are_not_rounded(dtype):
    results = []
    for stochastic in (False, True):
        module = bag(dtype)
        optimizer = rk.optim.Adam(module.parameters(), stochastic_rounding=stochastic)
        train(rk.optim.fuse(module, optimizer), optimizer, 3)
        results.append(module.weights[0])
    assert torch.equal(*results)


def test_groups_have_one_seed_and_their_own_rounding():
    a, b, c = (torch.zeros(3, 2, dtype=torch.bfloat16) for _ in range(3))
    optimizer = rk.optim.SGD([{"params": [a], "stochastic_rounding": True}, {"params": [b]}])
    optimizer.add_param_group({"params": [c], "stochastic_rounding": True})
    seed, groups = optimizer.rounding_seed, optimizer.param_groups
    assert [g["rounding_seed"] for g in groups] == [seed, None, seed] and 0 <= seed < 2**32
    assert optimizer._roundings([c, b, a], groups[::-1]) == [3 << 32 | seed, 0.0, 1 << 32 | seed]


def test_a_state_from_before_there_was_rounding():
    table = torch.zeros(3, 2, dtype=torch.bfloat16)
    optimizer = rk.optim.SGD([table], stochastic_rounding=True)
    saved, seed = rk.optim.SGD([table]).state_dict(), optimizer.rounding_seed
    for name in ("stochastic_rounding", "rounding_seed"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["stochastic_rounding"] and optimizer.rounding_seed == seed


def test_refused():
    table = torch.zeros(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Adam: with exact=True stochastic_rounding must be False"):
        rk.optim.Adam([table], exact=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match="SGD: stochastic_rounding must be True or False, got 0.5"):
        rk.optim.SGD([table], stochastic_rounding=0.5)
    with pytest.raises(ValueError, match="SGD: rounding_seed must be None or an integer below 2\\^32, got -1"):
        rk.optim.SGD([{"params": [table], "rounding_seed": -1}])
    ours = rk.optim.SGD([table], stochastic_rounding=True)
    with pytest.raises(ValueError, match="to_torch: SGD has no stochastic_rounding, and here it is True"):
        rk.optim.to_torch(ours, torch.optim.SGD([table]))
