"""Exact Adam on a GPU: fused steps on few of the rows against torch's dense Adam, and what each of them launches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import profile

import rankkernels as rk
from bench.gpu.steps import no_wait, worst_error
from rankkernels import ops, optim
from rankkernels.testing import TOLERANCE

#: Two tables of which a step looks up a few rows, so that others idle for most steps, and some for all.
ROWS, D, B, STEPS = (60, 40), 8, 5, 12
#: A step may differ from the ones before in what it launches until tables are behind and its numbers on the device.
FIRST_STEPS = 3
#: What torch's profiler calls a launch, by the type of the device. The host's calls: of kernels' own records it loses
#: some, https://github.com/pytorch/pytorch/issues/192021.
LAUNCH = {"cuda": re.compile(r"(cu|hip)\w*(Launch|Memcpy|Memset)"), "cpu": re.compile("aten::|rankkernels::")}


def bags(tables: list[Tensor], ids: list[Tensor], optimizer: optim.RowOptimizer | None) -> Tensor:
    return rk.table_batched_embedding_bag(tables, ids, modes=["sum", "mean"], concat=True, optimizer=optimizer)[0]


def fm(tables: list[Tensor], ids: list[Tensor], optimizer: optim.RowOptimizer | None) -> Tensor:
    embeddings, interaction, _ = ops.embedding_fm(tables, [i[:, 0] for i in ids], optimizer=optimizer)
    return torch.cat([embeddings, interaction], 1)


#: By the embedding op that a lookup calls.
LOOKUPS = {"embedding_bag": bags, "embedding_fm": fm}


class Training:
    """Tables and an optimizer of them, which steps in the backward of ``lookup`` if it is one of ours."""

    def __init__(self, lookup: Callable, make: Callable, device: torch.device, dtype: torch.dtype):
        self.lookup, self.device, self.dtype = lookup, device, dtype
        self.tables = [nn.Parameter(self._draw(seed, (R, D))) for seed, R in enumerate(ROWS)]
        self.optimizer = make(self.tables, lr=0.1)
        self.fused = self.optimizer if isinstance(self.optimizer, optim.RowOptimizer) else None
        self.batches = [[self._ids(seed, R) for R in ROWS] for seed in range(STEPS)]
        self.gradients = [self._draw(seed, (B * (len(ROWS) * D + 1),)) for seed in range(STEPS)]  # of any lookup's size

    def _draw(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def _ids(self, seed: int, R: int) -> Tensor:
        return torch.randint(R, (B, 2), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def step(self, number: int) -> Tensor:
        """One of STEPS, each at a rate of its own. -> what was looked up before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + number)
        self.optimizer.zero_grad()
        out = self.lookup(self.tables, self.batches[number], self.fused)
        out.backward(self.gradients[number][: out.numel()].view(out.shape))
        self.optimizer.step()
        return out.detach()

    def run(self) -> list[Tensor]:
        """All lookups, and the tables in the end."""
        return [*map(self.step, range(STEPS)), *(table.detach() for table in self.tables)]


exact_adam = partial(optim.Adam, exact=True)


def check(op: str, device: torch.device) -> tuple[bool, str]:
    """In float32 on the device against dense Adam in float64 on the CPU."""
    expected = Training(LOOKUPS[op], torch.optim.Adam, torch.device("cpu"), torch.float64).run()
    error = worst_error(Training(LOOKUPS[op], exact_adam, device, torch.float32).run(), expected)
    allowed = TOLERANCE[torch.float32]
    return error <= allowed, f"error {error:.1e} of {allowed:.0e}"


def launched(run: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that ``run`` starts, without a wait; on the CPU the ops that it calls."""
    with profile() as found, no_wait(device):
        run()
    return sum(LAUNCH[device.type].match(event.name) is not None for event in found.events())


def check_launches(op: str, device: torch.device) -> tuple[bool | None, str]:
    """As many in every step, whatever rows it looks up and for how long they were idle, and no wait."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rankkernels::{op}", device.type.upper()):
        return None, "no kernel in this build: what the reference launches depends on the rows"
    training = Training(LOOKUPS[op], exact_adam, device, torch.float32)
    for number in range(FIRST_STEPS):
        training.step(number)
    counts = [launched(partial(training.step, number), device) for number in range(FIRST_STEPS, STEPS)]
    if not any(counts):
        return None, "torch's profiler sees no launches here"
    return len(set(counts)) == 1, f"{min(counts)} to {max(counts)} launches a step"
