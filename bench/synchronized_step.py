"""A training step of DIN's attention in two processes, one thread each, with the statistics of both's rows.

python -m bench.synchronized_step

Beside it the same from a library's products, and the op with each process's own statistics, which sends nothing. They
take turns; the first two are compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist

import rankkernels as rk
from bench.harness.ranks import run
from rankkernels.nn import attention

#: Samples of both processes, positions, widths of rows and hidden layers. Half of the positions are padding.
SHAPES = ((64, 20, 16, [36]), (1024, 50, 16, [36]), (1024, 100, 64, [36]), (2048, 50, 64, [80, 40]))
#: Contenders, and what makes them so.
ONE_OP, LIBRARY, OWN = "one op", "library", "own statistics"
FORCED = {LIBRARY: ("has_joint_kernel", lambda weight: False), OWN: ("group_name_of", lambda norm: "")}


def stepper(B: int, L: int, D: int, widths: list[int], rank: int) -> Callable[[str], tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    unit = rk.SyncBatchNorm1d.convert(rk.ActivationUnit(D, widths))
    generator = torch.Generator().manual_seed(rank)
    history, target = (torch.randn(n, generator=generator, requires_grad=True) for n in ((B, L, D), (B, D)))
    lengths = torch.randint(1, L + 1, (B,), generator=generator)

    def step(name: str) -> tuple[torch.Tensor, ...]:
        with mock.patch.object(attention, *FORCED[name]) if name in FORCED else nullcontext():
            out = unit(history, target, lengths=lengths)
        return out.detach(), *torch.autograd.grad(out.sum(), [history, target, *unit.parameters()])

    return step


def measured(rank: int, workers: int, rounds: int) -> None:
    for B, L, D, widths in SHAPES:
        step = stepper(B // workers, L, D, widths, rank)
        torch.testing.assert_close(step(ONE_OP)[:3], step(LIBRARY)[:3], rtol=1e-3, atol=1e-4)
        seconds: dict[str, list[float]] = {name: [] for name in (ONE_OP, LIBRARY, OWN)}
        for _ in range(rounds):
            for name, taken in seconds.items():
                dist.barrier()
                begun = time.perf_counter()
                for _ in range(10):
                    step(name)
                dist.barrier()
                taken.append((time.perf_counter() - begun) / 10)
        if rank == 0:
            times = ", ".join(f"{name} {1e3 * statistics.median(taken):.2f} ms" for name, taken in seconds.items())
            ratio = statistics.median(b / a for a, b in zip(seconds[ONE_OP], seconds[LIBRARY]))
            print(f"B{B} L{L} D{D} {widths}: {times}; library / one op {ratio:.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    s = parser.parse_args(argv)
    run(s.workers, measured, s.rounds, seconds=math.inf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
