"""DeepFM and DIN in DistributedDataParallel: several processes on gloo train as one with the joint batch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from joint_batches import ALL_WAYS, MODELS, WAYS, train_alone, train_together
from ranks import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of a number of processes and of ways to train, what each process found: they start once for all tests."""
    return functools.cache(lambda n, ways: run(n, tmp_path_factory.mktemp("ranks"), train_together, MODELS, ways))


@pytest.mark.parametrize(
    ("processes", "ways", "way"),
    [(2, WAYS, way) for way in WAYS] + [pytest.param(n, ALL_WAYS, w, marks=SLOW) for n in (2, 3) for w in ALL_WAYS],
)
@pytest.mark.parametrize("model", MODELS)
def test_processes_train_as_one(trained, model, processes, ways, way):
    """Losses and parameters as of one process, in every step; the tables have the same bits in all processes."""
    found = [of_rank[model, way] for of_rank in trained(processes, ways)]
    losses, state = train_alone(model, way, processes)
    together = [sum(of_step) for of_step in zip(*(losses for losses, _, _ in found))]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(losses), rtol=1e-9, atol=1e-12)
    assert all(bits == found[0][1] for _, bits, _ in found) and len(set(found[0][1])) == len(losses)
    for _, _, other in found:
        for name, value in state.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


@SLOW
@pytest.mark.parametrize("model", MODELS)
def test_exact_adam_is_dense_adam(trained, model):
    """Of several processes, too."""
    exact, dense = (sum(torch.tensor(of_rank[model, way][0]) for of_rank in trained(3, ALL_WAYS)) for way in
                    ("Adam exact", "dense"))  # fmt: skip
    torch.testing.assert_close(exact, dense, rtol=1e-6, atol=1e-9)
