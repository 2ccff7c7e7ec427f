"""The example app in a process of its own, started, told to load its model again, and stopped as README.md says."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from running import ROWS, din

from rankkernels.serve import FrozenModel

ROOT = Path(__file__).parents[2]
REQUEST = {"user": {"user": 3, "clicks": [1, 2]}, "candidates": {"item": list(range(ROWS))}}


def scores_of(frozen: FrozenModel) -> dict:
    return {"scores": frozen.rank(**REQUEST).tolist()}


def put(frozen: FrozenModel, path: Path) -> None:
    frozen.save(path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@contextlib.contextmanager
def process(path: Path):
    """The process, and a client of it once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "docs/examples/serving/app.py", path, "--candidates", "item", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until(lambda: started.poll() is not None or is_up(client))
            assert started.poll() is None, started.stderr.read()
            yield started, client
    finally:
        started.kill()
        started.wait()


def is_up(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_started_loaded_again_and_stopped_without_a_lost_request(tmp_path):
    path, before, after = tmp_path / "model.pt", din(0), din(1)
    put(before, path)
    answers, stop = [], False

    def ask(client: httpx.Client) -> None:
        while not stop:
            response = client.post("/rank", json=REQUEST)
            assert response.status_code == 200, response.text
            answers.append(response.json())

    with process(path) as (started, client), ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, client) for _ in range(4)]
        try:
            wait_until(lambda: len(answers) > 20)
            put(after, path)
            started.send_signal(signal.SIGHUP)
            wait_until(lambda: answers[-1] != answers[0])
            count = len(answers)
            path.write_bytes(b"no model")
            started.send_signal(signal.SIGHUP)
            wait_until(lambda: 'rank_reloads_total{result="failed"} 1.0' in client.get("/metrics").text)
            wait_until(lambda: len(answers) > count + 20)
        finally:
            stop = True
        for future in asking:
            future.result()
        assert answers[0] == scores_of(before) != scores_of(after) == answers[-1]
        assert all(answer in (answers[0], answers[-1]) for answer in answers)
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) in (0, -signal.SIGTERM)
        assert "the model cannot be loaded, the one before stays" in started.stderr.read()
