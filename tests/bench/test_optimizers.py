"""bench.demo.optimizers: every run trains what it says, on a few hundred samples with Zipf ids."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the demo's packages are not installed")
pytest.importorskip("torch_rechub", reason="the demo's packages are not installed")

from bench.demo import optimizers  # noqa: E402
from bench.demo.datasets import zipf_clicks  # noqa: E402
from bench.report.records import RECORDS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """Of each run, by its name, after ten steps."""
    dataset = zipf_clicks("tiny", (300, 40, 5), 2, 800, seed=0)
    assert [f.kind for f in dataset.fields] == ["sparse"] * 3 + ["dense"] * 2 and len(dataset.test["label"]) == 160
    count = np.bincount(dataset.train["c_0"].numpy(), minlength=300)
    assert count.max() > 10 * np.median(count[count > 0])
    settings = argparse.Namespace(threads=1, batch_size=64, epochs=1, seed=0, optimizer="adam", lr=optimizers.LR)
    return {run.name: optimizers.trained(run, dataset, settings) for run in optimizers.RUNS}


def test_runs_differ_as_their_optimizers_do(results):
    assert {r["steps"] for r in results.values()} == {10} and {r["rare_rows"] for r in results.values()} != {0}
    assert len({r["rare_norm_at_start"] for r in results.values()}) == 1
    dense, decayed = results["dense Adam"], results["torch-rechub's trainer: dense Adam, decay 1e-5"]
    assert decayed["rare_norm"] < dense["rare_norm"] and decayed["rare_norm"] < results["Adam, decay 1e-5"]["rare_norm"]
    assert results["FTRL, l1 1e-3"]["zeros"] > 0 == results["FTRL"]["zeros"] == results["Adam"]["zeros"]


def test_exact_adam_has_the_losses_of_dense_adam(results):
    dense, exact, lazy = (results[run]["first_losses"] for run in ("dense Adam", "Adam, exact", "Adam"))
    assert len(exact) == 10 and exact == pytest.approx(dense, rel=1e-5) and lazy != pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize("record", sorted(RECORDS.glob("*/demo/optimizers.json")), ids=lambda path: path.parts[-3])
def test_exact_adam_is_dense_adam_in_what_was_recorded(record):
    """MovieLens-100k, and clicks like Frappe's and Criteo's: 50 losses, and AUC after two epochs."""
    parts = json.loads(record.read_text())["data"]
    assert "ml-100k" in parts
    for part in parts.values():
        dense, exact = ({r["run"]: r for r in part["results"]}[run] for run in ("dense Adam", "Adam, exact"))
        assert len(exact["first_losses"]) == 50
        assert exact["first_losses"] == pytest.approx(dense["first_losses"], rel=1e-5)
        assert exact["auc"] == pytest.approx(dense["auc"], abs=1e-4)


def test_the_table_has_every_run(results):
    part = {"name": "tiny", "train_rows": 640, "test_rows": 160, "results": list(results.values())}
    text = optimizers.table(part)
    assert all(f"{r['run']} " in text and f"{r['auc']:.4f}" in text for r in results.values())
