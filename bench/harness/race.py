"""Measuring: what is computed is compared first, contenders take turns within every round, medians count.

``pytest bench`` runs all benchmarks, ``-k`` a part, ``--benchmark-json FILE`` keeps the record; pytest-benchmark is the
engine. Its own figure is ours; what the others took in the same rounds is in each benchmark's ``extra_info``.

How a race is run was chosen by how well runs of it agreed on a machine with two cores:

- A turn is untimed calls for about 20 ms and a timed one, so that each contender finds the caches as its own calls
  leave them, and not as its neighbour's did. One call does not do that, and what it leaves undone differs between
  processes: after the eager attention (sigmoid, length 12, one thread) our second call took 3.8 to 4.3 ms in five
  processes, the fifth 3.7 in all of them, as it does alone. Long calls do without: no cache outlives them.
- The ratio of two contenders is the median over the rounds of the ratio within a round: what slows a round down slows
  both. Times are medians. Quartiles stand beside both.
- Freed memory stays in the process (``machine.keep_freed_memory``): with glibc's defaults the ratios of two runs were
  up to twice each other, because the same step met page faults in one of them only. It is the peers that gain by it.
  ``--malloc default`` measures what glibc does by itself.
- ``make bench`` runs without glibc's cache of small blocks (``machine.NO_THREAD_CACHE``). A large block that is freed
  does not meet the crumbs of its own alignment again while that cache holds them, is too small for the next tensor of
  its size, and the same call's result goes round among one to a dozen places, by what else the process ever freed. The
  forward of batch normalization and ReLU (N 4096, one thread) took 0.33 to 0.56 ms in eighteen runs and was 1.4 to 2.2
  times as fast as eager; without the cache, in eleven, 0.32 to 0.38 ms and 2.0 to 2.3. Eager operators take 4 % longer.
- What a virtual machine gives comes and goes with neighbours whom nothing here can see, and ratios with it:
  ``machine.probe`` has it during each race, and the record. DIN's evaluation with two threads is 7.4 times as fast as
  torch-rechub's while the hypervisor has both processors at one last-level cache, and 5.8 times while it has not;
  within either state ten races agree within 3 %, with the same tables or with others.
- Two runs of all of ``make bench``, on two Zen 3 cores: of 425 ratios ``compare.py --agree`` finds 394 within 15 %, 27
  apart with the machine another one meanwhile, most of them by where it ran the two threads, and 4, of three races,
  apart by 1.17 to 1.23 with nothing probed to show for it.
- Rounds during which other processes used more than ``machine.QUIET`` cores are left out as long as enough are left;
  a race that had to do with disturbed rounds says so, in the record, in the summary and in the report.
- torch.compile starts from nothing in every test, and its giving up (after eight recompilations) is an error.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping

import machine
import pytest
import torch
from torch import Tensor

from rankkernels.testing import relative_error

ROWS, CONDITIONS = pytest.StashKey[list](), pytest.StashKey[dict]()
#: A race takes about this long, but for long calls, and never fewer rounds than MIN_ROUNDS.
SECONDS, MAX_ROUNDS, MIN_ROUNDS = 2.5, 100, 7
#: A turn begins with untimed calls for about this long, but at most so many: a Zen 3's last-level cache keeps all of
#: what is read again and again after ten times only.
UNTIMED_SECONDS, MOST_UNTIMED = 0.02, 15
#: All waiting of a run for a quiet machine, in seconds: a busy one is not waited for, but named.
PATIENCE = 60.0
#: Largest relative difference between two contenders' float32 results.
AGREEMENT = 1e-4


def pytest_addoption(parser):
    parser.addoption(
        "--malloc", choices=("keep", "default"), default="keep", help="keep freed memory in the process (see conftest)"
    )

    parser.addoption("--quick", action="store_true", help="two rounds each: does everything run? No numbers to quote")


def pytest_configure(config):
    global SECONDS, MIN_ROUNDS, PATIENCE
    if config.getoption("--quick"):
        SECONDS, MIN_ROUNDS, PATIENCE = 0.1, 2, 0.0
    config.stash[ROWS] = []
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    config.stash[CONDITIONS] = {
        **machine.conditions(),
        "malloc": "glibc's defaults",
        "quick": config.getoption("--quick"),
    }
    if config.getoption("--malloc") == "keep" and machine.keep_freed_memory():
        config.stash[CONDITIONS]["malloc"] = "freed memory kept"
        if machine.NO_THREAD_CACHE in os.environ.get("GLIBC_TUNABLES", ""):
            config.stash[CONDITIONS]["malloc"] += ", no thread cache"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Drops what is noise between two records, adds what a reader needs to judge them."""
    output_json["commit_info"] = {k: output_json["commit_info"].get(k) for k in ("id", "dirty")}
    entries = output_json["benchmarks"]
    for entry in entries:
        for key in ("params", "param", "options", "group"):
            entry.pop(key, None)
        entry["stats"] = {k: entry["stats"][k] for k in ("min", "q1", "median", "q3", "max", "rounds")}
    counts = sorted({e["extra_info"]["threads"] for e in entries if "contenders" in e["extra_info"]})
    output_json["conditions"] = {
        **config.stash[CONDITIONS],
        "ceilings": {str(threads): machine.ceilings(threads) for threads in counts},
        **business(entries, counts),
    }
    output_json["benchmarks"] = rounded(entries)
    output_json["conditions"] = rounded(output_json["conditions"])


def rounded(value):
    """Every float to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def given(probes: list[dict[str, float]]) -> dict[str, list[float]]:
    """What the machine gave during a race: of each that was probed the least, the median and the most."""
    found = {name: [probe[name] for probe in probes] for name in (probes[0] if probes else ())}
    return {name: [min(rates), statistics.median(rates), max(rates)] for name, rates in found.items()}


def bandwidth(benchmarks: list[dict], threads: int) -> list[float] | None:
    """The least and the most that reading memory was seen to reach during the races of a run."""
    found = [e["extra_info"] for e in benchmarks if e["extra_info"].get("given_gb_s")]
    found = [e["given_gb_s"]["memory"] for e in found if e["threads"] == threads]
    return [min(low for low, *_ in found), max(high for *_, high in found)] if found else None


def business(benchmarks: list[dict], counts: list[int]) -> dict:
    """How busy others kept the machine over all races of a run."""
    others = [e["extra_info"]["others_cores"] for e in benchmarks if e["extra_info"].get("others_cores") is not None]
    return {
        "load_after": os.getloadavg()[0],
        "others_cores": max(others) if others else None,
        "disturbed": [e["name"] for e in benchmarks if e["extra_info"].get("disturbed")],
        "read_gb_s": {str(threads): bandwidth(benchmarks, threads) for threads in counts},
    }


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    conditions, write = config.stash[CONDITIONS], terminalreporter.write_line
    write("")
    write(
        f"Medians of interleaved rounds. torch {torch.__version__}, {conditions['torch_isa']}, kernels for "
        f"{conditions['isa']}, {conditions['malloc']}. x NAME: how many times faster than NAME; floor: the bytes at "
        "the bandwidth of reading as many, or the flops at sgemm's rate, whichever is longer, both measured here."
    )
    for name, text, _ in rows:
        write(f"{name:<64} {text}")
    if conditions["quick"]:
        write("--quick: no numbers to quote", red=True)
    for peer, reason in conditions["not_measured"].items():
        write(f"not measured: {peer} ({reason})")
    disturbed = sum(d for _, _, d in rows)
    if disturbed:
        write(f"BUSY MACHINE: other processes took part in {disturbed} of {len(rows)} races (marked !)", red=True)


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
    """As far as a test before this one could tell: nothing compiled, nothing kept."""
    torch._dynamo.reset()
    gc.collect()
    machine.return_freed_memory()


def summary(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def same(ours: object, theirs: object) -> bool:
    """Whether two results, tensors or sequences of tensors, are the same but for rounding."""
    if isinstance(ours, Tensor):
        return relative_error(theirs, ours) < AGREEMENT
    pairs = list(zip(ours, theirs))
    floor = 0.1 * max((float(a.detach().norm()) for a, _ in pairs), default=0.0)
    return len(ours) == len(theirs) and all(relative_error(b.detach(), a.detach(), floor) < AGREEMENT for a, b in pairs)


def settle(function: Callable[[], object]) -> float:
    """Calls until one takes no less than the best before it, ten times at most: the seconds of the best."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        function()
        before, best = best, min(best, time.perf_counter() - start)
        if best > 0.95 * before or best > 0.5:
            break
    return best


class Rounds:
    """The times of each round, and whether others disturbed it."""

    waited = 0.0

    def __init__(self, names: list[str]):
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self.disturbed: list[bool] = []
        self.others: list[float] = []
        self.probes: list[dict[str, float]] = []
        self.watch = machine.Watch()

    def wait(self) -> None:
        """Until the machine is quiet, or patience is at its end."""
        while Rounds.waited < PATIENCE:
            self.watch.start()
            time.sleep(machine.SHORTEST_WATCH * 1.1)
            if (self.watch.others() or 0.0) < machine.QUIET:
                break
            Rounds.waited += self.watch.seconds
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
        return quiet if len(quiet) >= min(MIN_ROUNDS, rounds) else list(range(rounds))


@pytest.fixture
def race(benchmark, request):
    """``race(ours, contenders, ...)``: times ``ours`` with pytest-benchmark, each contender before it in every round.

    A contender whose result differs from ours is an error; one that returns None is not compared. ``case`` and
    ``kind`` (forward, forward + backward, step...) name what is computed in the report; ``size`` is how many bytes it
    must move and ``flops`` what it must do; ``missing`` maps who could not take part to the reason. The first contender
    is the baseline. Returns the medians in seconds by name, ours under "ours".
    """

    def run(
        ours: Callable[[], object],
        contenders: Mapping[str, Callable[[], object]],
        *,
        case: str | None = None,
        kind: str = "",
        size: float = 0,
        flops: float = 0,
        missing: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        everyone = {**contenders, "ours": ours}
        expected = ours()
        for name, function in contenders.items():
            result = function()
            assert expected is None or result is None or same(expected, result), f"{name} computes something else"
        del expected
        result = None
        lasted = {name: settle(function) for name, function in everyone.items()}
        untimed = {name: min(MOST_UNTIMED, round(UNTIMED_SECONDS / seconds)) for name, seconds in lasted.items()}
        round_seconds = sum(seconds * (1 + untimed[name]) for name, seconds in lasted.items())
        count = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / round_seconds)))
        rounds = Rounds(list(contenders))
        rounds.wait()

        def others():
            if rounds.times and len(next(iter(rounds.times.values()))):
                rounds.judge(len(next(iter(rounds.times.values()))))
            for name, function in contenders.items():
                for _ in range(untimed[name]):
                    function()
                start = time.perf_counter()
                function()
                rounds.times[name].append(time.perf_counter() - start)
            for _ in range(untimed["ours"]):
                ours()

        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(ours, setup=others, rounds=count)
        finally:
            gc.enable()
        rounds.judge(count, at_last=True)
        times = {**rounds.times, "ours": list(benchmark.stats.stats.data)}
        kept = rounds.kept(count)
        record, medians = {}, {}
        for name, seconds in times.items():
            q1, medians[name], q3 = summary([seconds[i] for i in kept])
            r1, ratio, r3 = summary([seconds[i] / times["ours"][i] for i in kept])
            record[name] = dict(median_s=medians[name], q1_s=q1, q3_s=q3, ratio=ratio, ratio_q1=r1, ratio_q3=r3)
        disturbed = any(rounds.disturbed[i] for i in kept)
        benchmark.extra_info.update(
            case=case or request.node.name,
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
        text = ""
        if size or flops:
            floor = machine.floor_seconds(machine.ceilings(torch.get_num_threads()), size, flops)
            benchmark.extra_info.update(size=size, flops=flops, floor_s=floor)
            text = (
                f"   {size / medians['ours'] / 1e9:6.1f} GB/s {flops / medians['ours'] / 1e9:6.1f} GFLOP/s "
                f"{100 * floor / medians['ours']:3.0f} % of floor"
            )
        speed = "".join(f"   x {name} {record[name]['ratio']:6.2f}" for name in contenders)
        mark = "!" if disturbed else " "
        request.config.stash[ROWS].append(
            (request.node.name, f"{mark}{medians['ours'] * 1e3:9.3f} ms{text}{speed}", disturbed)
        )
        return medians

    run.report = lambda medians, text="": note(request, text) if text else None
    return run


def note(request, text: str) -> None:
    """A line of the table at the end."""
    request.config.stash[ROWS].append((request.node.name, text, False))
