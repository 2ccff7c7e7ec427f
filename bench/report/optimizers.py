"""What the optimizers of tables train, from the record of ``bench.demo.optimizers``: a section of a records' page."""

from __future__ import annotations

import json

from bench.report.records import RECORDS
from bench.report.tables import markdown

HEAD = """\
## Optimizers of tables

What `python -m bench.demo.optimizers` printed on {cores} cores of an {cpu}, {isa} kernels, torch {torch}: DeepFM, batch
{batch_size}, {epochs} epochs, seed {seed}; every run starts from the same weights and sees the same batches. Dense Adam
is torch-rechub's model with torch's Adam over all parameters, in the first line as its CTRTrainer makes it. Elsewhere
our fused optimizer has the tables, torch's Adam the rest. Rare rows are those that the training part has one to
{rare} times; beside the norms of all rows after training stands that of the rare ones before it. Speed: torch-rechub's
default trainer's time of a step over this one's, forward, loss, backward and step, one after the other.
"""


def against_dense(results: list[dict]) -> list[str]:
    """How far the losses and the AUC of exact Adam are from those of dense Adam."""
    runs = {r["run"]: r for r in results}
    dense, exact = runs["dense Adam"], runs["Adam, exact"]
    losses = list(zip(dense["first_losses"], exact["first_losses"], strict=True))
    furthest = max(abs(a - b) / a for a, b in losses)
    return [f"Adam, exact, against dense Adam: the losses of the first {len(losses)} steps within {furthest:.1e} of "
            f"them, AUC {abs(dense['auc'] - exact['auc']):.1e} apart.", ""]  # fmt: skip


def section(processor: str) -> list[str]:
    """The lines, none where there is no such record."""
    path = RECORDS / processor / "demo" / "optimizers.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    machine = {key: record["machine"][key] for key in ("cores", "cpu", "isa")}
    settings = {key: record["settings"][key] for key in ("batch_size", "epochs", "seed", "rare")}
    lines = [HEAD.format(**machine, **settings, torch=record["versions"]["torch"])]
    for part in record["data"].values():
        first = part["results"][0]
        rows = [
            [r["run"], f"{r['auc']:.4f}", f"{r['logloss']:.4f}", f"{r['rare_norm']:.4f}", f"{r['other_norm']:.4f}",
             f"{100 * r['zeros']:.1f} %", f"{r['ms_per_step']:.2f}", f"{first['ms_per_step'] / r['ms_per_step']:.1f}"]
            for r in part["results"]
        ]  # fmt: skip
        head = ["trained by", "AUC", "LogLoss", f"norm of {first['rare_rows']:,} rare rows", "of the others", "zeros",
                "ms a step", "speed"]  # fmt: skip
        lines += [
            f"{part['name']}: {part['train_rows']:,} samples to train, {part['test_rows']:,} to test; norm of the rare "
            f"rows before training {first['rare_norm_at_start']:.4f}.",
            "",
            *markdown(head, rows),
            "",
            *against_dense(part["results"]),
        ]
    return lines
