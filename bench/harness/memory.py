"""Peak memory of a step, beyond its inputs and what it returns: of torch's allocator, and of the process.

Each contender has a process of its own, so that none sees what another's allocator kept, with the allocator's defaults.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
MIB = 2**20


def allocator_peak(step: Callable[[], Sequence[Tensor]]) -> float:
    """The most that was allocated at once through torch's allocator, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = step()
    del results
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def resident(key: str) -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (its peak) of this process, in bytes (Linux)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def reset_peak() -> None:
    """VmHWM starts again from VmRSS. ru_maxrss cannot be reset, and a child process inherits it from its parent."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident_peak(step: Callable[[], Sequence[Tensor]]) -> float:
    """By how many bytes the process grew at most."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back to the system
    before = resident("VmRSS")
    reset_peak()
    results = step()
    peak = resident("VmHWM") - before
    del results
    return peak


def peaks(module: str, case: str, contender: str) -> dict[str, float]:
    """Of ``MODULE.memory_step(case, contender)``, in MiB."""
    step = importlib.import_module(module).memory_step(case, contender)
    for _ in range(2):
        results = step()
    kept = sum(t.numel() * t.element_size() for t in results)
    del results
    return {
        "resident_mib": max(0.0, (resident_peak(step) - kept) / MIB),
        "allocator_mib": max(0.0, (allocator_peak(step) - kept) / MIB),
    }


def compare(benchmark, note, module: str, case: str, title: str, contenders: Sequence[str]) -> None:
    """A benchmark of the peaks of every contender, a process each."""

    def measure(name):
        command = [sys.executable, "-m", __spec__.name, module, case, name]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    found = {name: measure(name) for name in contenders if name != "ours"}
    found["ours"] = benchmark.pedantic(measure, args=("ours",), rounds=1)
    benchmark.extra_info.update(case=title, kind="peak memory", peak=found)
    note("   ".join(f"{n} {p['allocator_mib']:.1f} / {p['resident_mib']:.1f} MiB" for n, p in found.items()))


if __name__ == "__main__":
    print(json.dumps(peaks(*sys.argv[1:])))
