"""The machine under the benchmarks: who else uses it, what it can do at best, what is installed on it."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable

import torch

from rankkernels.ops import _library

#: Whom the benchmarks compare with: distribution -> the module that must import for it to be measured.
PEERS = {
    "torch-rechub": "torch_rechub",
    "deepctr-torch": "deepctr_torch.layers",
    "fuxictr": "fuxictr.pytorch.layers",
    "tzrec-sekai": "bench.harness.torch_easyrec",
    "fbgemm-gpu-cpu": "fbgemm_gpu",
    "zentorch": "zentorch",
}
#: More than this many cores in use by others: what was timed meanwhile is called disturbed.
QUIET = 0.15
#: What glibc has to be told before a process starts, in GLIBC_TUNABLES.
NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"
#: Environment variables that change what is measured begin so.
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MALLOC_", "GLIBC_")
#: Shorter than this, /proc/stat, which counts in hundredths of a second, cannot tell.
SHORTEST_WATCH = 0.25


@functools.cache
def missing(peer: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    try:
        importlib.metadata.version(peer)
        importlib.import_module(PEERS[peer])
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # a peer that breaks in its import is a fact to record, whatever it raises
        return f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


def versions(names: Iterable[str] = ("torch", "numpy", "triton", *PEERS)) -> dict[str, str | None]:
    """Of each distribution; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict:
    """The processor and the system."""
    cpu = platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "isa": _library.cpu_isa, "system": platform.platform()}


def conditions() -> dict:
    """What does not change during a run."""
    page_file = "/sys/kernel/mm/transparent_hugepage/enabled"
    huge_pages = open(page_file).read() if os.path.exists(page_file) else "[unknown]"
    return {
        **describe(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": huge_pages.split("[")[1].split("]")[0],
        "environment": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        "versions": versions(),
        "not_measured": {peer: reason for peer in PEERS if (reason := missing(peer))},
        "load_before": os.getloadavg()[0],
    }


def keep_freed_memory() -> bool:
    """Has glibc's malloc keep what is freed, as the allocators that one deploys do; False where there is no glibc.

    By default it returns every large buffer to the system, and the next operation pays for its pages again. How much of
    that happens depends on what the process freed before, and the same eager step takes between one and three times its
    best time. Kept, every contender is at its best and two runs agree.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 64 << 20))


def return_freed_memory() -> None:
    """Gives back what malloc keeps, holes in the middle included: before a test whose tables need the room."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def _jiffies() -> tuple[int, int]:
    """All and idle time of all cores since the start; waiting for a disk is idle, time the hypervisor stole is not."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:9]]
    return sum(fields), fields[3] + fields[4]


class Clock:
    """Wall time."""

    def seconds(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class Watch:
    """How many cores other processes (and a hypervisor's other guests) used since ``start``; None where unknown."""

    known = sys.platform == "linux"

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()
        if self.known:
            self.all, self.idle = _jiffies()
            self.own = sum(os.times()[:4])

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def others(self) -> float | None:
        if not self.known or self.seconds < SHORTEST_WATCH:
            return None
        every, idle = _jiffies()
        seconds = (every - self.all) / os.sysconf("SC_CLK_TCK")
        busy = seconds - (idle - self.idle) / os.sysconf("SC_CLK_TCK")
        return max(0.0, (busy - (sum(os.times()[:4]) - self.own)) / self.seconds)


def best_time(function: Callable[[], object], seconds: float = 0.15) -> float:
    function()
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds:
        best = min(best, Clock().seconds(function))
    return best


@functools.cache
def _probe_inputs() -> tuple[torch.Tensor, ...]:
    return torch.ones(64 << 18), torch.ones(16 << 18), torch.ones(1 << 17)


def probe() -> dict[str, float]:
    """What a virtual machine gives now, in GB/s. /proc/stat cannot tell it, and ratios go with it:

    - ``memory``: reading 64 MiB. Neighbours behind the hypervisor take of it.
    - ``cache``: reading 16 MiB again, often: it takes ten times until all of it stays. They take of that cache too.
    - ``exchange``, of several threads: reading what another has just written. Two processors that share a last-level
      cache exchange fast and have one way to memory together, two that do not exchange slowly and have one each; the
      hypervisor moves them (here between 50 and 13 GB/s, and 48 and 66 of memory), for seconds or hours.
    """

    def rate(function: Callable[[], object], size: int, calls: int) -> float:
        times = sorted(Clock().seconds(function) for _ in range(calls))
        return size / times[calls // 4] / 1e9

    memory, cache, exchanged = _probe_inputs()
    found = {}
    for name, x, calls in (("memory", memory, 3), ("cache", cache, 20)):
        found[name] = rate(lambda x=x: torch.dot(x, x), 4 * x.numel(), calls)
    if torch.get_num_threads() > 1:

        def exchange():
            nonlocal exchanged
            exchanged = exchanged.flip(0)  # half of it was another thread's

        found["exchange"] = rate(exchange, 4 * exchanged.numel(), 20)
    return found


@functools.cache
def ceilings(threads: int) -> dict:
    """The best that this machine was seen to do: float32 GFLOP/s of a matrix product, and GB/s of reading, by MiB read.

    The product is torch.mm's or oneDNN's, the faster: MKL, which is behind torch.mm, does half of what an AMD
    processor can. Reading is torch.dot(x, x) or x.sum(), the faster. Small sizes come from caches, so a bound has to be
    asked for the size that it is about.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    products = [lambda: torch.mm(a, b)]
    if torch.backends.mkldnn.is_available():
        a_dnn, b_dnn = a.to_mkldnn(), b.to_mkldnn()
        products.append(lambda: torch._C._nn.mkldnn_linear(a_dnn, b_dnn))
    read = {}
    for mib in (1, 4, 16, 64, 256):
        x = torch.randn(mib << 18)
        read[str(mib)] = 4 * x.numel() / min(best_time(lambda: torch.dot(x, x)), best_time(x.sum)) / 1e9
    sgemm = 2 * n**3 / min(best_time(product, 0.3) for product in products) / 1e9
    torch.set_num_threads(before)
    return {"sgemm_gflop_s": sgemm, "read_gb_s": read}


def read_bandwidth(ceiling: dict, size: float) -> float:
    """GB/s of reading ``size`` bytes: between the sizes measured, linear in the logarithm of the size."""
    sizes = [float(mib) for mib in ceiling["read_gb_s"]]
    rates = list(ceiling["read_gb_s"].values())
    at = math.log2(max(size, 1.0) / 2**20)
    places = [math.log2(s) for s in sizes]
    for (x0, y0), (x1, y1) in zip(zip(places, rates), zip(places[1:], rates[1:])):
        if at <= x1:
            return y0 + (y1 - y0) * max(0.0, (at - x0) / (x1 - x0))
    return rates[-1]


def floor_seconds(ceiling: dict, size: float, flops: float) -> float:
    """No faster than this: all bytes at the bandwidth of reading that many, all flops at a matrix product's rate."""
    return max(size / 1e9 / read_bandwidth(ceiling, size), flops / 1e9 / ceiling["sgemm_gflop_s"])
