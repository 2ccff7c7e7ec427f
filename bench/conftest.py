"""Measuring: contenders take turns within every round, results are compared before anything is timed, medians count.

``pytest bench`` runs all benchmarks, ``-k`` a part, ``--benchmark-json FILE`` keeps the record; pytest-benchmark is the
engine. Its own figure is ours; the others' times of the same rounds are in each benchmark's ``extra_info`` and in the
table printed at the end.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from rankkernels.ops import _library

ROWS = pytest.StashKey[list]()
MAX_SECONDS, MAX_ROUNDS, MIN_ROUNDS = 10.0, 40, 9


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"Medians of interleaved rounds, ms. torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"load {os.getloadavg()[0]:.1f} at the end. x NAME: how many times faster than NAME; read: of the bandwidth of "
        "reading the same input once (torch.dot or sum, the faster), measured in the same rounds."
    )
    for name, text in rows:
        write(f"{name:<64} {text}")


@pytest.fixture(params=[2, 1], ids=["2_threads", "1_thread"])
def threads(request):
    before = torch.get_num_threads()
    if request.param > (os.cpu_count() or 1):
        pytest.skip(f"{request.param} threads on {os.cpu_count()} cores")
    torch.set_num_threads(request.param)
    torch._dynamo.reset()
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark, request):
    """``race(ours, contenders)``: times ``ours`` with pytest-benchmark and each contender before it in every round.

    Returns the medians in seconds by name, ours under "ours".
    """

    def run(ours: Callable[[], object], contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        for function in (*contenders.values(), ours):
            function()
        times: dict[str, list[float]] = {name: [] for name in contenders}

        def others():
            for name, function in contenders.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)

        start = time.perf_counter()
        others(), ours()
        rounds = int(MAX_SECONDS / (time.perf_counter() - start))
        for record in times.values():
            record.clear()
        benchmark.pedantic(ours, setup=others, rounds=min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)))
        medians = {name: statistics.median(record) for name, record in times.items()}
        medians["ours"] = benchmark.stats.stats.median
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["isa"] = _library.CPU_ISAS[torch.ops.rankkernels.cpu_isa()]
        benchmark.extra_info["load"] = os.getloadavg()[0]
        benchmark.extra_info["medians_s"] = medians
        benchmark.extra_info["quartiles_s"] = {n: statistics.quantiles(t, n=4) for n, t in times.items()}
        return medians

    run.report = lambda medians, text="": note(request, f"{ratios(medians)}   {text}")
    return run


def note(request, text: str) -> None:
    """A line of the table at the end."""
    request.config.stash[ROWS].append((request.node.name, text))


#: Contenders that measure the machine and not a peer.
CEILINGS = ("read_sum", "read_dot", "sgemm")


def ratios(medians: dict[str, float]) -> str:
    """Ours in ms, and how many times slower each of the others is."""
    peers = [name for name in medians if name != "ours" and name not in CEILINGS]
    text = f"{medians['ours'] * 1e3:8.3f}"
    return text + "".join(f"   x {name} {medians[name] / medians['ours']:6.2f}" for name in peers)
