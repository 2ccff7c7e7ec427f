"""Every op of ``rankkernels.testing.BENCH_CASES`` beside what a model has without it, eager and under torch.compile:
the FM interaction beside the eager reference and other libraries' layers, the target attention beside it and torch's
scaled_dot_product_attention, norm_activation beside nn.BatchNorm1d and the activation of torch, torch-rechub or
DeepCTR-Torch."""

from __future__ import annotations

import pytest
import torch

from bench.harness import machine, memory, peers
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.testing import BENCH_CASES, TOLERANCE, OpCase, relative_error, relative_errors

CASES = pytest.mark.parametrize("case", BENCH_CASES, ids=lambda case: case.id)


def inputs_of(case: OpCase, requires_grad: bool = False) -> list[torch.Tensor]:
    """A case's, where every history has a valid row: torch's attention to none is zeros, the layers' the mean."""
    inputs = case.inputs(requires_grad=requires_grad)
    for mask in (t for t in inputs if t.dtype == torch.bool):
        mask[:, 0] = True
    return inputs


def layers(case: OpCase) -> dict:
    """Everyone who computes the case, as functions of its inputs, the baseline first."""
    inputs = case.inputs()
    if case.op == "fm_interaction":
        functions = {"eager": case.reference, **peers.fm_layers(inputs[0].size(1))}
    elif case.op == "augru":
        functions = {"eager": case.reference}
    elif case.op == "target_attention":
        functions = {"eager": case.reference, **peers.one_query_attention(case)}
    else:
        x, *_, activation, _, _, norm_eps, _ = case.arguments(*inputs)
        functions = peers.hidden_layers(list(ACTIVATIONS)[activation], x.size(1), norm_eps)
        if not functions:
            pytest.skip("the library of this activation is not installed")
    return peers.compiled(functions, {"eager": "compile"})


def missing(case: OpCase) -> dict[str, str]:
    return peers.missing("torch-rechub", "deepctr-torch", "fuxictr") if case.op == "fm_interaction" else {}


def title(case: OpCase) -> str:
    return case.id.replace("_interaction", "").replace("-", " ").replace("fm", "FM")


class Training:
    """A forward and a backward of one case, and everyone who does them."""

    def __init__(self, case: OpCase):
        self.inputs = inputs_of(case, requires_grad=True)
        self.wanted = [t for t in self.inputs if t.requires_grad]
        self.grad_out = torch.randn_like(case.function(*self.inputs))
        self.steps = {name: lambda f=f: self.step(f) for name, f in ({"ours": case.function} | layers(case)).items()}

    def step(self, function):
        out = function(*self.inputs)
        return out.detach(), *torch.autograd.grad(out, self.wanted, self.grad_out)


@CASES
def test_forward_backward(case, threads, race):
    training = Training(case)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in training.inputs]
    wanted = [t for t in exact if t.requires_grad]
    expected = torch.autograd.grad(case.reference(*exact), wanted, training.grad_out.double())
    ours = training.steps.pop("ours")
    assert all(error < TOLERANCE[torch.float32] for error in relative_errors(ours()[1:], expected))
    del exact, wanted, expected
    race(
        ours,
        training.steps,
        case=title(case),
        kind="forward + backward",
        # The forward and the backward read the input once each, and its gradient is written once.
        size=3 * 4 * case.elements,
        flops=3 * case.flops,
        missing=missing(case) | {"zentorch": machine.missing("zentorch") or "made for inference"},
    )


# Behind training: once zentorch has compiled, torch's own compiler gives a masked attention NaN gradients (2.14.1).
@CASES
def test_forward(case, threads, race):
    inputs = inputs_of(case)
    exact = case.reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    functions = layers(case)
    functions |= peers.zentorch(next(iter(functions.values())))
    with torch.inference_mode():
        assert relative_error(case.function(*inputs), exact) < TOLERANCE[torch.float32]
        race(
            lambda: case.function(*inputs),
            {name: lambda f=f: f(*inputs) for name, f in functions.items()},
            case=title(case),
            kind="forward",
            size=4 * case.elements,
            flops=case.flops,
            missing=missing(case) | peers.missing("zentorch"),
        )


@CASES
def test_peak_memory(case, benchmark, note):
    baseline, compiled, *_ = layers(case)
    memory.compare(benchmark, note, __name__, case.id, title(case), ["ours", baseline, compiled])


def memory_step(case_id: str, name: str):
    """The training step whose memory ``memory.compare`` measures in a process of its own."""
    return Training(next(case for case in BENCH_CASES if case.id == case_id)).steps[name]
