"""The load test of the example app (docs/examples/serving): latency against load, of ours and of others.

python -m bench.serve ours           one contender's curve, into bench/records/avx2/serve/load.json
python -m bench.serve --bars         ours at 70 % (--seconds 120: for two minutes) and at 150 %
python -m bench.serve --restart      ours killed and started again
python -m bench.serve --chart        the chart, from the record

The server has one core, the load another: a closed loop of eight clients says what the server can do, open loops at
parts of that how long an answer takes. First run each contender once with ``--prepare``, which compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.harness import machine
from bench.harness.record import rounded
from bench.report import draw
from bench.serve import contenders

RECORDS = Path(__file__).parents[1] / "records/avx2"
RECORD, CHART = RECORDS / "serve/load.json", RECORDS / "serve_load.svg"
#: Parts of what the closed loop reached.
LOADS = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5]
SERVER_CORE, LOAD_CORE = 0, 1


@contextlib.contextmanager
def server(contender: str, candidates: int) -> Iterator[tuple[int, subprocess.Popen]]:
    """Its port and its process, when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.serve.server", contender, str(port), "--candidates", str(candidates)]
    process = subprocess.Popen([*command, "--core", str(SERVER_CORE)])
    try:
        while not answers(port):
            if process.poll() is not None:
                sys.exit(f"the server of {contender} has exited")
            time.sleep(0.02)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def cpu_seconds(process: subprocess.Popen) -> float:
    """What a process has used so far: what others leave it changes less than time does."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def load(port: int, bodies: Path, **options: object) -> dict:
    """What a process that is the load says at its end."""
    arguments = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in options.items()]
    command = [sys.executable, "-m", "bench.serve.load", str(port), str(bodies), *arguments]
    pin = {"preexec_fn": lambda: os.sched_setaffinity(0, {LOAD_CORE})} if (os.cpu_count() or 1) > 1 else {}
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True, **pin).stdout)


def write_bodies(path: Path, candidates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    path.write_text("\n".join(json.dumps(contenders.request(candidates, generator)) for _ in range(32)))


def curve(contender: str, candidates: int, bodies: Path, seconds: float) -> dict:
    watch = machine.Watch()
    with server(contender, candidates) as (port, process):
        load(port, bodies, seconds=min(seconds, 2))  # warm
        before = cpu_seconds(process)
        closed = load(port, bodies, seconds=seconds, clients=8)
        closed["cpu_ms"] = 1e3 * (cpu_seconds(process) - before) / sum(closed["statuses"].values())
        alone = load(port, bodies, seconds=min(seconds, 2), clients=1)
        opened = []
        for part in LOADS:
            rate = part * closed["requests_s"]
            opened.append({"load": part, "rate": rate, **load(port, bodies, seconds=seconds, rate=rate, poisson=True)})
            print(json.dumps(rounded(opened[-1])), flush=True)
    found = {"saturation_s": closed["requests_s"], "closed": closed, "alone": alone, "opened": opened}
    return {**found, "others_cores": watch.others()}


def bars(candidates: int, bodies: Path, seconds: float) -> dict:
    """Ours at 70 % of what it can do and at 150 %."""
    watch = machine.Watch()
    with server("ours", candidates) as (port, _):
        load(port, bodies, seconds=1)
        saturation = load(port, bodies, seconds=min(seconds, 4), clients=8)["requests_s"]
        at_70 = {
            "evenly": load(port, bodies, seconds=seconds, rate=0.7 * saturation),
            "at random": load(port, bodies, seconds=seconds / 6, rate=0.7 * saturation, poisson=True),
        }
        at_150 = load(port, bodies, seconds=seconds / 10, rate=1.5 * saturation, poisson=True)
    return {"saturation_s": saturation, "at_70": at_70, "at_150": at_150, "others_cores": watch.others()}


def restart(candidates: int) -> dict:
    """Seconds until the app answers when it has been killed, and of importing torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        contenders.load("ours", candidates).save(path)
        command = [sys.executable, "docs/examples/serving/app.py", str(path), "--port", "8765", "--candidates"]
        command += contenders.CANDIDATES
        ready, imported = [], []
        for _ in range(3):
            began = time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while not answers(8765):
                time.sleep(0.01)
            ready.append(time.perf_counter() - began)
            process.kill()
            process.wait()
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            imported.append(time.perf_counter() - began)
    return {"ready_s": min(ready), "torch_s": min(imported)}


def chart_data(record: dict) -> dict:
    points = {}
    for name, found in record["contenders"].items():
        kept = [o for o in found["opened"] if o["ms"]]
        points[name] = [[o["rate"], o["ms"]["p50"], o["ms"]["p99"]] for o in kept]
    return {"curves": points, "caption": record["caption"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", choices=[*contenders.CONTENDERS, []])
    parser.add_argument("--candidates", type=int, default=700)
    parser.add_argument("--seconds", type=float, default=6, help="of each load")
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="compile and check, measure nothing")
    parser.add_argument("--chart", action="store_true")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {"contenders": {}}
    with tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder) / "bodies"
        write_bodies(bodies, options.candidates)
        if options.restart:
            record["restart"] = restart(options.candidates)
        if options.bars:
            record["bars"] = bars(options.candidates, bodies, options.seconds)
        for contender in [] if options.bars else options.contenders:
            if options.prepare:
                with server(contender, options.candidates):
                    print(f"{contender} answers")
            else:
                record["contenders"][contender] = curve(contender, options.candidates, bodies, options.seconds)
    if options.chart:
        draw.draw("load", chart_data(record), CHART)
    elif not options.prepare:
        described = machine.conditions()
        record["conditions"] = described
        record["caption"] = (
            f"DIN, two histories of {contenders.LENGTH}, {options.candidates} candidates a request, JSON, float32; "
            f"server on one core of {described['cpu']}, {described['isa']} kernels, torch {torch.__version__}"
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rounded(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
