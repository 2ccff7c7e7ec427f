"""One part of bench.gpu.check, in a process of its own: ``python -m bench.gpu.part NAME --log FILE``.

An illegal access, which leaves a process without its GPU, a crash or a hang costs this part and no other. Each result
is a line of JSON in the log as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu import check_report, checks, contests, timed
from bench.gpu.steps import name_of
from bench.gpu.timing import GPUClock, HostClock, race
from rankkernels import ReferenceWarning
from rankkernels.ops import _library


class Log:
    """A line of JSON a record, each written whole: several processes share the file."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def write(self, kind: str, **record: object) -> dict:
        record = {"kind": kind, "part": self.part, **record}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record


class Run(NamedTuple):
    """What a part needs to know."""

    clock: GPUClock | HostClock
    place: contests.Place
    seconds: float
    shard: tuple[int, int] = (0, 1)  # which of how many: of the checks of a part
    few: bool = False  # a case an op


def races(
    part: str, items: Sequence[timed.Timed], run: Run, compiled: bool = False, now=time.monotonic
) -> Iterator[tuple[str, dict]]:
    """A race each, which shares the time with those that follow; with ``compiled`` against torch.compile alone."""
    end = now() + run.seconds
    for i, item in enumerate(items):
        case = {"case": item.name, "pass": item.kind, "dtype": name_of(item.dtype)}
        if now() >= end:
            late = checks.Finding(part, ", ".join(case.values()), None, f"the part's {run.seconds:.0f} s are over")
            yield "finding", vars(late)
            continue
        try:
            contest = item.make(run.place)
            if compiled:
                torch._dynamo.reset()
                contest.functions = {"ours": contest.functions["ours"], "compile": contest.compiled()}
            found = race(contest, run.clock, (end - now()) / (len(items) - i), now)
            yield "timing", case | found | {"bytes": contest.moved, "flops": contest.flops}
        except Exception as error:  # one that is too large for the memory, say, must not lose the others
            yield "timing", case | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def of_checks(name: str, every: Iterator[checks.Check], run: Run) -> Iterator[tuple[str, dict]]:
    number, count = run.shard
    chosen = checks.first_of_each_op(every) if run.few else every
    for finding in checks.run_checks(name, islice(chosen, number, None, count), run.seconds):
        yield "finding", vars(finding)


def of_races(items: Callable[[contests.Place], Sequence[timed.Timed]], compiled: bool = False) -> Callable:
    return lambda name, run: races(name, items(run.place), run, compiled)


def embeddings_triton(name: str, run: Run) -> Iterator[tuple[str, dict]]:
    """Of the checkout's own library, which has no CUDA C++ unless somebody built it in."""
    if checks.has_kernels("embedding_bag"):
        yield from races(name, timed.EMBEDDINGS, run)
    else:
        yield "finding", vars(checks.Finding(name, "all", None, "no kernels of the embedding ops but CUDA C++"))


def sanitizer(name: str, run: Run) -> Iterator[tuple[str, dict]]:
    command = [sys.executable, "-m", __spec__.name, "correctness", "--few", f"--seconds={run.seconds:.0f}"]
    yield from of_checks(name, checks.sanitizer(command, run.seconds), run._replace(few=False))


PARTS: dict[str, Callable[[str, Run], Iterator[tuple[str, dict]]]] = {
    "attention": of_races(lambda place: timed.ATTENTION),
    "interactions": of_races(lambda place: timed.INTERACTIONS),
    "embeddings-triton": embeddings_triton,
    "embeddings": of_races(lambda place: timed.EMBEDDINGS),
    "steps": of_races(lambda place: timed.STEPS),
    "correctness": lambda name, run: of_checks(name, checks.correctness(run.place.device), run),
    "models": lambda name, run: of_checks(name, checks.models(run.place.device), run._replace(few=False)),
    "capture": lambda name, run: of_checks(name, checks.capture(run.place.device), run._replace(few=False)),
    "sanitizer": sanitizer,
    "others": of_races(timed.others),
    "compile": of_races(lambda place: timed.COMPILED, compiled=True),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.part", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="append the records to this file")
    parser.add_argument("--seconds", type=float, default=60, help="after these nothing is begun")
    parser.add_argument("--end", type=float, help="nor after this time of Python's monotonic clock")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("WHICH", "OF"))
    parser.add_argument("--few", action="store_true", help="of correctness, a case an op, float32")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    warnings.simplefilter("ignore", ReferenceWarning)  # the report lists them
    if arguments.rehearse:
        torch.set_num_threads(1)
    clock = HostClock() if arguments.rehearse else GPUClock()
    place = contests.Place(clock.device, small=arguments.rehearse)
    seconds = arguments.seconds if arguments.end is None else arguments.end - time.monotonic()
    run = Run(clock, place, seconds, tuple(arguments.shard), arguments.few)
    log = Log(arguments.log, arguments.name)
    for kind, found in PARTS[arguments.name](arguments.name, run):
        if line := check_report.line(log.write(kind, **found)):
            print(line, flush=True)
    for (op, device), why in _library.reference_notices.items():
        if device == "cuda":
            log.write("reference", op=op, why=why)


if __name__ == "__main__":
    main()
