"""bench/demo/train_distributed.py: real processes, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "demo" / "train_distributed.py"
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
#: Seconds that no process of these may take.
LIMIT = 120


def events(folder: Path) -> Path:
    """Users who stay within a third of the items: 60 of them with 10 to 29 events each."""
    rng = np.random.default_rng(7)
    lines = [f"u{u},i{int(rng.integers(30)) * 3 + u % 3},{t}" for u in range(60) for t in range(10 + u % 20)]
    path = folder / "events.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **more}


def start(processes: int, *options: str) -> list[subprocess.Popen]:
    """The processes as torchrun would start them, without one to watch over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--quiet", *options], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(processes)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen]) -> list[str]:
    """Their output. None outlives this."""
    try:
        return [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def trained(folder: Path, processes: int, *options: str) -> dict:
    out = folder / "out.json"
    running = start(processes, "--out", str(out), *options)
    output = end(running)
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["rows", "whole"])
def test_a_run_whose_process_is_killed_goes_on(tmp_path, tables):
    """The other ends with an error; the same command then has the losses of a run that nothing happened to."""
    options = ["--data", str(events(tmp_path)), "--batch-size", "64", "--epochs", "4", "--every", "10"]
    options += ["--tables", tables]
    undisturbed = trained(tmp_path, 2, *options, "--checkpoint", str(tmp_path / "other"))
    options += ["--checkpoint", str(tmp_path / "run")]
    running = start(2, *options)
    try:
        begun = time.monotonic()
        while not list((tmp_path / "run").glob("step-*")):
            assert time.monotonic() < begun + LIMIT and all(process.poll() is None for process in running)
            time.sleep(0.01)
        running[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        output = running[0].communicate(timeout=LIMIT)[0]
        assert time.monotonic() < killed + 60
        assert running[0].returncode not in (0, -signal.SIGKILL) and "RuntimeError" in output, output
    finally:
        end(running)
    resumed = trained(tmp_path, 2, *options)
    assert 0 < resumed["begun"] < len(resumed["losses"])
    assert resumed["losses"] == undisturbed["losses"]
    assert resumed["auc"] == undisturbed["auc"]
    if tables == "rows":  # one process takes over; the test of FSDP2 has such of whole tables
        alone = trained(tmp_path, 1, *options, "--epochs", "6")
        assert alone["begun"] == len(undisturbed["losses"]) < len(alone["losses"])
        assert alone["losses"][: alone["begun"]] == undisturbed["losses"]
        assert max(alone["losses"][alone["begun"] :]) < undisturbed["losses"][0]


@pytest.mark.slow
def test_movielens_in_two_processes_is_as_in_one(tmp_path):
    """As README and page start it, and with whole tables. A machine without the data trains on generated ones."""
    from bench.demo import datasets

    try:
        datasets.movielens_wheel()
        data = ["--data", "ml-100k"]
    except datasets.Unavailable as reason:
        print(f"{reason}; taking the synthetic data")
        data = ["--data", "synthetic"]
    found = []
    for processes, tables in ((1, "rows"), (2, "rows"), (2, "whole")):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, str(SCRIPT), *data, "--tables", tables, "--epochs", "1", "--out", str(out)], cwd=ROOT,
            capture_output=True, text=True, timeout=4 * LIMIT, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{processes} processes, steps 0 to" in done.stdout
        assert done.stderr.count("DIN:   0%") == 1  # progress of the first process alone
        found.append(json.loads(out.read_text()))
    one, *others = found
    assert len(one["losses"]) > 50 and one["auc"] > 0.7
    for two in others:
        assert len(one["losses"]) == len(two["losses"])
        np.testing.assert_allclose(two["losses"][0], one["losses"][0], rtol=1e-5)
        assert abs(two["auc"] - one["auc"]) < 0.003
