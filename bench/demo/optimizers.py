"""Which optimizer of the tables trains which DeepFM: torch-rechub's default trainer, dense and lazy ones, weight decay.

python -m bench.demo.optimizers                          MovieLens-100k, and Zipf ids like Frappe's and Criteo's
python -m bench.demo.optimizers --data ml-100k --runs FTRL "dense Adam"

Every run starts from the same weights and sees the same batches. bench/RESULTS-AVX2.md shows the record.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.demo.datasets import Dataset, load, zipf_clicks
from bench.demo.train import Trainer, surroundings, unwritable

#: A row is rare that the training part has so many times at most, and at least once.
RARE = 4
LR = 1e-3


class Run(NamedTuple):
    """How a model is trained. ``tables`` names one of ``rankkernels.optim``, fused, and its options; without it all
    parameters of torch-rechub's model are torch.optim.Adam's. ``decay`` is Adam's, of all or of the rest."""

    name: str
    tables: str | None = None
    options: dict = {}  # noqa: RUF012
    decay: float = 0.0


RUNS = (
    Run("torch-rechub's trainer: dense Adam, decay 1e-5", decay=1e-5),
    Run("dense Adam"),
    Run("Adam, exact", "Adam", {"lr": LR, "exact": True}),
    Run("Adam", "Adam", {"lr": LR}),
    Run("Adam, decay 1e-5", "Adam", {"lr": LR, "weight_decay": 1e-5}, 1e-5),
    Run("AdamW, decay 1e-2", "AdamW", {"lr": LR, "weight_decay": 1e-2}),
    Run("RowWiseAdam", "RowWiseAdam", {"lr": LR}),
    Run("RowWiseAdagrad", "RowWiseAdagrad", {"lr": 0.05}),
    Run("RowWiseRMSprop, ar_alpha 0.1", "RowWiseRMSprop", {"lr": LR, "ar_alpha": 0.1}),
    Run("FTRL", "FTRL", {"lr": 0.05, "beta": 0.0}),
    Run("FTRL, l1 1e-3", "FTRL", {"lr": 0.05, "beta": 0.0, "l1": 1e-3}),
)
#: Vocabularies of Frappe, and of Criteo's display-advertising data cut to 100,000 ids.
FRAPPE = (957, 4082, 7, 7, 2, 3, 2, 9, 80, 233)
CRITEO = (1460, 583, 100_000, 100_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 100_000, 3194, 27, 14_992, 100_000, 10,
          5652, 2173, 4, 100_000, 18, 15, 100_000, 105, 100_000)  # fmt: skip
DATA = {
    "ml-100k": lambda seed: load(["ml-100k"], ["deepfm"], seed)["deepfm"],
    "frappe-like": lambda seed: zipf_clicks("Frappe-like", FRAPPE, 0, 250_000, seed),
    "criteo-like": lambda seed: zipf_clicks("Criteo-like", CRITEO, 13, 200_000, seed),
}


class OptimizerTrainer(Trainer):
    """A DeepFM that is trained as a ``Run`` says."""

    def __init__(self, run: Run, dataset: Dataset, settings: argparse.Namespace):
        self.run = run
        super().__init__("rankkernels" if run.tables else "torch-rechub", "deepfm", dataset, settings)

    def make_optimizer(self) -> torch.optim.Optimizer:
        params = list(self.net.parameters())
        if self.run.tables is not None:
            optim = importlib.import_module("rankkernels.optim")
            tables = list(self.net.embedding.parameters())
            optim.fuse(self.net, getattr(optim, self.run.tables)(tables, **self.run.options))
            params = [p for p in params if all(p is not table for table in tables)]
        return torch.optim.Adam(params, lr=LR, weight_decay=self.run.decay)

    @torch.no_grad()
    def rows(self) -> dict[str, float]:
        """Mean norms of the rare rows and of those seen more often, and the share of exact zeros in the tables."""
        rare, often, zeros, values = [], [], 0, 0
        for field in self.dataset.fields:
            if field.kind == "dense":
                continue
            table = self.net.embedding.embed_dict[field.name].weight
            count = np.bincount(self.dataset.train[field.name].flatten().numpy(), minlength=len(table))
            norms = table.norm(dim=1).numpy()
            rare.append(norms[(count > 0) & (count <= RARE)])
            often.append(norms[count > RARE])
            zeros, values = zeros + int((table == 0).sum()), values + table.numel()
        rare, often = np.concatenate(rare), np.concatenate(often)
        return {"rare_rows": len(rare), "rare_norm": float(rare.mean()), "other_norm": float(often.mean()),
                "zeros": zeros / values}  # fmt: skip

    def result(self) -> dict:
        found = super().result()
        kept = {key: found[key] for key in ("auc", "logloss", "steps", "peak_memory_mib", "first_losses")}
        return {"run": self.run.name, **kept, "ms_per_step": 1000 * float(np.median(found["seconds_per_step"])),
                **self.rows()}  # fmt: skip


def trained(run: Run, dataset: Dataset, settings: argparse.Namespace) -> dict:
    trainer = OptimizerTrainer(run, dataset, settings)
    start = trainer.rows()["rare_norm"]
    for _ in trainer.train():
        pass
    return trainer.result() | {"rare_norm_at_start": start}


def alone(*arguments) -> dict:
    """``trained`` in a process of its own, so that no run finds what another left behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(trained, arguments)


def table(part: dict) -> str:
    """Of one data set."""
    head = f"{'trained by':48}{'AUC':>8}{'LogLoss':>9}{'rare rows':>11}{'others':>8}{'zeros':>7}{'ms/step':>9}"
    lines = [f"{part['name']}: {part['train_rows']:,} rows to train, {part['test_rows']:,} to test", head]
    for r in part["results"]:
        lines.append(
            f"{r['run']:48}{r['auc']:8.4f}{r['logloss']:9.4f}{r['rare_norm']:11.4f}{r['other_norm']:8.4f}"
            f"{100 * r['zeros']:6.1f}%{r['ms_per_step']:9.2f}"
        )
    return "\n".join([*lines, ""])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, names = parser.add_argument, [run.name for run in RUNS]
    option("--data", nargs="+", choices=list(DATA), default=list(DATA), help="default: all")
    option("--runs", nargs="+", choices=names, default=names, metavar="RUN", help="as the table names them")
    option("--threads", type=int, default=2, help="default: %(default)s")
    option("--batch-size", type=int, default=1024, help="default: %(default)s")
    option("--epochs", type=int, default=2, help="default: %(default)s")
    option("--seed", type=int, default=2026, help="default: %(default)s")
    option("--out", type=Path, default=Path("results/optimizers.json"), help="JSON; what it has of other data sets and "
           "runs stays (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv, argparse.Namespace(optimizer="adam"))


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv)
    if reason := unwritable(settings.out):
        print(f"optimizers.py: --out: {reason}", file=sys.stderr)
        return 2
    before = json.loads(settings.out.read_text())["data"] if settings.out.exists() else {}
    common = {key: getattr(settings, key) for key in ("threads", "batch_size", "epochs", "seed")}
    report = {"settings": {**common, "rare": RARE}, **surroundings(), "data": before}
    for name in settings.data:
        dataset = DATA[name](settings.seed)
        part = report["data"].setdefault(name, {"results": []})
        part |= {"name": dataset.name, "train_rows": len(dataset.train["label"]),
                 "test_rows": len(dataset.test["label"])}  # fmt: skip
        for run in RUNS:
            if run.name in settings.runs:
                found = {r["run"]: r for r in part["results"]} | {run.name: alone(run, dataset, settings)}
                part["results"] = [found[other.name] for other in RUNS if other.name in found]
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
        print(table(part), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
