"""Timings on a GPU: ours beside eager PyTorch, torch.compile, nn.EmbeddingBag and FBGEMM, in turns, results compared
first, inputs not in the cache."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases import GPU_OPS
from bench.gpu.steps import name_of, on, step, worst_error
from bench.harness.peers import fbgemm_copy
from bench.harness.race import take_turns
from rankkernels.testing import TOLERANCE, OpCase


class EventClock:
    """Seconds on the device's own clock. It is kept busy while the host gets ahead, so that launches cost nothing."""

    def __init__(self):
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, function: Callable[[], object]) -> float:
        torch.cuda._sleep(500_000)
        self.begin.record()
        function()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


def rotations(case_bytes: int, cache_bytes: int, memory_bytes: int) -> int:
    """Sets of inputs that together leave nothing of one in the cache when its turn comes again."""
    return max(1, min(-(-4 * cache_bytes // max(case_bytes, 1)), memory_bytes // (4 * max(case_bytes, 1)), 64))


def race(
    functions: dict[str, Callable], sets: Sequence[Sequence[Tensor]], clock, seconds: float, now=time.monotonic
) -> dict[str, float]:
    """Median seconds of each function, in rounds in which all take their turns, each on the next set of inputs."""
    for function in functions.values():
        for _ in range(2):
            function(*sets[0])
    inputs = itertools.cycle([*sets[1:], sets[0]])
    turns = {name: lambda f=f: f(*next(inputs)) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = now() + seconds
    while len(times["ours"]) < 5 or (now() < end and len(times["ours"]) < 50):
        take_turns(turns, times, clock)
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings(device: torch.device, clock, copied: int = 1 << 30, n: int = 8192) -> dict[str, float]:
    """Bytes a second of a copy, reads and writes counted, and flops a second of a matrix product in each dtype."""

    def best(function: Callable, *tensors: Tensor) -> float:
        return min(clock.seconds(lambda: function(*tensors)) for _ in range(8))

    x, y = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy": 2 * copied / best(torch.Tensor.copy_, y, x)}
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[name_of(dtype)] = 2 * n**3 / best(torch.matmul, a, b)
    torch.backends.cuda.matmul.allow_tf32 = False  # PyTorch's default, in which eager is timed
    return found


def embedding_peers(case: OpCase, device: torch.device) -> dict[str, Callable]:
    """nn.EmbeddingBag's function, a table a call, and FBGEMM's operator, of a bag case without weights or offsets."""
    inputs = case.inputs()
    n = len(inputs) // 2
    peers: dict[str, Callable] = {
        "EmbeddingBag": lambda *t: torch.cat([F.embedding_bag(i, w, mode="sum") for w, i in zip(t[:n], t[n:])], 1)
    }
    try:
        weights, (B, L) = inputs[:n], inputs[n].shape
        module = fbgemm_copy(weights, str(device))
        offsets = torch.arange(0, n * B * L + 1, L, device=device)

        def fbgemm(*t):
            return module(torch.stack(t[n:]).flatten(), offsets)

        fbgemm(*(t.detach().to(device) for t in inputs))
    except Exception:  # not installed, or not for this device: its CPU build is another package of the same module
        return peers
    return peers | {"FBGEMM": fbgemm}


def trained(function: Callable) -> Callable:
    """A forward and a backward with a gradient of ones."""

    def both(*inputs):
        out = function(*inputs)
        return step(lambda *_: out, inputs, torch.ones_like(out))

    return both


TIMED = [(c, d) for op in GPU_OPS for c in op.cases for d in c.dtypes if d != torch.float64]


def timings(
    device: torch.device, clock, cache: int, memory: int, seconds: float, timed=TIMED, now=time.monotonic
) -> Iterator[dict]:
    """A record for each case, dtype and pass, ours checked first. ``cache`` and ``memory``: the device's, in bytes."""
    end = now() + seconds
    for i, (case, dtype) in enumerate(timed):
        record = {"case": case.id, "dtype": name_of(dtype)}
        if now() >= end:
            yield record | {"error": f"not measured: the part's {seconds:.0f} s are over"}
            continue
        share = (end - now()) / (len(timed) - i)
        try:
            yield from (record | entry for entry in time_case(case, dtype, device, clock, cache, memory, share, now))
        except Exception as error:  # one case too large for the memory, say, must not lose the others
            yield record | {"error": f"{type(error).__name__}: {error}".splitlines()[0], "wrong": True}


def time_case(case, dtype, device, clock, cache: int, memory: int, seconds: float, now) -> Iterator[dict]:
    end = now() + seconds
    inputs = on(device, case.inputs(dtype))
    embedding = case.op.startswith("embedding")  # its rows are scattered over tables larger than a cache
    moved = sum(t.numel() * t.element_size() for t in inputs)
    sets = [inputs, *(on(device, inputs) for _ in range(0 if embedding else rotations(moved, cache, memory) - 1))]
    functions = {"ours": case.function, "eager": case.reference}
    actual, expected = (step(f, inputs, torch.ones_like(f(*inputs))) for f in functions.values())
    error = worst_error(actual, [e.cpu() for e in expected])
    if not error <= 2 * TOLERANCE[dtype]:
        yield {"error": f"{error:.1e} from eager, tolerance {2 * TOLERANCE[dtype]:.0e}", "wrong": True}
        return
    del actual, expected
    torch._dynamo.reset()
    functions["compile"] = torch.compile(case.reference)
    if case.op == "embedding_bag" and "weighted" not in case.id:
        functions |= embedding_peers(case, device)
    for kind, flops in (("forward", case.flops), ("forward + backward", case.flops + case.backward_flops)):
        if kind == "forward":
            raced = functions
        else:  # FBGEMM steps an optimizer in its backward
            raced = {name: trained(f) for name, f in functions.items() if name != "FBGEMM"}
        with torch.set_grad_enabled(kind != "forward"):
            medians = race(raced, sets, clock, (end - now()) / 2, now)
        passes = 1 if kind == "forward" else 3  # the backward reads the inputs again, and writes as much
        yield {
            "kind": kind,
            "seconds": medians,
            "bytes_per_second": passes * case.elements * dtype.itemsize / medians["ours"],
            "flops_per_second": flops / medians["ours"],
        }
