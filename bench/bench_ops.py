"""Every op at the shapes of practice: ours, the eager reference, and the reference under torch.compile."""

from __future__ import annotations

import pytest
import torch

from rankkernels.testing import BENCH_CASES, TOLERANCE, relative_error

CASES = pytest.mark.parametrize("case", BENCH_CASES, ids=lambda case: case.id)


def readers(inputs):
    """Two ways to read the inputs once, at the machine's best."""
    x = inputs[0].detach().contiguous().view(-1)
    return {"read_sum": lambda: x.sum(), "read_dot": lambda: torch.dot(x, x)}


def shares(case, medians, passes: int = 1) -> str:
    size = 4 * case.elements
    read = min(medians["read_sum"], medians["read_dot"])
    return (
        f"{passes * size / medians['ours'] / 1e9:6.1f} GB/s = {100 * passes * read / medians['ours']:3.0f} % of read"
        f"   {passes * case.flops / medians['ours'] / 1e9:6.1f} GFLOP/s"
    )


@CASES
def test_forward(case, threads, race, benchmark):
    inputs = case.inputs()
    compiled = torch.compile(case.reference)
    exact = case.reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    with torch.inference_mode():
        assert relative_error(case.function(*inputs), exact) < TOLERANCE[torch.float32]
        medians = race(
            lambda: case.function(*inputs),
            {"eager": lambda: case.reference(*inputs), "compile": lambda: compiled(*inputs), **readers(inputs)},
        )
    benchmark.extra_info.update(
        case=case.id.replace("-", " "), training=False, elements=case.elements, flops=case.flops, threads=threads
    )
    race.report(medians, shares(case, medians))


@CASES
def test_forward_backward(case, threads, race, benchmark):
    inputs = case.inputs(requires_grad=True)
    wanted = [t for t in inputs if t.requires_grad]
    grad_out = torch.randn_like(case.function(*inputs))
    compiled = torch.compile(case.reference)

    def step(function, inputs=inputs, wanted=wanted, grad_out=grad_out):
        return torch.autograd.grad(function(*inputs), wanted, grad_out)

    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    expected = step(case.reference, exact, [t for t in exact if t.requires_grad], grad_out.double())
    floor = 0.1 * max(g.norm().item() for g in expected)
    for grad, want in zip(step(case.function), expected):
        assert relative_error(grad, want, floor) < TOLERANCE[torch.float32]
    del exact, expected
    medians = race(
        lambda: step(case.function),
        {"eager": lambda: step(case.reference), "compile": lambda: step(compiled), **readers(inputs)},
    )
    benchmark.extra_info.update(
        case=case.id.replace("-", " "), training=True, elements=case.elements, flops=case.flops, threads=threads
    )
    # Forward and backward read the input once each and write its gradient once: three passes over it.
    race.report(medians, shares(case, medians, passes=3))
