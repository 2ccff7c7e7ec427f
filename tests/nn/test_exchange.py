"""Fused tables that two processes share: every kind of backward, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from exchanges import all_cases
from ranks import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, of each case."""
    return run(2, tmp_path_factory.mktemp("ranks"), all_cases)


def equal(found, case: str) -> bool:
    return all(map(torch.equal, *(of_rank[case]["tables"] for of_rank in found)))


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_a_table_that_one_process_looks_up(found, mode):
    """It steps in both; one that nobody looks up stands still."""
    case = f"one process, {mode}"
    assert equal(found, case)
    for of_rank in found:
        assert of_rank[case]["steps"] == [3, 3, 0]
        for a, b in zip(of_rank[case]["tables"], of_rank[case]["expected"]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_optimizers_that_step_in_another_order_in_each_process(found):
    assert equal(found, "two_optimizers")


def test_an_overflow_of_one_process_is_one_of_all(found):
    assert equal(found, "overflow")
    assert all(of_rank["overflow"]["kept"] and of_rank["overflow"]["moved"] for of_rank in found)


def test_kinds_of_backwards(found):
    """``torch.autograd.grad`` is one's own, ``backward(inputs=)`` steps on tables named, ``no_sync`` on all."""
    assert equal(found, "kinds_of_backwards")
    for of_rank in found:
        case = of_rank["kinds_of_backwards"]
        assert case["named"] == [False, True, False] and case["same"]
        assert "before torch.distributed.init_process_group" in case["error"]  # of a copy, which has no group


def test_refusals(found):
    for of_rank in found:
        errors = of_rank["refusals"]
        assert "DistributedDataParallel waits for gradients of the tables" in errors["wrapped first"]
        assert "join cannot stand in for a fused step" in errors["join"]
        assert "must have the same tables and optimizer, rank 1 has" in errors["other tables"]
        assert "the tables' gradients go to the ranks [0, 1]" in errors["other processes"]


def test_a_process_may_keep_its_tables_to_itself(found):
    assert not equal(found, "shared_in_part")
