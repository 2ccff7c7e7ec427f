"""Several processes on gloo train as one with the joint batch: dense, sparse and fused tables, clipped, refused."""

from __future__ import annotations

import functools

import joint_attention
import pytest
import torch
import torch.distributed as dist
from exchanges import all_cases
from joint_batches import ALL_WAYS, MODELS, WAYS, train_alone, train_together
from sync_norms import CASES, joint_step, of_case, synchronized
from torch import nn

import rankkernels as rk
from bench.harness.ranks import run
from rankkernels.testing import relative_errors

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]
B, STEPS, LIMIT = 12, 4, 0.5
SLOW = pytest.mark.slow


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


def clipped(rank: int) -> dict[str, torch.Tensor]:
    module = nn.parallel.DistributedDataParallel(tables())
    optimizer = rk.optim.Adam(module.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        module(batch(step, rank)).sin().sum().backward()
        assert all(p.grad.is_sparse for p in module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
        optimizer.step()
    return module.module.state_dict()


def everything(rank: int, processes: int) -> dict:
    """What `make test` tests in processes of their own, which take longer to start than to run."""
    trained = train_together(rank, processes, MODELS, WAYS)
    parts = {"norms": synchronized(rank, processes), "attention": joint_attention.everything(rank, processes)}
    return {"trained": trained, "clipped": clipped(rank), **parts, **all_cases(rank, processes)}


def all_ways(rank: int, processes: int) -> dict:
    """What `make test-all` tests: training in two processes and in three, the rest in three."""
    trained = {"trained": train_together(rank, processes, MODELS, ALL_WAYS)}
    if processes == 2:
        return trained
    return trained | {"norms": synchronized(rank, processes), "attention": joint_attention.everything(rank, processes)}


@pytest.fixture(scope="module")
def found():
    """What both processes found."""
    return run(2, everything)


@pytest.fixture(scope="module")
def trained():
    """Of a number of processes, what each of them found."""
    return functools.cache(lambda n: run(n, all_ways))


def check_trained_as_one(model: str, way: str, of_ranks: list[dict]) -> None:
    """Losses and parameters as of one process, in every step; the tables have the same bits in all processes."""
    found = [of_rank[model, way] for of_rank in of_ranks]
    losses, state = train_alone(model, way, len(of_ranks))
    together = [sum(of_step) for of_step in zip(*(losses for losses, _, _ in found))]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(losses), rtol=1e-9, atol=1e-12)
    assert all(bits == found[0][1] for _, bits, _ in found) and len(set(found[0][1])) == len(losses)
    for _, _, other in found:
        for name, value in state.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_as_one(found, model, way):
    check_trained_as_one(model, way, [of_rank["trained"] for of_rank in found])


@SLOW
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_processes_train_as_one(trained, model, way, processes):
    check_trained_as_one(model, way, [of_rank["trained"] for of_rank in trained(processes)])


@SLOW
@pytest.mark.parametrize("model", MODELS)
def test_exact_adam_is_dense_adam(trained, model):
    """Of several processes, too."""
    exact, dense = (sum(torch.tensor(of_rank["trained"][model, way][0]) for of_rank in trained(3)) for way in
                    ("Adam exact", "dense"))  # fmt: skip
    torch.testing.assert_close(exact, dense, rtol=1e-6, atol=1e-9)


def check_norms(of_ranks: list[dict]) -> None:
    """As the op does with all rows: out and grad_x of each its own, the parameters' gradients summed."""
    for i, case in enumerate(CASES):
        expected, parts = of_case(case, len(of_ranks), None), [of_rank["norms"]["cases"][i] for of_rank in of_ranks]
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}[case[-1]]
        for name, value in expected.items():
            found = [part[name] for part in parts]
            if name == "stats":
                assert all(torch.equal(found[0], other) for other in found)
            joined = torch.cat(found) if name in ("out", "grad_x") else found[0] if name == "stats" else sum(found)
            scale = value.double().abs().mean() + 1
            torch.testing.assert_close(joined.double() / scale, value.double() / scale, rtol=0, atol=tolerance,
                                       msg=lambda m, name=name, case=case: f"{case}, {name}: {m}")  # fmt: skip
    for (model, number), found in of_ranks[0]["norms"]["steps"].items():
        for name, value in joint_step(model, number, len(of_ranks)).items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
            assert all(torch.equal(found[name], other["norms"]["steps"][model, number][name]) for other in of_ranks)
    for of_rank in of_ranks:
        assert all((buffer == 1).all() for buffer in of_rank["norms"]["of no rows"].values())


def test_statistics_of_two_processes(found):
    """Also torch's synchronized norms, of which the layers call none: those raise on the CPU."""
    check_norms(found)


@SLOW
def test_statistics_of_three_processes(trained):
    check_norms(trained(3))


def check_attention(of_ranks: list[dict]) -> None:
    """As the op does with all samples: statistics have the same bits in all processes."""
    for i, (case, dtype) in enumerate(joint_attention.CASES):
        steps = [of_rank["attention"]["steps"][i] for of_rank in of_ranks]
        assert all(torch.equal(step.stats, steps[0].stats) for step in steps), case.id
        expected, found = joint_attention.step(i, len(of_ranks), None), joint_attention.joined(i, steps)
        errors = relative_errors(found[:2], expected[:2])
        errors += relative_errors([*found[2:4], *found.params], [*expected[2:4], *expected.params])
        assert max(errors) < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype], (case.id, errors)


def test_attention_of_two_processes(found):
    check_attention(found)


@SLOW
def test_attention_of_three_processes(trained):
    check_attention(trained(3))


def test_attention_is_one_op_with_a_message_a_layer_and_pass(found):
    """Each has mean and deviations, or two sums, of every unit. Norms of several groups are modules that are called."""
    op = "rankkernels::din_attention"
    for of_rank in found:
        (fused, ran, sent), (called, others, _) = of_rank["attention"]["units"].values()
        assert sent == [1 + 2 * 16, 1 + 2 * 7, 2 * 7, 2 * 16] and of_rank["attention"]["compiled"]
        assert op in ran and op not in others and "aten::addmm" not in ran and "aten::addmm" in others
        for a, b in zip(fused, called):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_attention_refuses(found):
    """In words of torch's own where a process does not come."""
    first, second = (of_rank["attention"]["refusals"] for of_rank in found)
    for errors in (first, second):
        assert "ValueError: din_attention: training needs more than one valid row" in errors["one row"]
        assert "between the processes of group 'nobody'" in errors["unknown"]
        assert "differentiable once" in errors["twice"]
    assert "RuntimeError: between the processes of group" in first["alone"] and "Timed out" in first["alone"]
    assert "ValueError: din_attention: lengths[3] = 4 is outside 0 .. 3" in second["alone"]


def test_two_processes_are_one_with_both_batches(found):
    """Sparse gradients, clipped by their norm."""
    module = tables()
    optimizer = rk.optim.Adam(module.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (module(batch(step, rank)).sin().sum() / 2).backward()
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
        optimizer.step()
    saved = [of_rank["clipped"] for of_rank in found]
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


def test_stochastic_rounding_is_the_first_process_s(found):
    case = "stochastic_rounding"
    assert equal(found, case) and len({of_rank[case]["seed"] for of_rank in found}) == 1
    for of_rank in found:
        assert all(of_rank[case]["moved"])
        assert "rank 1 has ('SGD', " in of_rank[case]["error"]
        assert "rank 0 has ('SGD with stochastic_rounding', " in of_rank[case]["error"]


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
        for case in ("spread", "spread, DTensor ids"):
            assert "NotImplementedError: embedding_bag: takes no DTensor" in errors[case]
        assert "the tables' gradients go to the ranks [0, 1]" in errors["other processes"]


def test_a_process_may_keep_its_tables_to_itself(found):
    assert not equal(found, "shared_in_part")
