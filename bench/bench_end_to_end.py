"""Training from data to AUC: DeepFM and DIN on MovieLens-100k, DeepFM on synthetic data in the manner of Criteo's.

Each contender trains in a process of its own, on the same batches from the same seed, and they take turns. A step is
forward, loss, backward and optimizer; making batches, evaluating and compiling are not timed, and seconds of training
are steps times the median step. The AUC aimed at is what torch-rechub reaches at its end, less 0.002. torch-rechub, its
compiled form and ours train with torch's Adam. "fused" steps only the rows looked up, with Adam or row-wise Adagrad,
which FBGEMM's tables have too; everything but the tables keeps torch's Adam.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import rankkernels as rk
from bench.demo.datasets import Dataset, Unavailable, load, sigmoid
from bench.demo.models import EMBED_DIM, Field, build_model, classes
from bench.harness import machine, peers
from bench.harness.race import given, summary

TURN_STEPS, WARM_STEPS, SEED, LR, TABLE_LR = 10, 3, 0, 1e-3, 0.02
OURS = "rankkernels"
VARIANTS = ["torch-rechub", "torch-rechub compiled", "FBGEMM tables", "fused Adam", "fused row-wise Adagrad", "ours"]


def criteo_like(rows: int, samples: int) -> Dataset:
    """26 tables of ``rows`` rows in all, sizes in geometric progression; table ids r with probability ~ (r + 1)^-1.05,
    shuffled. logit = -1 + sum_f w_f + sum_{f<g} <v_f, v_g>, D = 4; the last tenth of the samples is the test part."""
    rng = np.random.default_rng(SEED)
    weights = np.logspace(0, 4, 26)
    sizes = np.maximum(4, rows * weights / weights.sum()).astype(int)
    columns, w, v = {}, 0.0, []
    for i, size in enumerate(sizes):
        cumulated = np.cumsum(np.arange(1, size + 1) ** -1.05)
        drawn = np.searchsorted(cumulated, rng.random(samples) * cumulated[-1]).clip(max=size - 1)
        ids = rng.permutation(size)[drawn]
        w = w + rng.normal(0, 0.3, size)[ids]
        v.append(rng.normal(0, 0.15, (size, 4))[ids])
        columns[f"C{i + 1}"] = ids
    pairs = (sum(v) ** 2 - sum(x**2 for x in v)).sum(1) / 2
    columns["label"] = (rng.random(samples) < sigmoid(-1 + w + pairs)).astype(np.float32)
    fields = [Field(f"C{i + 1}", "sparse", int(size)) for i, size in enumerate(sizes)]
    return Dataset.split(f"Criteo-like, {rows:.0e} rows", fields, columns, np.arange(samples) >= samples * 9 // 10)


class FbgemmDeepFM(nn.Module):
    """torch-rechub's DeepFM with its tables in FBGEMM's table-batched operator, which steps them in the backward."""

    def __init__(self, fields: list[Field]):
        super().__init__()
        from torch_rechub.basic.layers import FM, LR, MLP

        self.names = [field.name for field in fields]
        self.tables = peers.fbgemm_tables(
            [(field.vocab_size, EMBED_DIM) for field in fields],
            optimizer="EXACT_ROWWISE_ADAGRAD", learning_rate=TABLE_LR, eps=1e-8,
        )  # fmt: skip
        for weight in self.tables.split_embedding_weights():
            nn.init.normal_(weight, 0, 0.05)
        width = len(fields) * EMBED_DIM
        self.linear, self.fm = LR(width), FM(reduce_sum=True)
        self.mlp = MLP(width, dims=[256, 128], activation="dice")

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([x[name] for name in self.names])
        flat = self.tables(ids, torch.arange(ids.numel() + 1))
        y = self.linear(flat) + self.fm(flat.unflatten(1, (-1, EMBED_DIM))) + self.mlp(flat)
        return torch.sigmoid(y.squeeze(1))


class Trainer:
    def __init__(self, variant: str, model: str, path: str, batch_size: int, threads: int):
        torch.set_num_threads(threads)
        dataset = torch.load(path, weights_only=False)
        self.batch_size, self.train_part, self.test_part = batch_size, dataset.train, dataset.test
        torch.manual_seed(SEED)
        if variant == "FBGEMM tables":
            self.net = FbgemmDeepFM(dataset.fields)
        else:
            library = "torch-rechub" if variant.startswith("torch-rechub") else OURS
            self.net = build_model(classes(library), model, dataset.fields)
        dense = list(self.net.parameters())
        if "fused" in variant:
            tables = {"fused Adam": rk.optim.Adam, "fused row-wise Adagrad": rk.optim.RowWiseAdagrad}[variant]
            lr = LR if variant == "fused Adam" else TABLE_LR
            rk.optim.fuse(self.net, tables(self.net.embedding.parameters(), lr=lr))
        if "fused" in variant or variant == "FBGEMM tables":
            dense = [p for name, p in self.net.named_parameters() if not name.startswith(("embedding.", "tables."))]
        self.optimizer = torch.optim.Adam(dense, lr=LR)
        self.step_net = torch.compile(self.net) if variant.endswith("compiled") else self.net
        self.batches = self.endless()

    def endless(self):
        rows, epoch = len(self.train_part["label"]), 0
        while True:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED + epoch))
            for indices in order[: rows // self.batch_size * self.batch_size].view(-1, self.batch_size):
                yield {name: column[indices] for name, column in self.train_part.items()}
            epoch += 1

    def train(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        self.net.train()
        seconds = []
        for _ in range(steps):
            batch = next(self.batches)
            begin = time.perf_counter()
            loss = F.binary_cross_entropy(self.step_net(batch), batch["label"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    @torch.no_grad()
    def auc(self) -> float:
        self.net.eval()
        parts = range(0, len(self.test_part["label"]), 4096)
        p = torch.cat([self.net({k: v[i : i + 4096] for k, v in self.test_part.items()}) for i in parts])
        return float(roc_auc_score(self.test_part["label"], p))


def worker(connection, *args) -> None:
    machine.keep_freed_memory()
    trainer = Trainer(*args)
    connection.send("ready")
    while (command := connection.recv()) is not None:
        connection.send(trainer.auc() if command == "auc" else trainer.train(command))


class Contender:
    """A training process, and what it measured."""

    def __init__(self, *args):
        spawn = multiprocessing.get_context("spawn")
        self.connection, end = spawn.Pipe()
        self.process = spawn.Process(target=worker, args=(end, *args), daemon=True)
        self.process.start()
        end.close()
        self.turns: list[list[float]] = []
        self.aucs: list[float] = []
        self.connection.recv()

    def ask(self, command):
        self.connection.send(command)
        return self.connection.recv()

    def turn(self) -> None:
        self.turns.append(self.ask(TURN_STEPS))

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


def movielens(model: str) -> Dataset:
    try:
        return load(["ml-100k"], [model], SEED)[model]
    except Unavailable as reason:
        pytest.skip(str(reason))


TASKS = {
    "DeepFM, MovieLens-100k": ("deepfm", lambda: movielens("deepfm"), 1024, 15),
    "DIN, MovieLens-100k": ("din", lambda: movielens("din"), 1024, 15),
    "DeepFM, Criteo-like, 1e6 rows": ("deepfm", lambda: criteo_like(10**6, 500_000), 4096, 20),
    "DeepFM, Criteo-like, 1e7 rows": ("deepfm", lambda: criteo_like(10**7, 200_000), 4096, 3),
}
#: Too few turns to speak of an AUC.
ONLY_TIMED = "1e7"


def not_measured(task: str, model: str) -> dict[str, str]:
    if model == "din" or "MovieLens" in task:
        return {"fbgemm-gpu-cpu": "measured on the Criteo-like data"}
    return peers.missing("fbgemm-gpu-cpu")


def train(benchmark, contenders: dict[str, Contender], turns: int, learns: bool) -> list[dict[str, float]]:
    """The contenders' turns, ours timed by pytest-benchmark too, and what the machine gave meanwhile."""
    probes = []

    def others():
        probes.append(machine.probe())
        for name, c in contenders.items():
            if learns and c.turns:
                c.aucs.append(c.ask("auc"))
            if name != "ours":
                c.turn()

    try:
        for c in contenders.values():
            c.ask(WARM_STEPS)  # compiles, and fills the optimizers' state
        benchmark.pedantic(contenders["ours"].turn, setup=others, rounds=turns)
        if learns:
            for c in contenders.values():
                c.aucs.append(c.ask("auc"))
    finally:
        for c in contenders.values():
            c.stop()
    return probes


def compared(contenders: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Seconds of a step, and the ratio to ours within a turn."""
    record = {}
    for name, c in contenders.items():
        q1, median, q3 = summary([t for turn in c.turns for t in turn])
        r1, ratio, r3 = summary([sum(a) / sum(b) for a, b in zip(c.turns, contenders["ours"].turns)])
        record[name] = dict(median_s=median, q1_s=q1, q3_s=q3, ratio=ratio, ratio_q1=r1, ratio_q3=r3)
    return record


def learned(c: Contender, median: float, batch_size: int, target: float | None) -> dict:
    """AUC against seconds of training."""
    curve = [[(WARM_STEPS + TURN_STEPS * (i + 1)) * median, auc] for i, auc in enumerate(c.aucs)]
    until = next((seconds for seconds, auc in curve if target and auc >= target), None)
    return dict(samples_per_s=batch_size / median, auc_curve=curve, seconds_to_target=until)


@pytest.mark.parametrize("task", TASKS)
def test_training(task, benchmark, request, note):
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    model, make, batch_size, turns = TASKS[task]
    turns = 2 if request.config.getoption("--quick") else turns
    missing, learns = not_measured(task, model), ONLY_TIMED not in task
    threads, watch = os.cpu_count() or 1, machine.Watch()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(make(), path := str(Path(folder, "dataset.pt")))
        contenders = {
            v: Contender(v, model, path, batch_size, threads) for v in VARIANTS if v != "FBGEMM tables" or not missing
        }
    probes = train(benchmark, contenders, turns, learns)
    others_cores = watch.others()  # the processes have ended: their time is ours
    record = compared(contenders)
    target = contenders["torch-rechub"].aucs[-1] - 0.002 if learns else None
    learning = {name: learned(c, record[name]["median_s"], batch_size, target) for name, c in contenders.items()}
    benchmark.extra_info.update(
        case=task, kind="training step", threads=threads, baseline="torch-rechub", contenders=record, rounds=turns,
        rounds_kept=turns, others_cores=others_cores, disturbed=bool(others_cores and others_cores > machine.QUIET),
        given_gb_s=given(probes), not_measured=missing, learning=learning, target_auc=target,
    )  # fmt: skip
    note(
        "   ".join(
            f"{n} {batch_size / r['median_s']:,.0f}/s"
            + (f" AUC {learning[n]['auc_curve'][-1][1]:.4f}" if learns else "")
            for n, r in record.items()
        )
    )
