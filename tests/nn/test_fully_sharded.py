"""FSDP2 around tables that are whole or in parts of their rows; checkpoints in shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fully_sharded import KINDS, train, train_both

from bench.harness.ranks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks", "ignore:torch.distributed is disabled"
    ),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]


def losses_of(of_ranks: list[dict], kind: str) -> list[float]:
    return [sum(of_step) for of_step in zip(*(of_rank[kind]["losses"] for of_rank in of_ranks))]


@pytest.mark.parametrize("processes", [2, 3])
def test_a_run_that_goes_on_in_one_process_and_in_several_again(tmp_path, processes):
    """With the state of both optimizers; to what one process comes to that never stopped."""
    several, one = str(tmp_path / "several"), str(tmp_path / "one")
    first = run(processes, train_both, processes, range(20), None, several)
    between = train_both(0, 1, processes, range(20, 30), several, one)
    last = run(processes, train_both, processes, range(30, 50), one, None)
    for kind in KINDS:
        undisturbed = train(0, 1, kind, processes, range(50), None, None)
        losses = [loss for leg in (first, [between], last) for loss in losses_of(leg, kind)]
        torch.testing.assert_close(losses, undisturbed["losses"], rtol=1e-7, atol=0)
        for name, value in undisturbed["state"].items():
            found, *others = (of_rank[kind]["state"][name] for of_rank in last)
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)
            assert all(torch.equal(found, other) for other in others)
