"""Trains DIN in several processes: batches and tables split among them, checkpoints, resumption.

torchrun --nproc-per-node 2 bench/demo/train_distributed.py                   MovieLens-100k
torchrun --nproc-per-node 2 bench/demo/train_distributed.py --checkpoint run  begins, or goes on from run/
python bench/demo/train_distributed.py                                        one process, for comparison

The dense part is in DistributedDataParallel. Each process has a part of every table's rows, as a DTensor; or with
--tables whole all of them, which step in the backward with the gradients that the processes exchange. A process that
dies ends the others, and the same command goes on from the last checkpoint, which leads to the same losses; with
another number of processes it goes on, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

if __package__ in (None, ""):  # torchrun runs the file by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rankkernels as rk  # noqa: E402
from bench.demo.datasets import load  # noqa: E402
from bench.demo.models import build_model, classes  # noqa: E402
from bench.demo.train import Trainer, metrics  # noqa: E402


def spread_rows(net: nn.Module, processes: int) -> None:
    """Gives each process a part of every table's rows. It looks its part of the batch up in all of them."""
    mesh = init_device_mesh("cpu", (processes,))
    for table in net.embedding.embed_dict.values():
        parallelize_module(table, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))
    names = [name for name, p in net.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)


class DistributedTrainer(Trainer):
    """The trainer of ``bench.demo.train`` on this process's part of every batch."""

    def __init__(self, dataset, settings: argparse.Namespace, rank: int, processes: int):
        self.rank, self.processes = rank, processes
        super().__init__("rankkernels", "din", dataset, settings)
        if self.batch_size % processes:
            raise SystemExit(f"the batch of {self.batch_size} must be a multiple of {processes} processes")
        rk.SyncBatchNorm1d.convert(self.net)  # statistics of the whole batch
        self.wrapped: nn.Module = self.net if processes == 1 else DistributedDataParallel(self.net)

    def make_optimizer(self) -> torch.optim.Optimizer:
        whole = self.settings.tables == "whole"
        if self.processes > 1 and not whole:
            spread_rows(self.net, self.processes)
        self.tables = list(self.net.embedding.parameters())
        others = [p for p in self.net.parameters() if all(p is not table for table in self.tables)]
        self.table_optimizer = rk.optim.Adam(self.tables, lr=self.settings.lr, exact=True) if whole else None
        if whole:
            rk.optim.fuse(self.net, self.table_optimizer)  # the processes' tables are one from here on
        groups = [{"params": others}, *([] if whole else [{"params": self.tables}])]
        return torch.optim.Adam(groups, lr=self.settings.lr)

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """This process's part of the batches that have not been trained on."""
        for batch in islice(self.batches(), len(self.losses), None):
            yield {name: column[self.rank :: self.processes] for name, column in batch.items()}

    def train(self) -> Iterator[int]:
        """All steps that are left; their number after each."""
        self.net.train()
        for part in self.parts():
            loss = F.binary_cross_entropy(self.wrapped(part), part["label"])
            self.optimizer.zero_grad()
            loss.backward()
            for table in self.tables:
                if isinstance(table, DTensor):  # a sum over the processes; those of the others are averaged
                    table.grad.div_(self.processes)
            self.optimizer.step()
            loss = loss.detach() / self.processes
            if self.processes > 1:
                dist.all_reduce(loss)
            self.losses.append(loss.item())
            yield len(self.losses)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, *([self.table_optimizer] if self.table_optimizer else ())]

    def state(self) -> dict:
        """What a checkpoint has. All processes call it: each has its rows of the tables."""
        net, optimizer = get_state_dict(self.net, self.optimizers())
        return {"net": net, "optimizer": optimizer, "losses": self.losses}

    def save(self, folder: Path) -> None:
        """Each process writes its part. The new checkpoint is whole or not there, and takes the old one's place."""
        dcp.save(self.state(), checkpoint_id=folder / "part")
        if self.rank == 0:
            before = list(folder.glob("step-*"))
            os.replace(folder / "part", folder / f"step-{len(self.losses):08}")
            for old in before:
                shutil.rmtree(old)

    def load(self, checkpoint: Path) -> None:
        """Of any number of processes."""
        if self.table_optimizer:
            self.table_optimizer.make_state()
        state = self.state()
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(self.net, self.optimizers(), model_state_dict=state["net"], optim_state_dict=state["optimizer"])
        self.losses = state["losses"]

    def evaluate(self) -> tuple[float, float] | None:
        """AUC and LogLoss, in the first process: that gets all rows of the tables. All processes call it."""
        state = get_model_state_dict(self.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.rank:
            return None
        self.net = build_model(classes("rankkernels"), "din", self.dataset.fields)
        self.net.load_state_dict(state)
        return metrics(self.dataset.test["label"], self.predict(self.dataset.test))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", nargs="+", default=["ml-100k"], metavar="ml-100k|synthetic|PATH", help="default: ml-100k")
    option("--tables", choices=["rows", "whole"], default="rows", help="of each process: its part of the rows, or all")
    option("--batch-size", type=int, default=1024, help="of all processes together (default: %(default)s)")
    option("--epochs", type=int, default=2, help="default: %(default)s")
    option("--lr", type=float, default=1e-3, help="default: %(default)s")
    option("--seed", type=int, default=2026, help="default: %(default)s")
    option("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    option("--checkpoint", type=Path, help="folder: saved there, and gone on from what is there")
    option("--every", type=int, default=50, help="steps from checkpoint to checkpoint (default: %(default)s)")
    option("--timeout", type=float, default=60, help="seconds until a silent process counts as dead (%(default)s)")
    option("--out", type=Path, help="JSON: losses, AUC, LogLoss")
    option("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv, argparse.Namespace(optimizer="adam"))


def datasets_of(settings: argparse.Namespace, rank: int, processes: int):
    """The first process fetches what is not there yet; the others wait for it."""
    if processes > 1 and rank:
        dist.barrier()
    dataset = load(settings.data, ["din"], settings.seed)["din"]
    if processes > 1 and not rank:
        dist.barrier()
    return dataset


def run(settings: argparse.Namespace, rank: int, processes: int) -> None:
    trainer, folder = DistributedTrainer(datasets_of(settings, rank, processes), settings, rank, processes), None
    if settings.checkpoint:
        folder = settings.checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        if last := max(folder.glob("step-*"), default=None):
            trainer.load(last)
    begun = len(trainer.losses)
    with tqdm(total=trainer.steps, initial=begun, desc="DIN", unit="step", disable=settings.quiet or rank > 0) as bar:
        for step in trainer.train():
            bar.update()
            bar.set_postfix(loss=f"{trainer.losses[-1]:.4f}")
            if folder and (step % settings.every == 0 or step == trainer.steps):
                trainer.save(folder)
    if found := trainer.evaluate():
        auc, logloss = found
        print(f"{processes} processes, steps {begun} to {trainer.steps}: AUC {auc:.4f}, LogLoss {logloss:.4f}")
        if settings.out:
            found = {"auc": auc, "logloss": logloss, "begun": begun, "losses": trainer.losses}
            settings.out.write_text(json.dumps(found) + "\n")


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        run(settings, 0, 1)
        return 0
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings.timeout))
    run(settings, dist.get_rank(), processes)
    dist.barrier()  # while the first one evaluates
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads outlive their group: one that lets go of a tensor aborts an ordinary exit
