"""DIN whose dense part ``fully_shard`` spreads over the processes, fused tables left out; saved in shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from joint_batches import JOINT, joint_batch, make, mean_loss, optimizers_of, part_of, tables_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import rankkernels as rk

STEPS = 8


def sharded(model: nn.Module) -> nn.Module:
    """With the tables whole in every process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.attention_layers, model.mlp):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=set(tables_of(model)))


def step_on(model: nn.Module, optimizers: list, loss: Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def train(rank: int, processes: int, folder: str) -> dict:
    """Trains, and saves all shards."""
    model = rk.SyncBatchNorm1d.convert(make("DIN"))
    tables = tables_of(model)
    table_optimizer = rk.optim.Adam(tables, lr=0.01)
    rk.optim.fuse(model, table_optimizer)
    model = sharded(model)
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    assert all(isinstance(p, DTensor) for p in others) and not any(isinstance(p, DTensor) for p in tables)
    optimizers, losses = [torch.optim.Adam(others, lr=0.01), table_optimizer], []
    for step in range(STEPS):
        loss = processes * mean_loss(model, part_of(joint_batch(step), step, rank, processes), JOINT)
        step_on(model, optimizers, loss)
        losses.append(loss.item() / processes)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    return {"losses": losses, "tables": [t.detach() for t in tables]}


def train_alone(processes: int) -> tuple[list[float], nn.Module]:
    model, losses = make("DIN"), []
    optimizers = optimizers_of(model, "Adam")
    for step in range(STEPS):
        parts = [part_of(joint_batch(step), step, rank, processes) for rank in range(processes)]
        loss = mean_loss(model, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, JOINT)
        step_on(model, optimizers, loss)
        losses.append(loss.item())
    return losses, model


def load(rank: int, processes: int, folder: str) -> dict[str, Tensor]:
    """What one process saved, in shards -> all of it."""
    model = sharded(make("DIN"))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in model.state_dict().items()}


def by_rows(rank: int, processes: int) -> dict:
    """Tables in parts of their rows, DTensors; each process looks up its part of the batch."""
    model, mesh = rk.SyncBatchNorm1d.convert(make("DIN")), init_device_mesh("cpu", (processes,))
    for table in model.embedding.embed_dict.values():
        parallelize_module(table, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))
    assert all(isinstance(p, DTensor) for p in tables_of(model))
    x, B = joint_batch(0), JOINT // processes
    loss = mean_loss(model, {name: column[rank * B : rank * B + B] for name, column in x.items()}, JOINT)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    return {"loss": loss, "gradients": [p.grad.full_tensor() for p in tables_of(model)]}
