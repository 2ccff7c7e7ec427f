"""Interactions beyond FM beside torch-rechub's layers, eager and under torch.compile: cross networks, FFM and bilinear
products; pairwise dots beside torch's batched product, of which the upper triangle is selected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

import rankkernels as rk
from bench.harness import memory, peers


def selected_products(x: Tensor) -> Tensor:
    """All products of a sample's fields, and those above the diagonal of them."""
    F = x.shape[1]
    above = torch.ones(F, F, dtype=torch.bool, device=x.device).triu(1)
    return torch.masked_select(torch.bmm(x, x.transpose(1, 2)), above).view(x.shape[0], F * (F - 1) // 2)


class Gathered(nn.Module):
    """The same by indices, of which a compiler knows how many there are."""

    def __init__(self, F: int):
        super().__init__()
        f, g = torch.triu_indices(F, F, 1)
        self.register_buffer("above", f * F + g)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, x.transpose(1, 2)).flatten(1)[:, self.above]


#: Of torch-rechub's layers those with a Python loop over all pairs, 741 of them, which take minutes to compile.
LOOPS = "FFM", "BiLinearInteractionLayer"


@dataclass(frozen=True)
class Case:
    """A layer of torch-rechub with these arguments, or ``pairwise_dot``, of a normal input; ``elements`` are what
    forward and backward must read and write, ``flops`` what they must do."""

    layer: str
    arguments: tuple
    shape: tuple[int, ...]
    elements: int
    flops: int

    @property
    def id(self) -> str:
        arguments = "-".join(map(str, self.arguments))
        return f"{self.layer}({arguments})-B{self.shape[0]}".replace("()", "")

    @property
    def title(self) -> str:
        return f"{self.layer} {' x '.join(map(str, self.shape))}, {', '.join(map(str, self.arguments))}".rstrip(", ")

    @cached_property
    def layers(self) -> dict[str, Callable]:
        """Ours and everyone else's, with the same parameters, the baseline first behind ours."""
        if self.layer == "pairwise_dot":
            gathered = torch.compile(Gathered(self.shape[1]))
            return {"ours": rk.pairwise_dot, "bmm + masked_select": selected_products, "compile": gathered}
        from torch_rechub.basic import layers

        torch.manual_seed(0)
        theirs = getattr(layers, self.layer)(*self.arguments)
        ours = getattr(rk, self.layer)(*self.arguments)
        for name, parameter in theirs.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, parameter)
        if self.layer in LOOPS:
            return {"ours": ours, "torch-rechub": theirs}
        return {"ours": ours, **peers.compiled({"torch-rechub": theirs}, {"torch-rechub": "compile"})}


B, D, F, E, RANK = 4096, 429, 39, 4, 32
PAIRS = F * (F - 1) // 2


def cross(B: int, layers: int) -> Case:
    return Case("CrossNetwork", (D, layers), (B, D), 5 * B * D, (6 * layers + 6) * B * D)


def v2(B: int, layers: int) -> Case:
    return Case("CrossNetV2", (D, layers), (B, D), 5 * B * D, layers * 6 * B * D * D)


def mix(B: int, layers: int) -> Case:
    flops = 6 * B * E * (2 * D * RANK + RANK * RANK + D)
    return Case("CrossNetMix", (D, layers, RANK, E), (B, D), 5 * B * D, layers * flops)


def dots(B: int, F: int, width: int) -> Case:
    pairs = F * (F - 1) // 2
    return Case("pairwise_dot", (), (B, F, width), B * (3 * F * width + 2 * pairs), 6 * B * pairs * width)


def ffm(B: int, width: int) -> Case:
    elements = B * (2 * F * (F - 1) + F * F + 2 * PAIRS) * width
    return Case("FFM", (F, False), (B, F, F, width), elements, 3 * B * PAIRS * width)


def bilinear(B: int, width: int, kind: str) -> Case:
    matrices = PAIRS if kind == "field_interaction" else F - 1
    elements = B * (3 * F + 2 * PAIRS) * width
    flops = 8 * B * matrices * width * width
    return Case("BiLinearInteractionLayer", (width, F, kind), (B, F, width), elements, flops)


CASES = {
    case.id: case
    for case in (
        cross(B, 6), cross(256, 3), v2(B, 3), mix(B, 2), mix(256, 2), dots(8192, F, 16), dots(2048, 27, 64),
        ffm(256, 16), bilinear(256, 16, "field_interaction"), bilinear(2048, 16, "field_interaction"),
        bilinear(256, 16, "field_each"),
    )
}  # fmt: skip
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Training:
    """A forward and a backward of one case, and everyone who does them."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.shape, generator=generator).requires_grad_()
        layers = case.layers
        parameters = list(layers["ours"].parameters()) if isinstance(layers["ours"], nn.Module) else []
        self.wanted = [self.x, *parameters]
        with torch.no_grad():
            self.grad_out = torch.randn(layers["ours"](self.x).shape, generator=generator)
        self.steps = {name: lambda f=f: self.step(f) for name, f in layers.items()}

    def step(self, function: Callable) -> Sequence[Tensor]:
        out = function(self.x)
        grads = torch.autograd.grad(out, self.wanted, self.grad_out, allow_unused=True)
        return [out.detach(), *(g for g in grads if g is not None)]


@pytest.fixture(autouse=True)
def needs_torch_rechub(case):
    if case.layer != "pairwise_dot":
        pytest.importorskip("torch_rechub")


@ALL
def test_forward_backward(case, threads, race):
    steps = Training(case).steps
    race(steps.pop("ours"), steps, case=case.title, kind="forward + backward", size=4 * case.elements, flops=case.flops)


@ALL
def test_forward(case, threads, race):
    x = torch.randn(case.shape)
    with torch.inference_mode():
        functions = {name: lambda f=f: f(x) for name, f in case.layers.items()}
        race(functions.pop("ours"), functions, case=case.title, kind="forward")


@ALL
def test_peak_memory(case, benchmark, note):
    memory.compare(benchmark, note, __name__, case.id, case.title, list(case.layers)[:2])


def memory_step(case_id: str, name: str):
    """The training step whose memory ``memory.compare`` measures in a process of its own."""
    return Training(CASES[case_id]).steps[name]
