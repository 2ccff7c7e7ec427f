"""DIN attention against torch-rechub's ActivationUnit, eager and compiled: time, peak memory, share of the sgemm rate.

Every contender computes the same attention on the same random inputs, and what they return is compared before anything
is timed. The flops are those that the identity of csrc/cpu/din_attention.h needs. torch-rechub knows no lengths: where
the histories are short it gets zeros for padding, which is what its users do.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rankkernels as rk

warnings.filterwarnings("ignore", category=DeprecationWarning)


class Shape(NamedTuple):
    B: int
    L: int
    D: int
    widths: list[int]
    activation: str = "dice"
    use_softmax: bool = False
    mean_length: int | None = None

    def __str__(self) -> str:
        text = f"B{self.B} L{self.L} D{self.D} {self.widths} {self.activation}".replace(", ", ",")
        return text + " softmax" * self.use_softmax + (f" length {self.mean_length}" if self.mean_length else "")


SHAPES = [
    Shape(1024, 50, 16, [36]),
    Shape(2048, 50, 64, [80, 40]),
    Shape(4096, 100, 64, [36]),
    Shape(1024, 100, 64, [512, 256], use_softmax=True),
    Shape(2048, 50, 64, [80, 40], "sigmoid", mean_length=12),
]


class Case:
    """Ours and torch-rechub's unit with one state, and a step of either."""

    def __init__(self, shape: Shape, training: bool):
        from torch_rechub.models.ranking.din import ActivationUnit

        torch.manual_seed(0)
        self.training = training
        self.eager = ActivationUnit(shape.D, shape.widths, shape.activation, shape.use_softmax).train(training)
        self.ours = rk.ActivationUnit(shape.D, shape.widths, shape.activation, shape.use_softmax).train(training)
        self.ours.load_state_dict(self.eager.state_dict())
        self.history, self.target = torch.randn(shape.B, shape.L, shape.D), torch.randn(shape.B, shape.D)
        self.grad_out = torch.randn(shape.B, shape.D)
        self.lengths, rows = None, shape.B * shape.L
        if shape.mean_length:
            self.lengths = torch.poisson(torch.full((shape.B,), float(shape.mean_length))).clamp(max=shape.L).long()
            self.history[torch.arange(shape.L) >= self.lengths[:, None]] = 0
            rows = int(self.lengths.sum())
        self.history.requires_grad_(training), self.target.requires_grad_(training)
        widths = [shape.D, *shape.widths, 1]
        self.flops = 2 * rows * (sum(a * b for a, b in zip(widths, widths[1:])) + shape.D)
        self.flops += 2 * shape.B * 3 * shape.D * shape.widths[0]

    def step(self, unit: nn.Module) -> tuple[Tensor, ...]:
        """A pass: the output, in training the gradients of history and target too."""
        form = {"lengths": self.lengths} if unit is self.ours and self.lengths is not None else {}
        if not self.training:
            with torch.inference_mode():
                return (unit(self.history, self.target, **form),)
        self.history.grad = self.target.grad = None
        unit.zero_grad(set_to_none=True)
        out = unit(self.history, self.target, **form)
        out.backward(self.grad_out)
        return out.detach(), self.history.grad, self.target.grad

    def check(self, other: nn.Module) -> None:
        if self.training and self.lengths is not None:
            return  # torch-rechub's padding is part of its batch statistics, and so of every number
        for a, b in zip(self.step(self.ours), self.step(other)):
            assert float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attention(shape, training, threads, race, benchmark):
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    case = Case(shape, training)
    compiled = torch.compile(case.eager)
    case.check(case.eager), case.check(compiled)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    medians = race(
        lambda: case.step(case.ours),
        {
            "eager": lambda: case.step(case.eager),
            "compile": lambda: case.step(compiled),
            "sgemm": lambda: torch.mm(a, b),
        },
    )
    benchmark.extra_info.update(case=f"DIN attention {shape}", training=training, threads=threads, flops=case.flops)
    sgemm = 2 * 2048**3 / medians["sgemm"]
    passes = 1 if not training else 3
    rate = passes * case.flops / medians["ours"]
    race.report(medians, f"{rate / 1e9:6.0f} GFLOP/s = {100 * rate / sgemm:3.0f} % of sgemm")


def peak_of_a_step(shape: Shape, name: str) -> float:
    """Peak memory of this process in a training step, beyond inputs, outputs and gradients, in MiB (Linux)."""

    def status(key):
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

    case = Case(shape, training=True)
    unit = {"ours": case.ours, "eager": case.eager}[name]
    for _ in range(2):
        results = case.step(unit)
    leaves = [case.history, case.target, *unit.parameters()]
    kept = sum(t.numel() * t.element_size() for t in (results[0], *(leaf.grad for leaf in leaves)))
    for leaf in leaves:
        leaf.grad = None
    del results
    ctypes.CDLL(None).malloc_trim(0)  # what the steps before freed goes back to the system
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    case.step(unit)
    return (status("VmHWM") - before - kept) / 2**20


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_peak_memory(index, request, benchmark):
    """One process a contender, so that neither sees what the other's allocator kept."""
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")

    def peak(name):
        command = [sys.executable, __file__, str(index), name]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    eager = peak("eager")
    ours = benchmark.pedantic(peak, args=("ours",), rounds=1)
    benchmark.extra_info.update(case=f"DIN attention {SHAPES[index]}", peak_mib={"ours": ours, "eager": eager})
    note(request, f"{ours:8.1f} MiB   eager {eager:8.1f} MiB, {ours / eager:.3f} of it")


if __name__ == "__main__":
    print(peak_of_a_step(SHAPES[int(sys.argv[1])], sys.argv[2]))
else:
    from conftest import note
