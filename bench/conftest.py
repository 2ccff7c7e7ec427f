"""``pytest bench`` runs all benchmarks, ``-k`` a part, ``--benchmark-json FILE`` keeps the record.

pytest-benchmark is the engine. Its own figure is ours; what the others took in the same rounds is in each benchmark's
``extra_info``. How a race is run: ``bench.harness.race``, and why so: docs/performance/measuring.md.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
import torch

from bench.harness import machine, record
from bench.harness.race import Effort, Race

LINES, CONDITIONS, EFFORT = pytest.StashKey[list](), pytest.StashKey[dict](), pytest.StashKey[Effort]()


def pytest_addoption(parser):
    parser.addoption(
        "--malloc", choices=("keep", "default"), default="keep", help="keep freed memory in the process, or glibc's way"
    )
    parser.addoption("--quick", action="store_true", help="two rounds each: does everything run? No numbers to quote")


def pytest_configure(config):
    quick = config.getoption("--quick")
    config.stash[EFFORT] = Effort(seconds=0.1, min_rounds=2, patience=0.0) if quick else Effort()
    config.stash[LINES] = []
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # after eight recompilations
    config.stash[CONDITIONS] = {**machine.conditions(), "malloc": "glibc's defaults", "quick": quick}
    if config.getoption("--malloc") == "keep" and machine.keep_freed_memory():
        config.stash[CONDITIONS]["malloc"] = "freed memory kept"
        if machine.NO_THREAD_CACHE in os.environ.get("GLIBC_TUNABLES", ""):
            config.stash[CONDITIONS]["malloc"] += ", no thread cache"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    record.complete(output_json, config.stash[CONDITIONS])


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash[LINES]
    if not lines:
        return
    conditions, write = config.stash[CONDITIONS], terminalreporter.write_line
    write("")
    write(
        f"Medians of interleaved rounds. torch {torch.__version__}, {conditions['torch_isa']}, kernels for "
        f"{conditions['isa']}, {conditions['malloc']}. x NAME: how many times faster than NAME; floor: the bytes at "
        "the bandwidth of reading as many, or the flops at sgemm's rate, whichever is longer, both measured here."
    )
    for name, text, _ in lines:
        write(f"{name:<64} {text}")
    if conditions["quick"]:
        write("--quick: no numbers to quote", red=True)
    for peer, reason in conditions["not_measured"].items():
        write(f"not measured: {peer} ({reason})")
    disturbed = sum(d for _, _, d in lines)
    if disturbed:
        write(f"BUSY MACHINE: other processes took part in {disturbed} of {len(lines)} races (marked !)", red=True)


@pytest.fixture(params=[2, 1], ids=["2_threads", "1_thread"])
def threads(request):
    before = torch.get_num_threads()
    if request.param > (os.cpu_count() or 1):
        pytest.skip(f"{request.param} threads on {os.cpu_count()} cores")
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_process():
    """Every benchmark starts with nothing compiled and nothing kept, as in a process of its own."""
    torch._dynamo.reset()
    gc.collect()
    machine.return_freed_memory()


@pytest.fixture
def note(request) -> Callable[..., None]:
    """``note(text)``: a line of the table at the end."""

    def add(text: str, disturbed: bool = False) -> None:
        request.config.stash[LINES].append((request.node.name, text, disturbed))

    return add


@pytest.fixture
def race(benchmark, request, note) -> Race:
    return Race(benchmark, request.node.name, request.config.stash[EFFORT], note)
