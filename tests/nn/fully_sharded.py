"""DIN, its dense part spread by ``fully_shard``, its tables whole and fused or in parts of their rows.

A run stops and goes on in another number of processes, from what ``torch.distributed.checkpoint`` wrote.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from joint_batches import JOINT, joint_batch, make, mean_loss, part_of, tables_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import rankkernels as rk

KINDS = ("whole", "rows")


def spread_rows(model: nn.Module) -> None:
    """Gives each process a part of every table's rows; it looks its part of the batch up in all of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for table in model.embedding.embed_dict.values():
        parallelize_module(table, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))


def sharded(model: nn.Module) -> nn.Module:
    """The dense part in shards, the tables as they are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.attention_layers, model.mlp):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=set(tables_of(model)))


def parts_of(step: int, kind: str, processes: int) -> list[dict[str, Tensor]]:
    """What they get. Lookups in parts of rows need parts of one size."""
    x, ranks = joint_batch(step), range(processes)
    if kind == "whole":
        return [part_of(x, step, rank, processes) for rank in ranks]
    return [{name: column[rank::processes] for name, column in x.items()} for rank in ranks]


def train(
    rank: int, processes: int, kind: str, parts: int, steps: range, loaded: str | None, saved: str | None
) -> dict:
    """Goes on from ``loaded``, leaves ``saved``; one process has all ``parts`` of a batch. Tables that are "whole" step
    in the backward, as exact AdamW; of those in "rows" torch's Adam has dense gradients."""
    model = rk.SyncBatchNorm1d.convert(make("DIN"))
    if processes > 1 and kind == "rows":
        spread_rows(model)
    tables = tables_of(model)
    if kind == "whole":
        table_optimizer = rk.optim.AdamW(tables, lr=0.01, exact=True)
        rk.optim.fuse(model, table_optimizer)
    else:
        table_optimizer = torch.optim.Adam(tables, lr=0.01)
    if processes > 1:
        model = sharded(model)
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    assert all(isinstance(p, DTensor) for p in others) == (processes > 1)
    assert all(isinstance(p, DTensor) for p in tables) == (processes > 1 and kind == "rows")
    optimizers, losses = [torch.optim.Adam(others, lr=0.01), table_optimizer], []
    if loaded:
        load(model, optimizers, loaded)
    for step in steps:
        own = parts_of(step, kind, parts)[rank::processes]
        x = {name: torch.cat([part[name] for part in own]) for name in own[0]}
        loss = processes * mean_loss(model, x, JOINT)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for table in tables:
            if isinstance(table, DTensor):  # a sum over the processes; fully_shard averages
                table.grad.div_(processes)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item() / processes)
    net, state = get_state_dict(model, optimizers)
    if saved:
        dcp.save({"net": net, "optimizers": state}, checkpoint_id=saved)
    whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in model.state_dict().items()}
    return {"losses": losses, "state": whole}


def load(model: nn.Module, optimizers: list, folder: str) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, rk.optim.AdamW):
            optimizer.make_state()
    net, state = get_state_dict(model, optimizers)
    dcp.load(read := {"net": net, "optimizers": state}, checkpoint_id=folder)
    set_state_dict(model, optimizers, model_state_dict=read["net"], optim_state_dict=read["optimizers"])


def train_both(rank: int, processes: int, parts: int, steps: range, loaded: str | None, saved: str | None) -> dict:
    """``train`` of each kind, in processes that take longer to start than to train."""
    folders = {kind: [folder and f"{folder}/{kind}" for folder in (loaded, saved)] for kind in KINDS}
    return {kind: train(rank, processes, kind, parts, steps, *folders[kind]) for kind in KINDS}
