"""Races on a GPU: the device's time by replay of CUDA graphs, the host's by its own clock; in turns, results compared
first, inputs not in the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.steps import name_of, no_wait, worst_error
from bench.harness.race import take_turns

#: Fewest and most rounds of a race.
ROUNDS = 5, 40


class Turn(NamedTuple):
    """What is timed: so many calls, with or without the host's part of them."""

    run: Callable[[], object]
    calls: int
    graph: bool


def in_turn(function: Callable, sets: Sequence[Sequence[Tensor]]) -> Turn:
    """The calls themselves."""
    return Turn(lambda: [function(*s) for s in sets], len(sets), False)


class GPUClock:
    """Seconds on the device's own clock, and what the device holds. From its making on, the process works on one stream
    of its own, on which graphs are captured, too: autograd would remember another one's."""

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20)
        self.memory_bytes, _ = torch.cuda.mem_get_info(self.device)
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)

    def turn(self, function: Callable, sets: Sequence[Sequence[Tensor]]) -> Turn:
        """A graph of one call on each set of inputs; the calls themselves where one waits for the device."""
        try:
            with no_wait(self.device):
                function(*sets[0])
        except RuntimeError:
            return in_turn(function, sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for inputs in sets:
                function(*inputs)
        return Turn(graph.replay, len(sets), True)

    def seconds(self, run: Callable[[], object]) -> float:
        """From the start of its first kernel to the end of its last: the device is busy while the host gets ahead."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(500_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Until the host has launched everything."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


@dataclass(frozen=True)
class HostClock:
    """The same on the CPU, where there is neither a launch nor a graph: its numbers are not those of a GPU."""

    device: torch.device = torch.device("cpu")
    cache_bytes: int = 1 << 10
    memory_bytes: int = 1 << 30

    turn = staticmethod(in_turn)

    def seconds(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    host_seconds = seconds


@dataclass
class Contest:
    """Who computes the same: functions of one set of inputs, which return tensors.

    ``make(seed)`` makes a set on the device; one holds ``size`` bytes, and a call reads ``touched`` bytes of it.
    ``moved`` and ``flops`` are what a call must move and compute. ``compiled()`` is eager under torch.compile. Those in
    ``alike`` return the same up to ``tolerance``, at the first call: steps of an optimizer part later. ``graphs``: a
    CUDA graph may hold the calls.
    """

    functions: dict[str, Callable[..., Sequence[Tensor]]]
    make: Callable[[int], Sequence[Tensor]]
    size: int
    touched: int
    moved: int
    flops: int
    compiled: Callable[[], Callable] | None = None
    alike: Sequence[str] = ("ours", "eager", "compile")
    tolerance: float = 2e-5
    graphs: bool = True


def rotations(touched: int, size: int, cache_bytes: int, memory_bytes: int) -> int:
    """Sets of inputs that together leave nothing of one in the cache when its turn comes again, in a quarter of the
    memory."""
    return max(1, min(-(-4 * cache_bytes // max(touched, 1)), memory_bytes // (4 * max(size, 1)), 64))


def disagreement(contest: Contest, inputs: Sequence[Tensor]) -> str:
    """How far ours is off from the others that compute the same, if it is."""
    results = {name: function(*inputs) for name, function in contest.functions.items() if name in contest.alike}
    ours = results.pop("ours")
    for name, other in results.items():
        error = worst_error(ours, other)
        if not error <= contest.tolerance:
            return f"{error:.1e} from {name}, tolerance {contest.tolerance:.0e}"
    return ""


def race(contest: Contest, clock, seconds: float, now=time.monotonic) -> dict:
    """Median seconds a call of each contender, on the device and of the host, in rounds in which all take their turns.

    A contender that raises is reported and out; where ours does, or is wrong, there is no race.
    """
    end = now() + seconds
    first = contest.make(0)
    if wrong := disagreement(contest, first):
        return {"error": wrong}
    count = rotations(contest.touched, contest.size, clock.cache_bytes, clock.memory_bytes)
    sets = [first, *(contest.make(seed) for seed in range(1, count))]
    turns: dict[str, Turn] = {}
    host: dict[str, float] = {}
    raised: dict[str, str] = {}
    for name, function in contest.functions.items():
        try:
            for inputs in (sets * 2)[:3]:
                function(*inputs)
            host[name] = statistics.median(clock.host_seconds(lambda: function(*first)) for _ in range(7))
            turns[name] = (clock.turn if contest.graphs else in_turn)(function, sets)
        except Exception as error:
            if name == "ours":
                raise
            raised[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    runs = {name: turn.run for name, turn in turns.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    fewest, most = ROUNDS
    while len(times["ours"]) < fewest or (now() < end and len(times["ours"]) < most):
        take_turns(runs, times, clock)
    return {
        "seconds": {name: statistics.median(values) / turns[name].calls for name, values in times.items()},
        "host": host,
        "no graph": [name for name, turn in turns.items() if not turn.graph],
        "raised": raised,
        "sets": len(sets),
    }


def ceilings(clock, copied: int = 1 << 30, n: int = 8192) -> dict[str, float]:
    """Bytes a second of a copy, reads and writes counted, and flops a second of a matrix product in each dtype."""

    def best(function: Callable, *tensors: Tensor) -> float:
        return min(clock.seconds(lambda: function(*tensors)) for _ in range(8))

    x, y = (torch.zeros(copied, dtype=torch.uint8, device=clock.device) for _ in range(2))
    found = {"copy": 2 * copied / best(torch.Tensor.copy_, y, x)}
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        found[name_of(dtype)] = 2 * n**3 / best(torch.matmul, a, b)
    torch.backends.cuda.matmul.allow_tf32 = False  # PyTorch's default, in which eager is timed
    return found
