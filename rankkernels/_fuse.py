"""An optimizer's step in the backward of every layer of a model, in one process or in several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rankkernels._row_optimizer import RowOptimizer
from rankkernels.nn.embedding import fused_weight
from rankkernels.ops._exchange import Exchange
from rankkernels.ops._library import use_huge_pages


def fuse(
    module: nn.Module,
    optimizer: RowOptimizer,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Lets ``optimizer`` step in the backward of every ``EmbeddingLayer``, ``EmbeddingBag`` and
    ``TableBatchedEmbeddingBag`` in ``module``, whose tables must all be among its params. Returns ``module``.

    A backward is one step of every table that it asks for a gradient of, with what all its lookups add up to; a lookup
    that is the only one, of features that may share tables, steps without its gradient being stored, so look tables up
    together. ``torch.autograd.grad`` steps on nothing, ``backward(inputs=...)`` on the tables named. Checkpoint with
    ``use_reentrant=False``: the other way's backward inside of the backward raises. The tables' ``grad`` stays None.
    ``optimizer.state_dict`` holds the state, ``optimizer.step`` does nothing. With ``grad_scaler`` the backward is
    taken to be of a loss that it scaled.

    Several processes, where ``torch.distributed`` is initialized: call it on all of them, before ``module`` is wrapped
    in DistributedDataParallel. All get the first one's tables. Every backward exchanges the gradients of the rows that
    the processes touched and averages them, as DistributedDataParallel does with those of the other parameters, and
    then all take the same step: the tables stay equal to the last bit. So each process needs a backward through its
    lookups whenever the others have one, if of an empty batch; under ``no_sync`` it is a step, too. ``process_group``
    has the processes that share the tables, the default group if None; a group of this process alone keeps the tables
    to it.

    Raises:
        ValueError: there is no such layer in ``module``, or one has a table that is frozen, not among the params, or
            looked up by a module of its own (``max_norm`` in an ``nn.Embedding``, ``scale_grad_by_freq``, subclasses);
            other processes have other tables; ``capturable=True`` with other processes.
    """
    params = {p for group in optimizer.param_groups for p in group["params"]}
    layers = {name: m for name, m in module.named_modules() if hasattr(type(m), "fused_optimizer")}
    if not layers:
        raise ValueError(f"fuse: {type(module).__name__} has no layer of embedding tables")
    for layer_name, layer in layers.items():
        for name, p in layer.named_parameters():
            full = ".".join(part for part in (layer_name, name) if part)
            if not p.requires_grad:
                raise ValueError(f"fuse: table {full} is frozen")
            if p not in params:
                raise ValueError(f"fuse: table {full} is not among the optimizer's params")
        for name, m in layer.named_modules():
            full = ".".join(part for part in (layer_name, name) if part)
            if (isinstance(m, nn.Embedding) and fused_weight(m) is None) or getattr(m, "scale_grad_by_freq", False):
                raise ValueError(f"fuse: table {full} is looked up by a module of its own: {m}")
    _share(module, layers, optimizer, process_group)
    optimizer.grad_scaler = grad_scaler
    for layer in layers.values():
        layer.fused_optimizer = optimizer
        for p in layer.parameters():
            use_huge_pages(p)
    return module


def _share(
    module: nn.Module, layers: Mapping[str, nn.Module], optimizer: RowOptimizer, group: dist.ProcessGroup | None
) -> None:
    """Lets the processes of a group exchange the gradients of the tables of ``layers``, which ``module`` has."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    tables = {f"{name}.{n}".lstrip("."): p for name, layer in layers.items() for n, p in layer.named_parameters()}
    known = optimizer.exchange is not None and optimizer.exchange.group is group
    exchange = optimizer.exchange if known else Exchange(group)
    if group is not None and exchange.is_needed():
        if optimizer._live.capturable:
            raise ValueError(f"fuse: {type(optimizer).__name__} with capturable=True steps in one process alone")
        optimizer.flush()
        optimizer.take_seed(exchange.begin(type(optimizer).__name__, tables, optimizer.rounding_seed))
    if not known:
        optimizer.exchange = exchange
        optimizer.gates.clear()
    if group is None:
        return
    ids = {id(p) for p in tables.values()}
    for m in module.modules():
        names = [name for name, p in m.named_parameters(remove_duplicate=False) if id(p) in ids]
        if names:
            left_out = [*getattr(m, "_ddp_params_and_buffers_to_ignore", ()), *names]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(m, left_out)
