"""Trains DeepFM, DIN and DIN's base model with torch-rechub's classes and with ours: the same seed, the same batches,
one table.

python -m bench.demo.train                                MovieLens-100k
python -m bench.demo.train --data synthetic               no network; the AUC and LogLoss of the true model beside
python -m bench.demo.train --data clicks.tsv.gz events.csv   Criteo-format lines for DeepFM, (user, item, time) for DIN
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor
from tqdm import tqdm

from bench.demo.datasets import Dataset, Unavailable, load
from bench.demo.models import LIBRARIES, build_model, classes
from bench.demo.tables import DataError
from bench.harness.memory import MIB, reset_peak, resident

COMPARED_STEPS = 50
#: The libraries take turns of this many steps. The first steps of a turn find cold caches and are not timed.
TURN_STEPS = 12
COLD_STEPS = 2
TITLES = {"deepfm": "DeepFM", "din": "DIN", "base": "base"}
#: Whose data set a model is trained on, if not its own: what DIN is better than its base model by is the attention.
DATA_OF = {"base": "din"}
RATIO = "ours / torch-rechub"
CAPTION = f"""\
{RATIO}: differences of AUC and LogLoss, ratios of samples/s and memory.
samples/s: batch size over the median time of a step (forward, loss, backward, optimizer). Each library has a process
of its own and they take turns of {TURN_STEPS} steps; the ratio is the median over the pairs of turns.
Peak memory: the highest resident size in training less that before the model was built: parameters, gradients,
optimizer, activations, and the code that they brought in."""


def load_lazy_parts(optimizer: type[torch.optim.Optimizer]) -> None:
    """A step of something tiny: what torch imports and allocates once, whatever the model, is no model's memory."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.BatchNorm1d(1), torch.nn.Sigmoid())
    tiny = optimizer(layer.parameters(), lr=1e-3)
    F.binary_cross_entropy(layer(torch.rand(64, 8)).squeeze(1), torch.rand(64)).backward()
    tiny.step()


class Trainer:
    """One model of one library on one data set: everything that decides its numbers is in ``settings``."""

    OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

    def __init__(self, library: str, model: str, dataset: Dataset, settings: argparse.Namespace):
        self.library, self.model, self.dataset, self.settings = library, model, dataset, settings
        torch.set_num_threads(settings.threads)
        lib = classes(library)
        load_lazy_parts(self.OPTIMIZERS[settings.optimizer])
        reset_peak()
        self.memory_before = resident("VmRSS")
        torch.manual_seed(settings.seed)
        self.net = build_model(lib, model, dataset.fields)
        self.optimizer = self.make_optimizer()
        rows = len(dataset.train["label"])
        self.batch_size = min(settings.batch_size, rows)
        self.steps = rows // self.batch_size * settings.epochs
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Of all parameters that do not step by themselves."""
        return self.OPTIMIZERS[self.settings.optimizer](self.net.parameters(), lr=self.settings.lr)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Each epoch shuffles as seed and epoch say, and leaves out a last batch that is not full."""
        rows = len(self.dataset.train["label"])
        for epoch in range(self.settings.epochs):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.settings.seed + epoch))
            for indices in order[: rows // self.batch_size * self.batch_size].view(-1, self.batch_size):
                yield {name: column[indices] for name, column in self.dataset.train.items()}

    def train(self) -> Iterator[None]:
        """All steps; pauses after every ``TURN_STEPS``."""
        self.net.train()
        for batch in self.batches():
            begin = time.perf_counter()
            loss = F.binary_cross_entropy(self.net(batch), batch["label"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seconds.append(time.perf_counter() - begin)
            self.losses.append(loss.item())
            if len(self.seconds) % TURN_STEPS == 0:
                yield

    def seconds_per_step(self) -> list[float]:
        """The median of each turn, without the first turn where there are others."""
        turns = [self.seconds[i : i + TURN_STEPS] for i in range(0, self.steps, TURN_STEPS)]
        return [float(np.median(turn[COLD_STEPS:] or turn)) for turn in turns[1:] or turns]

    @torch.no_grad()
    def predict(self, part: dict[str, Tensor]) -> np.ndarray:
        self.net.eval()
        starts = range(0, len(part["label"]), 4096)
        return torch.cat([self.net({k: v[i : i + 4096] for k, v in part.items()}) for i in starts]).double().numpy()

    def result(self) -> dict:
        # Before predict, whose batches are larger than training's.
        peak = (resident("VmHWM") - self.memory_before) / MIB
        auc, logloss = metrics(self.dataset.test["label"], self.predict(self.dataset.test))
        seconds = self.seconds_per_step()
        result = {
            "model": self.model, "library": self.library, "auc": auc, "logloss": logloss,
            "samples_per_second": self.batch_size / float(np.median(seconds)), "seconds_per_step": seconds,
            "steps": self.steps, "peak_memory_mib": peak, "first_losses": self.losses[:COMPARED_STEPS],
        }  # fmt: skip
        if self.library == "rankkernels":
            notices = importlib.import_module("rankkernels.ops._library").reference_notices
            result["reference_ran_for"] = {f"{op} on {device}": why for (op, device), why in notices.items()}
        return result


def metrics(label: Tensor, probability: np.ndarray) -> tuple[float, float]:
    return float(roc_auc_score(label, probability)), float(log_loss(label, probability))


# ------------------------------------------------------------------------------------------- processes, taking turns


def stages(library: str, model: str, dataset_path: str, settings: argparse.Namespace) -> Iterator[int | dict]:
    """What a process does turn by turn; each turn ends with the number of its steps, the last one with the result."""
    trainer = Trainer(library, model, torch.load(dataset_path, weights_only=False), settings)
    yield 0
    for _ in trainer.train():
        yield TURN_STEPS
    yield trainer.result()


def worker(connection, *args) -> None:
    for outcome in stages(*args):
        connection.send(outcome)
        connection.recv()


def hear(worker_of: dict, library: str) -> int | dict:
    try:
        return worker_of[library][0].recv()
    except EOFError:
        sys.exit(f"train.py: the process of {library} ended early; its error is above")


def train(model: str, dataset: Dataset, settings: argparse.Namespace) -> list[dict]:
    """Each library in a process of its own; they take turns, so that a busy machine is busy for both."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dataset, path := os.path.join(folder, "dataset.pt"))
        worker_of = {}
        for library in LIBRARIES:
            connection, end = spawn.Pipe()
            process = spawn.Process(target=worker, args=(end, library, model, path, settings), daemon=True)
            process.start()
            end.close()
            worker_of[library] = connection, process
        for library in LIBRARIES:
            hear(worker_of, library)
        rows = len(dataset.train["label"])
        steps = rows // min(settings.batch_size, rows) * settings.epochs
        results: dict[str, dict] = {}
        order = list(LIBRARIES)
        with tqdm(total=steps * len(order), desc=TITLES[model], unit="step", disable=settings.quiet) as progress:
            while len(results) < len(order):
                for library in order:
                    worker_of[library][0].send("your turn")
                    outcome = hear(worker_of, library)
                    if isinstance(outcome, dict):
                        results[library], outcome = outcome, steps % TURN_STEPS
                    progress.update(outcome)
                order.reverse()
        for connection, process in worker_of.values():
            connection.send("done")
            process.join()
    return [results[library] for library in LIBRARIES]


# ----------------------------------------------------------------------------------------------------------- report


def compare(theirs: dict, ours: dict) -> dict:
    losses = np.array([theirs["first_losses"], ours["first_losses"]])
    seconds = np.array([theirs["seconds_per_step"], ours["seconds_per_step"]])
    return {
        "samples_per_second_ratio": float(np.median(seconds[0] / seconds[1])),
        "peak_memory_ratio": ours["peak_memory_mib"] / theirs["peak_memory_mib"],
        "auc_difference": ours["auc"] - theirs["auc"],
        "logloss_difference": ours["logloss"] - theirs["logloss"],
        "largest_relative_loss_difference": float((np.abs(losses[1] - losses[0]) / losses[0]).max()),
        "compared_steps": losses.shape[1],
    }


def table(report: dict) -> str:
    def row(*cells):
        return "{:8}{:20}{:>9}{:>10}{:>12}{:>14}".format(*cells).rstrip()

    lines = []
    for model, part in report["models"].items():
        data, difference = part["data"], part["comparison"]
        auc, logloss = difference["auc_difference"], difference["logloss_difference"]
        speed, memory = difference["samples_per_second_ratio"], difference["peak_memory_ratio"]
        curve, steps = difference["largest_relative_loss_difference"], difference["compared_steps"]
        lines += [
            f"{TITLES[model]} on {data['name']}: {data['train_rows']:,} rows to train, {data['test_rows']:,} to test",
            row("model", "library", "AUC", "LogLoss", "samples/s", "peak memory"),
        ]
        for r in part["results"]:
            measured = f"{r['samples_per_second']:,.0f}", f"{r['peak_memory_mib']:,.0f} MiB"
            lines.append(row(TITLES[model], r["library"], f"{r['auc']:.4f}", f"{r['logloss']:.4f}", *measured))
        lines.append(row("", RATIO, f"{auc:+.4f}", f"{logloss:+.4f}", f"{speed:.2f}x", f"{memory:.2f}x"))
        if ceiling := part["ceiling"]:
            lines.append(row("", "the true model", f"{ceiling['auc']:.4f}", f"{ceiling['logloss']:.4f}", "", ""))
        lines += [f"same loss curve: the losses of the first {steps} steps differ by {curve:.1e} relative at most", ""]
    s = report["settings"]
    lines.append(
        f"Batch size {s['batch_size']}, epochs {s['epochs']}, {s['optimizer']}, lr {s['lr']}, seed {s['seed']}, "
        f"threads {s['threads']}, {report['machine']['cpu']}; backend {s['backend']}.\n{CAPTION}"
    )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def positive(kind):
        def number(text: str):
            if not (value := kind(text)) > 0:
                raise argparse.ArgumentTypeError(f"must be positive, got {text}")
            return value

        return number

    def models(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in TITLES]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(TITLES)}, got {unknown[0]!r}")
        return names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", nargs="+", default=["ml-100k"], metavar="ml-100k|synthetic|PATH", help="default: ml-100k")
    option("--models", type=models, default=list(TITLES), help="deepfm, din, base with commas between (default: all)")
    option(
        "--threads", type=positive(int), default=len(os.sched_getaffinity(0)), help="default: all cores, %(default)s"
    )
    option("--batch-size", type=positive(int), default=1024, help="default: %(default)s")
    option("--epochs", type=positive(int), default=2, help="default: %(default)s")
    option("--lr", type=positive(float), default=1e-3, help="default: %(default)s")
    option("--seed", type=int, default=2026, help="default: %(default)s")
    option("--optimizer", choices=("adam", "sgd"), default="adam", help="default: %(default)s")
    option(
        "--backend",
        choices=("auto", "reference"),
        default="auto",
        help="reference: the pure-PyTorch reference instead of the kernels in rankkernels (default: auto)",
    )
    option("--out", type=Path, default=Path("results/train.json"), help="JSON result (default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def unwritable(path: Path) -> OSError | None:
    """Why no result can be written to ``path``: known before hours of training. Makes its folder, and no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        return error
    return None


def surroundings() -> dict:
    """The machine and the versions. Imported here: torch-rechub's process does without our package."""
    from bench.harness import machine

    names = ("torch", "torch-rechub", "rankkernels", "numpy", "pandas", "scikit-learn")
    return {"versions": {"python": platform.python_version(), **machine.versions(names)}, "machine": machine.describe()}


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv)
    if reason := unwritable(settings.out):
        print(f"train.py: --out: {reason}", file=sys.stderr)
        return 2
    if settings.backend == "reference":
        os.environ["RANKKERNELS_REFERENCE"] = "1"  # the workers inherit it
    data_of = {model: DATA_OF.get(model, model) for model in settings.models}
    needed = list(dict.fromkeys(data_of.values()))
    try:
        try:
            datasets = load(settings.data, needed, settings.seed)
        except Unavailable as reason:
            print(f"{reason}; going on with the synthetic data", file=sys.stderr)
            datasets = load(["synthetic"], needed, settings.seed)
    except DataError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    report = {
        "settings": {**vars(settings), "out": str(settings.out)},
        **surroundings(),
        "models": {},
    }
    for model, dataset in ((model, datasets[name]) for model, name in data_of.items() if name in datasets):
        ceiling = None
        if dataset.true_probability is not None:
            ceiling = dict(zip(("auc", "logloss"), metrics(dataset.test["label"], dataset.true_probability.numpy())))
        results = train(model, dataset, settings)
        report["models"][model] = {
            "data": {
                "name": dataset.name,
                "train_rows": len(dataset.train["label"]),
                "test_rows": len(dataset.test["label"]),
            },
            "ceiling": ceiling,
            "results": results,
            "comparison": compare(*results),
        }
    settings.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"written: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
