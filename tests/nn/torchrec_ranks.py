"""Models of ours in parts under TorchRec's ``DistributedModelParallel``, on the CPU over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import rankkernels as rk

LR, STEPS = 0.1, 50
WAYS = ("table-wise", "row-wise")


def sharders() -> list:
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


def plan_of(parts: nn.Module, way: str, processes: int) -> ShardingPlan:
    plan = {}
    for name, module in parts.named_children():
        if name == "arch":
            continue
        bags = isinstance(module, EmbeddingBagCollection)
        tables = list(module.embedding_bags if bags else module.embeddings)
        fused = {"compute_kernel": "fused"}  # FBGEMM's dense kernels have no gradients on the CPU
        how = {
            t: row_wise(**fused) if way == "row-wise" else table_wise(rank=i % processes, **fused)
            for i, t in enumerate(tables)
        }
        plan[name] = construct_module_sharding_plan(
            module, how, sharders()[0 if bags else 1], local_size=processes, world_size=processes, device_type="cpu"
        )
    return ShardingPlan(plan)


def shards_of(model: nn.Module) -> dict[str, list[tuple[int, Tensor]]]:
    """The rows of each table that this process has, with the first one's number."""
    return {
        name: [(shard.metadata.shard_offsets[0], shard.tensor) for shard in value.local_shards()]
        for name, value in model.state_dict().items()
        if isinstance(value, ShardedTensor)
    }


def train(rank: int, processes: int, make_parts, batch_of_step) -> dict:
    """Losses of the joint batch, and the tables' rows, of each way of sharding; tables step in the backward."""
    found = {}
    for way in WAYS:
        parts = make_parts()
        whole = {name: value.clone() for name, value in parts.state_dict().items()}
        plan = plan_of(parts, way, processes)
        rk.SyncBatchNorm1d.convert(parts)
        for name, module in parts.named_children():
            if name != "arch":
                _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": LR})
        model = DistributedModelParallel(
            parts, env=ShardingEnv.from_process_group(dist.group.WORLD), device=torch.device("cpu"), plan=plan,
            sharders=sharders(),
        )  # fmt: skip
        for name, shards in shards_of(model).items():
            for row, tensor in shards:
                tensor.copy_(whole[name][row : row + len(tensor)])
        optimizer, losses = torch.optim.SGD([p for p in parts.arch.parameters()], lr=LR), []
        for step in range(STEPS):
            x = batch_of_step(step)
            B = len(x["label"]) // processes
            x = {name: column[rank * B : rank * B + B] for name, column in x.items()}
            loss = nn.functional.binary_cross_entropy(model(x), x["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        tables = {name: [(row, t.clone()) for row, t in shards] for name, shards in shards_of(model).items()}
        found[way] = losses, tables
    return found


def train_all(rank: int, processes: int, makes, batch_of_step) -> dict:
    """``train`` of each of these parts, in processes that take longer to start than to train."""
    return {make.__name__: train(rank, processes, make, batch_of_step) for make in makes}
