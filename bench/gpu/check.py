"""Everything that only a GPU can show, in under seven minutes and without a network: ``python -m bench.gpu.check``.

It needs a python with torch and Triton, and this source tree: nothing is installed. Where there is an nvcc, the CUDA
C++ kernels are built for the one GPU that is there while Triton's are timed. Timings come first, ours beside eager
PyTorch, FBGEMM and, last, torch.compile, as shares of the copy bandwidth and the matrix rate measured here, with what
was predicted; then correctness of every op, of models and exact Adam against float64 on the CPU, captures in CUDA
graphs, and compute-sanitizer. Each part is a process with a time of its own. ``--out DIR`` gets gpu_check.jsonl, a line
a result as soon as it is there, and gpu_check.md. Exits with 1 where anything is wrong, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu import check_report
from bench.gpu.build import ROOT, Build, cuda_home
from bench.gpu.part import Log
from bench.gpu.timing import GPUClock, HostClock, ceilings
from rankkernels import _version


class Part(NamedTuple):
    """``seconds``: after these a part begins nothing, and ``GRACE`` later its process is ended."""

    seconds: int
    built: bool = True  # with the CUDA C++ kernels; others run while these are built
    alone: bool = True  # nothing else uses the GPU
    processes: int = 1  # that share its checks


#: Checks compile many small Triton kernels, one after the other in a process.
SHARDS = max(1, min(4, (os.cpu_count() or 1) // 3))
PARTS = {
    "attention": Part(45, built=False),
    "interactions": Part(20, built=False),
    "embeddings-triton": Part(30, built=False),
    "embeddings": Part(45),
    "steps": Part(45),
    "correctness": Part(55, alone=False, processes=SHARDS),
    "models": Part(55, alone=False),
    "capture": Part(55, alone=False),
    "sanitizer": Part(25),
    "others": Part(30),
    "compile": Part(60),
}
GRACE = 8
#: The program that a part runs in.
PART = (sys.executable, "-m", "bench.gpu.part")
#: From the start: how long is waited for the build, and when the run ends, whatever is under way.
BUILD_LIMIT, LIMIT = 160, 405
REHEARSED = {name: part._replace(seconds=60, processes=min(part.processes, 2)) for name, part in PARTS.items()}


def describe(device: torch.device) -> dict:
    """The device and what runs on it, plainly."""
    found = {"torch": torch.__version__, "rankkernels": _version.__version__, "memory_gib": 0, "multiprocessors": 0}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "is not installed"
    if device.type == "cpu":
        return found | {"name": "A rehearsal on the CPU", "target": "its numbers are of no GPU"}
    p, hip = torch.cuda.get_device_properties(device), torch.version.hip
    return found | {
        "name": p.name,
        "target": f"ROCm {hip}, {p.gcnArchName}" if hip else f"CUDA {torch.version.cuda}, sm_{p.major}{p.minor}",
        "memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
    }


class Process:
    """A part's process, with all that it starts."""

    def __init__(self, name: str, seconds: float, out: Path, library: Path | None, options: Sequence[str]):
        self.name, self.errors = name, out / f"{name}{'-'.join(options)}.stderr"
        command = [*PART, name, f"--log={out / 'gpu_check.jsonl'}"]
        # The folder that a module is run in comes first: a package built there is found before the sources'.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, f"--end={time.monotonic() + seconds:.1f}", *options],
                cwd=library or ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stderr=errors,
                start_new_session=True,
            )

    def finish(self, seconds: float) -> str:
        """What went wrong with the process itself, or nothing; what its checks found wrong is in the log."""
        try:
            status = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            return check_report.LATE
        if status:
            said = self.errors.read_text(errors="replace").splitlines()
            return f"exit status {status}: {said[-1] if said else ''}"
        self.errors.unlink()
        return ""

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def stages(parts: dict[str, Part]) -> Iterator[list[str]]:
    """Parts one after the other, but those together that need not be alone."""
    for alone, group in groupby(parts, lambda name: parts[name].alone):
        names = list(group)
        yield from ([name] for name in names) if alone else [names]


class Check:
    """A run of the parts. ``end`` is when it is over, whatever is under way."""

    def __init__(self, out: Path, rehearse: bool, limit: float):
        self.out, self.rehearse, self.start = out, rehearse, time.monotonic()
        self.end = self.start + limit
        self.processes: list[Process] = []
        self.build: Build | None = None
        self.library: Path | None = None

    def log(self, part: str, kind: str, **record: object) -> None:
        line = check_report.line(Log(self.out / "gpu_check.jsonl", part).write(kind, **record))
        if line:
            print(line, flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def begin_build(self, clock: GPUClock | HostClock) -> None:
        if clock.device.type == "cpu" or torch.version.hip:
            return
        if (home := cuda_home()) is None:
            self.log("build", "part", error="no nvcc: CUDA_HOME is not set and nvcc is not on PATH", seconds=0)
            return
        self.build = Build(ROOT / "build/gpu", torch.cuda.get_device_capability(clock.device), home)

    def finish_build(self) -> None:
        """Waits for the build; without it parts run on the library of the checkout, if there is one."""
        if self.build is None:
            return
        lasted = time.monotonic() - self.build.start
        error = self.build.wait(min(BUILD_LIMIT - lasted, self.left()))
        self.build.kill()
        self.library = None if error else self.build.library
        self.log("build", "part", error=error, seconds=time.monotonic() - self.build.start)
        self.build = None

    def run(self, parts: dict[str, Part]) -> None:
        for names in stages(parts):
            if any(parts[name].built for name in names):
                self.finish_build()
            start = time.monotonic()
            seconds = min(parts[names[0]].seconds, self.left() - GRACE)
            if seconds <= 0:
                for name in names:
                    self.log(name, "part", error="not begun: the run's time is over", seconds=0)
                continue
            begun = [self.begin(name, seconds, shard, parts[name].processes)
                     for name in names for shard in range(parts[name].processes)]  # fmt: skip
            for process in begun:
                error = process.finish(start + seconds + GRACE - time.monotonic())
                self.log(process.name, "part", error=error, seconds=time.monotonic() - start)

    def begin(self, name: str, seconds: float, shard: int, shards: int) -> Process:
        options = ["--shard", str(shard), str(shards)] if shards > 1 else []
        options += ["--rehearse", "--few"] if self.rehearse else []
        self.processes.append(Process(name, seconds, self.out, self.library, options))
        return self.processes[-1]

    def close(self) -> None:
        for process in filter(None, [*self.processes, self.build]):
            process.kill()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="for the records and the page")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--rehearse", action="store_true", help="the whole flow on the CPU, with small shapes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not (arguments.rehearse or torch.cuda.is_available()):
        print("gpu_check: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu_check.jsonl"
    log.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, too
    check = Check(out, arguments.rehearse, LIMIT)
    parts = {n: p for n, p in (REHEARSED if arguments.rehearse else PARTS).items() if n in (arguments.part or PARTS)}
    try:
        clock = HostClock() if arguments.rehearse else GPUClock()
        check.log("all", "device", **describe(clock.device))
        if any(part.built for part in parts.values()):
            check.begin_build(clock)
        check.log("all", "ceilings", **(ceilings(clock, 1 << 10, 8) if arguments.rehearse else ceilings(clock)))
        torch.cuda.empty_cache()  # the parts' processes need it
        check.run(parts)
    finally:
        check.close()
        check.log("all", "end", seconds=round(time.monotonic() - check.start, 1))
        page = check_report.markdown(check_report.read(log))
        (out / "gpu_check.md").write_text(page)
        print(page)
    return 1 if check_report.failures(check_report.read(log)) else 0


if __name__ == "__main__":
    sys.exit(main())
