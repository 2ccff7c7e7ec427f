"""Models that several processes train, each on its part of a batch, and one process on all of it."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rankkernels as rk

STEPS, JOINT, LENGTH = 50, 24, 6
ROWS = {"user": 40, "item": 60, "city": 5}
MODELS = ("DeepFM", "DIN")
KINDS = {
    "SGD": {}, "Adagrad": {}, "RowWiseAdagrad": {}, "Adam": {}, "AdamW": {}, "RowWiseAdam": {}, "FTRL": {},
    "RowWiseRMSprop": {"ar_alpha": 0.1},
}  # fmt: skip
#: How the tables are trained: by torch's dense Adam; by our Adam, stepped with sparse gradients; or fused.
WAYS = ("dense", "sparse", "Adam", "AdamW exact")
ALL_WAYS = (*WAYS, *(kind for kind in KINDS if kind != "Adam"), "Adam exact")


def make(model: str) -> nn.Module:
    torch.manual_seed(0)
    item = {"vocab_size": ROWS["item"], "embed_dim": 8, "padding_idx": 0}
    user, city = rk.SparseFeature("user", ROWS["user"], 8), rk.SparseFeature("city", ROWS["city"], 8)
    target, dims = rk.SparseFeature("item", **item), {"dims": [16], "activation": "dice"}
    if model == "DeepFM":
        tags = rk.SequenceFeature("history", pooling="mean", shared_with="item", **item)
        made = rk.DeepFM([user, city, target, tags, rk.DenseFeature("age")], [user, city, target, tags], dims)
    else:
        history = rk.SequenceFeature("history", pooling="concat", shared_with="item", **item)
        made = rk.DIN(
            [user, city], [history], [target], {"dims": [16]}, dims | {"use_softmax": True}, mask_padding=True
        )
    for table in made.embedding.parameters():
        nn.init.normal_(table, std=0.3)
    return made.double()


def tables_of(model: nn.Module) -> list[Tensor]:
    return list(model.embedding.parameters())


def optimizers_of(model: nn.Module, way: str) -> list[torch.optim.Optimizer]:
    tables = tables_of(model)
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    if way == "dense":
        return [torch.optim.Adam(model.parameters(), lr=0.01)]
    kind, *exact = way.split()
    if way == "sparse":
        for table in model.embedding.embed_dict.values():
            table.sparse = True
        optimizer = rk.optim.Adam(tables, lr=0.01)
    else:
        optimizer = getattr(rk.optim, kind)(tables, lr=0.01, **KINDS[kind], **({"exact": True} if exact else {}))
        rk.optim.fuse(model, optimizer)
    return [torch.optim.Adam(others, lr=0.01), optimizer]


def joint_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = {name: torch.randint(1, rows, (JOINT,), generator=generator) for name, rows in ROWS.items()}
    x["history"] = torch.randint(0, ROWS["item"], (JOINT, LENGTH), generator=generator)
    if step % 3 == 1 and step % 5 != 2:
        x["history"][: JOINT // 2] = 0  # the first process sees padding alone
    x["age"] = torch.rand(JOINT, generator=generator, dtype=torch.float64)
    x["label"] = torch.randint(0, 2, (JOINT,), generator=generator).double()
    return x


def part_of(x: dict[str, Tensor], step: int, rank: int, processes: int) -> dict[str, Tensor]:
    """Parts of different sizes; in some steps one process has none."""
    ends = [JOINT * (r + 1) // processes - (1 if r + 1 < processes else 0) for r in range(processes)]
    if step % 5 == 2:
        ends[step % processes] = ends[step % processes - 1] if step % processes else 0
    begins = [0, *ends[:-1]]
    ends[-1] = JOINT if step % 5 != 2 or step % processes != processes - 1 else ends[-1]
    return {name: column[begins[rank] : ends[rank]] for name, column in x.items()}


def mean_loss(model: nn.Module, x: dict[str, Tensor], joint: int) -> Tensor:
    return F.binary_cross_entropy(model(x), x["label"], reduction="sum") / joint


def raw(tensor: Tensor) -> Tensor:
    """Its memory, also of rows that exact Adam has not brought up to date."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().clone()


def bits_of(tensors: list[Tensor]) -> str:
    """What two processes have in common if they have the same bits."""
    return hashlib.sha256(torch.cat([raw(t).flatten() for t in tensors]).numpy().tobytes()).hexdigest()


def train_alone(model: str, way: str, processes: int) -> tuple[list[float], dict[str, Tensor]]:
    """On the parts of all processes: losses, and the trained model's state."""
    trained, losses = make(model), []
    optimizers = optimizers_of(trained, way)
    for step in range(STEPS):
        parts = [part_of(joint_batch(step), step, rank, processes) for rank in range(processes)]
        x = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = mean_loss(trained, x, JOINT)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, trained.state_dict()


def train_together(rank: int, processes: int, models, ways) -> dict:
    """Of each model and way the losses of this process, the bits of its parameters after every step, and the state."""
    found = {}
    for model in models:
        for way in ways:
            made = rk.SyncBatchNorm1d.convert(make(model))
            with torch.no_grad():
                for p in made.parameters():
                    p.add_(rank)  # everybody gets the first one's
            optimizers = optimizers_of(made, way)
            wrapped, losses, bits = DistributedDataParallel(made), [], []
            for step in range(STEPS):
                x = part_of(joint_batch(step), step, rank, processes)
                loss = processes * mean_loss(wrapped, x, JOINT)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                losses.append(loss.item() / processes)
                bits.append(bits_of(list(made.parameters())))
                if step % 10 == 7 and rank == 0:
                    made.eval()  # of one process alone; brings rows under exact Adam up to date
                    with torch.no_grad():
                        made(joint_batch(99))
                    made.train()
            found[model, way] = losses, bits, made.state_dict()
    return found
