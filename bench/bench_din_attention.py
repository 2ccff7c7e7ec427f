"""DIN attention against the layers of other libraries, each eager and compiled; and its peak memory.

Two families, because the libraries agree on no form of it: torch-rechub's unit with batch normalization, which masks
nothing, and the masked attention without of DeepCTR-Torch, FuxiCTR and, always with softmax, TorchEasyRec. Where the
time goes: docs/performance/din_attention.md.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rankkernels as rk
from bench.harness import memory, peers
from rankkernels import reference

warnings.filterwarnings("ignore", category=DeprecationWarning)


class Shape(NamedTuple):
    B: int
    L: int
    D: int
    widths: list[int]
    activation: str = "dice"
    use_softmax: bool = False
    #: Of the masked family: histories have this many rows on average.
    mean_length: int | None = None

    def __str__(self) -> str:
        text = f"B{self.B} L{self.L} D{self.D} {self.widths} {self.activation}".replace(", ", ",")
        return text + " softmax" * self.use_softmax + (f" length {self.mean_length}" if self.mean_length else "")

    @property
    def title(self) -> str:
        return ("masked " if self.mean_length else "") + f"DIN attention {self}"


SHAPES = [
    Shape(1024, 50, 16, [36]),
    Shape(2048, 50, 64, [80, 40]),
    Shape(4096, 100, 64, [36]),
    Shape(1024, 100, 64, [512, 256], use_softmax=True),
    Shape(1024, 50, 16, [64, 16], "relu", mean_length=25),
    Shape(2048, 50, 64, [80, 40], "sigmoid", mean_length=12),
    Shape(1024, 100, 32, [256, 128], "relu", use_softmax=True, mean_length=30),
]
#: The wide ones take minutes with one thread.
ONE_THREAD = [SHAPES[0], SHAPES[1], SHAPES[5]]


class Pass:
    """A forward, or in training a forward and a backward, of one shape by everyone who computes it.

    In training the results are the output and the gradients of history, target and parameters.
    """

    def __init__(self, shape: Shape, training: bool):
        torch.manual_seed(0)
        self.shape, self.training = shape, training
        B, L, D = shape.B, shape.L, shape.D
        self.history, self.target = torch.randn(B, L, D), torch.randn(B, D)
        self.grad_out = torch.randn(B, D)
        self.lengths, rows = torch.full((B,), L), B * L
        if shape.mean_length:
            self.lengths = torch.poisson(torch.full((B,), float(shape.mean_length))).clamp(1, L).long()
            self.history[torch.arange(L) >= self.lengths[:, None]] = 0  # as an embedding's padding row gives it
            rows = int(self.lengths.sum())
        self.history.requires_grad_(training), self.target.requires_grad_(training)
        widths = [D, *shape.widths, 1]
        self.flops = 2 * rows * (sum(a * b for a, b in zip(widths, widths[1:])) + D) + 2 * B * 3 * D * shape.widths[0]
        self.size = 4 * (rows * D + 2 * B * D)
        self.params: dict[str, list[Tensor]] = {}
        functions = self.masked() if shape.mean_length else self.unmasked()
        self.steps = {name: lambda n=name, f=f: self.step(n, f) for name, f in functions.items()}

    def unmasked(self) -> dict:
        from torch_rechub.models.ranking.din import ActivationUnit

        shape = self.shape
        arguments = shape.D, shape.widths, shape.activation, shape.use_softmax
        theirs, ours = ActivationUnit(*arguments), rk.ActivationUnit(*arguments)
        ours.load_state_dict(theirs.state_dict())
        for name, unit in (("torch-rechub", theirs), ("ours", ours)):
            self.params[name] = list(unit.train(self.training).parameters())
        self.params["torch-rechub compiled"] = self.params["torch-rechub"]
        return peers.compiled({"torch-rechub": theirs}) | {"ours": ours}

    def masked(self) -> dict:
        _, L, D, widths, activation, use_softmax, _ = self.shape
        params, width = [], 4 * D
        for w in (*widths, 1):
            params += [torch.randn(w, width) * width**-0.5, torch.randn(w) * 0.1]
            width = w
        params = [nn.Parameter(p, requires_grad=self.training) for p in params]
        hidden = [reference.Hidden(w, b, None, activation) for w, b in zip(params[:-2:2], params[1:-2:2])]

        def ours(history, target, lengths):
            return rk.din_attention(
                history, target, params, [], lengths=lengths, activation=activation, batch_norm=False,
                use_softmax=use_softmax, training=False,
            )[0]  # fmt: skip

        def eager(history, target, lengths):
            return reference.din_attention(
                history, target, hidden, *params[-2:], lengths=lengths, use_softmax=use_softmax
            )[0]

        theirs = peers.masked_attentions(D, widths, activation, use_softmax, params, L)
        functions = {"eager": eager, **peers.compiled(theirs), "ours": ours}
        self.params = dict.fromkeys(functions, params)
        inputs = lambda f: lambda history, target: f(history, target, self.lengths)  # noqa: E731
        return {name: inputs(f) for name, f in functions.items()}

    def step(self, name: str, function) -> tuple[Tensor, ...]:
        if not self.training:
            with torch.inference_mode():
                return (function(self.history, self.target),)
        out = function(self.history, self.target)
        return out.detach(), *torch.autograd.grad(out, [self.history, self.target, *self.params[name]], self.grad_out)

    def missing(self) -> dict[str, str]:
        others = ["tzrec-sekai"] if self.shape.use_softmax else []
        return peers.missing("deepctr-torch", "fuxictr", *others) if self.shape.mean_length else {}


@pytest.mark.parametrize(
    "threads, shape",
    [(2, shape) for shape in SHAPES] + [(1, shape) for shape in ONE_THREAD],
    indirect=["threads"],
    ids=lambda value: {2: "2_threads", 1: "1_thread"}.get(value) if isinstance(value, int) else str(value),
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_attention(shape, training, threads, race):
    if not shape.mean_length:
        pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    case = Pass(shape, training)
    ours = case.steps.pop("ours")
    passes = 3 if training else 1
    race(
        ours,
        case.steps,
        case=shape.title,
        kind="forward + backward" if training else "forward",
        size=passes * case.size,
        flops=passes * case.flops,
        missing=case.missing(),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peak_memory(shape, note, benchmark):
    contenders = ["FuxiCTR", "FuxiCTR compiled"] if shape.mean_length else ["torch-rechub", "torch-rechub compiled"]
    pytest.importorskip("fuxictr" if shape.mean_length else "torch_rechub", reason="no peer is installed")
    memory.compare(benchmark, note, __name__, str(shape), shape.title, ["ours", *contenders])


def memory_step(case: str, name: str):
    """The training step whose memory ``memory.compare`` measures in a process of its own."""
    return Pass(next(shape for shape in SHAPES if str(shape) == case), training=True).steps[name]
