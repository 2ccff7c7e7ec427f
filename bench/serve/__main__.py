"""The load test of the example app (docs/examples/serving): latency against load, of ours and of others.

python -m bench.serve ours                 one contender's curve, into bench/records/avx512/serve/load.json
python -m bench.serve --bar evenly         ours at 70 % (--seconds 120: for two minutes), or "at random", or overloaded
python -m bench.serve --restart            ours killed and started again
python -m bench.serve --chart              the chart, from the record

The server has one core, the load another: a closed loop of eight clients says what the server can do, open loops at
parts of that how long an answer takes. With ``--rankers 2`` the server has both cores, and shares them with the load.
First run each contender once with ``--prepare``, which compiles.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench.harness import machine
from bench.harness.record import rounded
from bench.report import draw
from bench.serve import contenders, queueing
from bench.serve.load import percentiles

RECORDS = Path(__file__).parents[1] / "records/avx512"
RECORD, CHART = RECORDS / "serve/load.json", RECORDS / "serve_load.svg"
#: Parts of what the closed loop reached.
LOADS = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5]
#: Of each bar: at which part of that, and whether at random times.
BARS = {"evenly": (0.7, False), "at random": (0.7, True), "overloaded": (1.5, True)}
CORES = sorted(os.sched_getaffinity(0))
PORT = 8765


@contextlib.contextmanager
def server(contender: str, candidates: int, rankers: int = 1) -> Iterator[tuple[int, subprocess.Popen]]:
    """Its port and its process, when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.serve.server", contender, str(port), "--candidates", str(candidates)]
    command += ["--rankers", str(rankers), "--cores", *map(str, CORES[:rankers])]
    process = subprocess.Popen(command)
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


def load(port: int, bodies: Path, rankers: int = 1, **options: object) -> dict:
    """What a process that is the load says at its end; it has the cores that the server has not, or else all."""
    cores = CORES[rankers:] or CORES
    arguments = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in options.items()]
    command = [sys.executable, "-m", "bench.serve.load", str(port), str(bodies), *arguments]
    pin = partial(os.sched_setaffinity, 0, cores)
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True, preexec_fn=pin).stdout)


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


def bar(name: str, candidates: int, bodies: Path, seconds: float, rankers: int) -> dict:
    """Ours under a part of what it can do, and the latencies that the queue alone would have."""
    watch, (part, poisson) = machine.Watch(), BARS[name]
    with server("ours", candidates, rankers) as (port, _):
        load(port, bodies, rankers, seconds=1)
        saturation = load(port, bodies, rankers, seconds=min(seconds, 4), clients=8)["requests_s"]
        options = {"poisson": True} if poisson else {}
        found = load(port, bodies, rankers, seconds=seconds, rate=part * saturation, **options)
    found |= {"saturation_s": saturation, "seconds": seconds, "others_cores": watch.others()}
    if poisson and part < 1:
        a_request = rankers / saturation
        found["queue_ms"] = percentiles([a_request * each for each in queueing.latencies(rankers, part)])
    return found


def restart(candidates: int, bodies: Path) -> dict:
    """Seconds until the app answers when it has been killed, and of importing torch alone; milliseconds of the first
    request and of the tenth. The best of three."""
    body = bodies.read_bytes().splitlines()[0]
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/rank", data=body, headers={"content-type": "application/json"}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        contenders.load("ours", candidates).save(path)
        command = [sys.executable, "docs/examples/serving/app.py", str(path), "--port", str(PORT), "--candidates"]
        command += contenders.CANDIDATES
        ready, imported, requests = [], [], []
        for _ in range(3):
            began = time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while not answers(PORT):
                time.sleep(0.01)
            ready.append(time.perf_counter() - began)
            requests.append([1e3 * seconds_of(lambda: urllib.request.urlopen(request).read()) for _ in range(10)])
            process.kill()
            process.wait()
            imported.append(seconds_of(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)))
    each = [min(times) for times in zip(*requests)]
    return {"ready_s": min(ready), "torch_s": min(imported), "first_ms": each[0], "tenth_ms": each[-1]}


def seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


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
    parser.add_argument("--bar", choices=BARS)
    parser.add_argument("--rankers", type=int, default=1, help="of a bar: requests that the server ranks at a time")
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
            record["restart"] = restart(options.candidates, bodies)
        if options.bar:
            found = bar(options.bar, options.candidates, bodies, options.seconds, options.rankers)
            record.setdefault("bars", {}).setdefault(f"{options.rankers} at a time", {})[options.bar] = found
            print(json.dumps(rounded(found)))
        for contender in options.contenders:
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
