"""A race: what is computed is compared first, contenders take turns within every round, medians count.

Why it is run so, with the measurements: docs/performance/measuring.md.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import machine
from rankkernels.testing import relative_errors

#: No race takes more rounds than this.
MAX_ROUNDS = 100
#: A turn begins with untimed calls for about this long, but at most so many: a Zen 3's last-level cache keeps all of
#: what is read again and again after ten times only.
UNTIMED_SECONDS, MOST_UNTIMED = 0.02, 15
#: Largest relative difference between two contenders' float32 results.
AGREEMENT = 1e-4


@dataclass
class Effort:
    """A race takes about ``seconds``, but for long calls, and never fewer than ``min_rounds``. ``patience`` is what is
    left, in seconds, of all waiting of a run for a quiet machine: a busy one is not waited for, but named."""

    seconds: float = 2.5
    min_rounds: int = 7
    patience: float = 60.0


def summary(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compared(times: Mapping[str, list[float]], ours: str = "ours") -> dict[str, dict[str, float]]:
    """Of each contender, by its seconds in every round: the median and its quartiles, and those of its ratio to ours
    within a round."""
    record = {}
    for name, seconds in times.items():
        q1, median, q3 = summary(seconds)
        r1, ratio, r3 = summary([theirs / own for theirs, own in zip(seconds, times[ours])])
        record[name] = dict(median_s=median, q1_s=q1, q3_s=q3, ratio=ratio, ratio_q1=r1, ratio_q3=r3)
    return record


def same(ours: object, theirs: object) -> bool:
    """Whether two results, tensors or sequences of tensors, are the same but for rounding."""
    if isinstance(ours, Tensor):
        ours, theirs = [ours], [theirs]
    return len(ours) == len(theirs) and all(error < AGREEMENT for error in relative_errors(theirs, ours))


def settle(function: Callable[[], object]) -> float:
    """Calls until one takes no less than the best before it, ten times at most: the seconds of the best."""
    best = float("inf")
    for _ in range(10):
        before, best = best, min(best, machine.Clock().seconds(function))
        if best > 0.95 * before or best > 0.5:
            break
    return best


def cores(function: Callable[[], object]) -> float:
    """How many a function keeps busy, over about as long as a turn's untimed calls."""
    busy, start = time.process_time(), time.perf_counter()
    while (passed := time.perf_counter() - start) < UNTIMED_SECONDS:
        function()
    return (time.process_time() - busy) / passed


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    times: Mapping[str, list[float]],
    clock,
    untimed: Mapping[str, int] | None = None,
) -> None:
    """One round: each function's seconds, after so many untimed calls of its own, go behind its ``times``."""
    for name, function in functions.items():
        for _ in range((untimed or {}).get(name, 0)):
            function()
        times[name].append(clock.seconds(function))


def given(probes: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """What the machine gave during a race: of each that was probed the least, the median and the most."""
    found = {name: [probe[name] for probe in probes] for name in (probes[0] if probes else ())}
    return {name: [min(rates), statistics.median(rates), max(rates)] for name, rates in found.items()}


class Rounds:
    """Whether others disturbed each round, and what the machine gave meanwhile."""

    def __init__(self, effort: Effort):
        self.effort = effort
        self.disturbed: list[bool] = []
        self.others: list[float] = []
        self.probes: list[dict[str, float]] = []
        self.watch = machine.Watch()

    def wait(self) -> None:
        """Until the machine is quiet, or patience is at its end."""
        while self.effort.patience > 0:
            self.watch.start()
            time.sleep(machine.SHORTEST_WATCH * 1.1)
            if (self.watch.others() or 0.0) < machine.QUIET:
                break
            self.effort.patience -= self.watch.seconds
        self.watch.start()

    def judge(self, finished: int, at_last: bool = False) -> None:
        """Every quarter of a second, whether the rounds since the last time were disturbed."""
        others = self.watch.others()
        if others is None and not at_last:
            return
        # What is left at the end is too short to be judged by itself: like the rounds before it.
        verdict = others > machine.QUIET if others is not None else bool(self.disturbed and self.disturbed[-1])
        self.disturbed += [verdict] * (finished - len(self.disturbed))
        if others is not None:
            self.others.append(others)
            self.probes.append(machine.probe())
            if verdict and not at_last:
                return self.wait()
            self.watch.start()

    def kept(self, rounds: int) -> list[int]:
        """The rounds that count: the quiet ones, where they are enough."""
        quiet = [i for i in range(rounds) if not self.disturbed[i]]
        return quiet if len(quiet) >= min(self.effort.min_rounds, rounds) else list(range(rounds))


class Race:
    """``race(ours, contenders, ...)``: times ``ours`` with pytest-benchmark, each contender before it in every round.

    A contender whose result differs from ours is an error; one that returns None is not compared. ``case`` and
    ``kind`` (forward, forward + backward, step...) name what is computed in the report; ``size`` is how many bytes it
    must move and ``flops`` what it must do; ``missing`` maps who could not take part to the reason. The first contender
    is the baseline. Returns the medians in seconds by name, ours under "ours".
    """

    def __init__(self, benchmark, name: str, effort: Effort, line: Callable[[str, bool], None]):
        self.benchmark, self.name, self.effort, self.line = benchmark, name, effort, line

    def __call__(
        self,
        ours: Callable[[], object],
        contenders: Mapping[str, Callable[[], object]],
        *,
        case: str | None = None,
        kind: str = "",
        size: float = 0,
        flops: float = 0,
        missing: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        self.check(ours, contenders)
        times, rounds = self.measure(ours, contenders)
        count = len(times["ours"])
        kept = rounds.kept(count)
        record = compared({name: [seconds[i] for i in kept] for name, seconds in times.items()})
        disturbed = any(rounds.disturbed[i] for i in kept)
        self.benchmark.extra_info.update(
            case=case or self.name,
            kind=kind,
            threads=torch.get_num_threads(),
            baseline=next(iter(contenders), None),
            contenders=record,
            rounds=count,
            rounds_kept=len(kept),
            others_cores=max(rounds.others, default=None),
            given_gb_s=given(rounds.probes),
            disturbed=disturbed,
            not_measured=dict(missing or {}),
        )
        seconds = record["ours"]["median_s"]
        text = self.floor(size, flops, seconds) if size or flops else ""
        speed = "".join(f"   x {name} {record[name]['ratio']:6.2f}" for name in contenders)
        self.line(f"{'!' if disturbed else ' '}{seconds * 1e3:9.3f} ms{text}{speed}", disturbed)
        return {name: found["median_s"] for name, found in record.items()}

    @staticmethod
    def check(ours: Callable[[], object], contenders: Mapping[str, Callable[[], object]]) -> None:
        expected = ours()
        for name, function in contenders.items():
            result = function()
            assert expected is None or result is None or same(expected, result), f"{name} computes something else"

    def measure(self, ours, contenders) -> tuple[dict[str, list[float]], Rounds]:
        """The seconds of every round by name, ours by pytest-benchmark."""
        everyone = {**contenders, "ours": ours}
        lasted = {name: settle(function) for name, function in everyone.items()}
        busy = {name: round(cores(function), 1) for name, function in everyone.items()}
        more = {name: n for name, n in busy.items() if n > torch.get_num_threads() + 0.5}
        assert not more, f"more cores than threads: {more}"
        untimed = {name: min(MOST_UNTIMED, round(UNTIMED_SECONDS / seconds)) for name, seconds in lasted.items()}
        round_seconds = sum(seconds * (1 + untimed[name]) for name, seconds in lasted.items())
        count = max(self.effort.min_rounds, min(MAX_ROUNDS, int(self.effort.seconds / round_seconds)))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        rounds, clock = Rounds(self.effort), machine.Clock()
        rounds.wait()

        def others():
            if finished := len(next(iter(times.values()), ())):
                rounds.judge(finished)
            take_turns(contenders, times, clock, untimed)
            for _ in range(untimed["ours"]):
                ours()

        gc.collect()
        gc.disable()
        try:
            self.benchmark.pedantic(ours, setup=others, rounds=count)
        finally:
            gc.enable()
        rounds.judge(count, at_last=True)
        return {**times, "ours": list(self.benchmark.stats.stats.data)}, rounds

    def floor(self, size: float, flops: float, seconds: float) -> str:
        """Records the bytes, the flops and their floor: what was reached of each."""
        floor = machine.floor_seconds(machine.ceilings(torch.get_num_threads()), size, flops)
        self.benchmark.extra_info.update(size=size, flops=flops, floor_s=floor)
        reached = f"{size / seconds / 1e9:6.1f} GB/s {flops / seconds / 1e9:6.1f} GFLOP/s"
        return f"   {reached} {100 * floor / seconds:3.0f} % of floor"
