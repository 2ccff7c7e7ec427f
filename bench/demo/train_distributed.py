"""Trains DIN in several processes: batches split among them, fused tables equal in all, checkpoints, resumption.

torchrun --nproc-per-node 2 bench/demo/train_distributed.py                   MovieLens-100k
torchrun --nproc-per-node 2 bench/demo/train_distributed.py --checkpoint run  begins, or goes on from run/
python bench/demo/train_distributed.py                                        one process, for comparison

The dense part is in DistributedDataParallel; the tables follow dense Adam exactly, stepping in the backward with the
gradients that all processes exchange. A process that dies ends the others, and the same command goes on from the last
checkpoint, which leads to the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

if __package__ in (None, ""):  # torchrun runs the file by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rankkernels as rk  # noqa: E402
from bench.demo.datasets import load  # noqa: E402
from bench.demo.train import Trainer, metrics  # noqa: E402


class DistributedTrainer(Trainer):
    """The trainer of ``bench.demo.train`` on this process's part of every batch."""

    def __init__(self, dataset, settings: argparse.Namespace, rank: int, processes: int):
        self.rank, self.processes = rank, processes
        super().__init__("rankkernels", "din", dataset, settings)
        # Statistics of the whole batch. The attention has L times as many rows: its own will do, and it stays fused.
        rk.SyncBatchNorm1d.convert(self.net.mlp)
        self.wrapped: nn.Module = self.net if processes == 1 else DistributedDataParallel(self.net)

    def make_optimizer(self) -> torch.optim.Optimizer:
        tables = list(self.net.embedding.parameters())
        self.tables = rk.optim.Adam(tables, lr=self.settings.lr, exact=True)
        rk.optim.fuse(self.net, self.tables)  # the processes' tables are one from here on
        others = [p for p in self.net.parameters() if all(p is not table for table in tables)]
        return torch.optim.Adam(others, lr=self.settings.lr)

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """This process's part of the batches that have not been trained on."""
        for batch in islice(self.batches(), len(self.losses), None):
            yield {name: column[self.rank :: self.processes] for name, column in batch.items()}

    def train(self) -> Iterator[int]:
        """All steps that are left; their number after each."""
        self.net.train()
        for part in self.parts():
            # The mean over the batch, whose parts may differ by a row: all processes' gradients are averaged.
            loss = F.binary_cross_entropy(self.wrapped(part), part["label"], reduction="sum") / self.batch_size
            self.optimizer.zero_grad()
            (loss * self.processes).backward()
            self.optimizer.step()
            loss = loss.detach()
            if self.processes > 1:
                dist.all_reduce(loss)
            self.losses.append(loss.item())
            yield len(self.losses)

    def save(self, path: Path) -> None:
        """All processes bring their tables up to date; the first one writes, and the file is whole or not there."""
        state = {"losses": self.losses, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "tables": self.tables.state_dict()}  # fmt: skip
        if self.rank == 0:
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tables.load_state_dict(state["tables"])
        self.losses = state["losses"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", nargs="+", default=["ml-100k"], metavar="ml-100k|synthetic|PATH", help="default: ml-100k")
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
    trainer = DistributedTrainer(datasets_of(settings, rank, processes), settings, rank, processes)
    checkpoint = settings.checkpoint and settings.checkpoint / "last.pt"
    if checkpoint and checkpoint.exists():
        trainer.load(checkpoint)
    elif checkpoint and rank == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    begun = len(trainer.losses)
    with tqdm(total=trainer.steps, initial=begun, desc="DIN", unit="step", disable=settings.quiet or rank > 0) as bar:
        for step in trainer.train():
            bar.update()
            bar.set_postfix(loss=f"{trainer.losses[-1]:.4f}")
            if checkpoint and step % settings.every == 0:
                trainer.save(checkpoint)
    if rank == 0:
        auc, logloss = metrics(trainer.dataset.test["label"], trainer.predict(trainer.dataset.test))
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
    sys.exit(main())
