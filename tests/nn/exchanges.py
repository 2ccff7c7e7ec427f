"""What two processes do with fused tables beside plain training: a function a case, run by both."""

from __future__ import annotations

import pickle

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rankkernels as rk

ROWS, DIMS, B = (20, 30, 9), (4, 6, 3), 12


class Bags(nn.Module):
    """Three tables; ``forward`` looks up those that it gets ids of, one call each."""

    def __init__(self, mode: str = "sum"):
        super().__init__()
        torch.manual_seed(0)
        self.bags = nn.ModuleList(rk.EmbeddingBag(r, d, mode=mode) for r, d in zip(ROWS, DIMS))
        self.scale = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, ids: dict[int, Tensor], factors: Tensor | None = None) -> Tensor:
        found = [self.bags[t](i, per_sample_weights=factors).sin().sum() for t, i in ids.items()]
        return self.scale * sum(found)


def batch(step: int, rank: int, tables=(0, 1)) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {t: torch.randint(0, ROWS[t], (B, 3), generator=generator) for t in tables}


def fused(kind: str = "Adam", mode: str = "sum", **options) -> tuple[Bags, rk.optim.Adam]:
    module = Bags(mode)
    optimizer = getattr(rk.optim, kind)(module.bags.parameters(), lr=0.1)
    rk.optim.fuse(module, optimizer, **options)
    return module, optimizer


def tables(module: Bags) -> list[Tensor]:
    return [p.detach().clone() for p in module.bags.parameters()]


def error_of(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def alone(steps: list[list[tuple[dict, Tensor | None]]], mode: str) -> list[Tensor]:
    """One process with the batches of all: each step's losses are averaged."""
    module = Bags(mode)
    rk.optim.fuse(module, rk.optim.Adam(module.bags.parameters(), lr=0.1), process_group=own_group())
    for parts in steps:
        (sum(module(ids, factors) for ids, factors in parts) / len(parts)).backward()
    return tables(module)


def own_group() -> dist.ProcessGroup:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def looked_up(step: int, rank: int, mode: str) -> tuple[dict, Tensor | None]:
    """Of the second table the second process alone looks rows up, of the third nobody."""
    factors = torch.rand(B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return batch(step, rank, (0, 1) if rank else (0,)), factors if mode == "sum" else None


def tables_of_one_process(rank: int, mode: str) -> dict:
    module, optimizer = fused(mode=mode)
    wrapped = DistributedDataParallel(module)
    for step in range(3):
        wrapped(*looked_up(step, rank, mode)).backward()
    expected = alone([[looked_up(step, r, mode) for r in range(2)] for step in range(3)], mode)
    steps = [optimizer.state[p]["step"] if optimizer.state.get(p) else 0 for p in module.bags.parameters()]
    return {"tables": tables(module), "expected": expected, "steps": steps}


def two_optimizers(rank: int) -> dict:
    """Whose lookups come in another order in each process, and twice."""
    module = Bags()
    for bag, kind in zip(module.bags, ("Adagrad", "Adam", "SGD")):
        rk.optim.fuse(bag, getattr(rk.optim, kind)(bag.parameters(), lr=0.1))
    for step in range(3):
        ids = batch(step, rank, (0, 1, 2) if rank else (2, 1, 0))
        (module(ids) + module(batch(step + 50, rank, ids))).backward()
    return {"tables": tables(module)}


def stochastic_rounding(rank: int) -> dict:
    """Of tables in bfloat16, whose optimizers were made under another seed in each process."""
    torch.manual_seed(0)
    module = rk.TableBatchedEmbeddingBag(list(ROWS), 8, modes="sum", dtype=torch.bfloat16)
    torch.manual_seed(1 + rank)
    optimizer = rk.optim.SGD(module.parameters(), lr=1e-3, stochastic_rounding=True)
    rk.optim.fuse(module, optimizer)
    before = [w.detach().clone() for w in module.weights]
    for step in range(3):
        sum(out.float().sin().sum() for out in module([*batch(step, rank, (0, 1, 2)).values()])).backward()
    other = rk.TableBatchedEmbeddingBag(list(ROWS), 8, modes="sum", dtype=torch.bfloat16)
    nearest = rk.optim.SGD(other.parameters(), stochastic_rounding=rank == 0)
    return {
        "tables": [w.detach() for w in module.weights], "seed": optimizer.rounding_seed,
        "moved": [not torch.equal(a, b) for a, b in zip(before, module.weights)],
        "error": error_of(lambda: rk.optim.fuse(other, nearest)),
    }  # fmt: skip


def overflow(rank: int) -> dict:
    """A gradient of one process is infinite: none takes a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module, _ = fused(grad_scaler=scaler)
    wrapped, before = DistributedDataParallel(module), tables(module)
    factor = float("inf") if rank else 1.0
    scaler.scale(wrapped(batch(0, rank)) * factor).backward()
    kept = all(map(torch.equal, before, tables(module)))
    scaler.scale(wrapped(batch(1, rank))).backward()
    return {"kept": kept, "tables": tables(module), "moved": not torch.equal(before[0], tables(module)[0])}


def kinds_of_backwards(rank: int) -> dict:
    module, optimizer = fused()
    wrapped, before = DistributedDataParallel(module), tables(module)
    if rank:  # of this process alone
        (grad,) = torch.autograd.grad(module(batch(0, rank)), module.bags[0].weight)
        assert (grad != 0).any() and all(map(torch.equal, before, tables(module)))
    module(batch(0, rank)).backward(inputs=[module.bags[1].weight])
    named = [not torch.equal(a, b) for a, b in zip(before, tables(module))]
    with wrapped.no_sync():
        wrapped(batch(1, rank)).backward()
    copy = pickle.loads(pickle.dumps((module, optimizer)))
    error = error_of(lambda: copy[0](batch(0, 0)))
    rk.optim.fuse(*copy)
    for m in (module, copy[0]):
        m(batch(2, rank)).backward()
    same = all(map(torch.equal, tables(module), tables(copy[0])))
    return {"named": named, "tables": tables(module), "error": error, "same": same}


def refusals(rank: int) -> dict:
    wrapped_first = DistributedDataParallel(Bags())
    rk.optim.fuse(wrapped_first.module, rk.optim.SGD(wrapped_first.module.bags.parameters()))
    found = {"wrapped first": error_of(lambda: wrapped_first(batch(0, rank)))}
    module, _ = fused()
    wrapped = DistributedDataParallel(module)
    with wrapped.join():
        found["join"] = error_of(lambda: wrapped(batch(0, rank)))
        wrapped._join_config = wrapped._join_config._replace(enable=False)
    other = rk.EmbeddingBag(3 + rank, 2)
    optimizer = rk.optim.SGD(other.parameters())
    found["other tables"] = error_of(lambda: rk.optim.fuse(other, optimizer))
    rk.optim.fuse(other, optimizer, process_group=own_group())  # tables of this process
    other(torch.tensor([[3 if rank else 1]])).sum().backward()
    spread = distribute_tensor(torch.rand(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    found["spread"] = error_of(lambda: rk.embedding_bag(spread, torch.tensor([[rank]])))
    found["spread, DTensor ids"] = error_of(lambda: rk.embedding_bag(spread, distribute_tensor(
        torch.tensor([[1]]), spread.device_mesh, [Replicate()])))  # fmt: skip
    elsewhere = DistributedDataParallel(fused()[0], process_group=own_group())
    found["other processes"] = error_of(lambda: elsewhere(batch(0, rank)))
    return found


def shared_in_part(rank: int) -> dict:
    """A process that keeps its tables to itself steps on its own gradients."""
    module, _ = fused(process_group=own_group())
    module(batch(0, rank)).backward()
    return {"tables": tables(module)}


def all_cases(rank: int, processes: int) -> dict:
    cases = {f"one process, {mode}": tables_of_one_process(rank, mode) for mode in ("sum", "max")}
    for case in (two_optimizers, stochastic_rounding, overflow, kinds_of_backwards, refusals, shared_in_part):
        cases[case.__name__] = case(rank)
    return cases
