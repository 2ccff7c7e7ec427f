"""Every op against its reference, and as a citizen of PyTorch. Driven by ``rankkernels.testing.TEST_CASES``."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from rankkernels import fm_interaction, reference
from rankkernels.testing import (
    TEST_CASES,
    TOLERANCE,
    OpCase,
    din_attention_case,
    fm_interaction_case,
    relative_error,
    relative_errors,
)

ALL = pytest.mark.parametrize("case", TEST_CASES, ids=lambda case: case.id)
pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")


def gradients(function, inputs, grad_out):
    wanted = [t for t in inputs if t.requires_grad]
    out = function(*inputs)
    return out, torch.autograd.grad(out, wanted, grad_out, allow_unused=True)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The values of ``t`` where no dimension is contiguous: every second element of a larger tensor, transposed."""
    if t.dim() == 0:
        return t
    wide = torch.full((*(2 * n for n in reversed(t.shape)),), 7, dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
    view.copy_(t)
    return view


def assert_close_gradients(grads, expected_grads, tolerance: float) -> None:
    expected = [torch.zeros_like(g) if e is None else e for g, e in zip(grads, expected_grads, strict=True)]
    assert all(error < tolerance for error in relative_errors(grads, expected))


def check(case: OpCase, dtype: torch.dtype, inputs, terms: float = 0.0) -> None:
    """Result and gradients of ``inputs`` against the reference in float64 on the same values. Where the result may be
    a small difference of large terms, their norm ``terms`` is given: errors are measured on a tenth of it at least."""
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t.clone() for t in inputs]
    grad_out = torch.randn(case.function(*inputs).shape, dtype=torch.float64).to(dtype)
    before = [t.detach().clone() for t in inputs]
    out, grads = gradients(case.function, inputs, grad_out)
    expected, expected_grads = gradients(case.reference, exact, grad_out.double())
    assert out.dtype == dtype and out.shape == expected.shape
    assert relative_error(out, expected, 0.1 * terms) < TOLERANCE[dtype]
    for t, grad in zip((t for t in inputs if t.requires_grad), grads):
        assert grad is not None and grad.dtype == t.dtype and grad.shape == t.shape
    assert_close_gradients(grads, expected_grads, TOLERANCE[dtype])
    for t, old in zip(inputs, before):
        assert torch.equal(t, old), "an input was written to"


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@ALL
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(case, dtype, poisoned):
    check(case, dtype, case.inputs(dtype, requires_grad=True))


@ALL
def test_non_contiguous(case, poisoned):
    inputs = [strided(t).requires_grad_(t.is_floating_point()) for t in case.inputs()]
    check(case, torch.float32, inputs)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_nan_of_any_bits_is_one(case, dtype):
    """Memory of ones, and what other languages mark missing values with, are NaN that torch does not make: R's is its
    number 1954."""
    kind, plain = (torch.int32, 0x7FC00000) if dtype == torch.float32 else (torch.int64, 0x7FF8000000000000)
    inputs = case.inputs(dtype)
    for i, t in enumerate(inputs):
        if not t.is_floating_point() or not t.numel():
            continue
        found = []
        for bits in (plain, plain + 1954, -1):
            changed = t.clone()
            changed[(0,) * t.dim()] = torch.tensor(bits, dtype=kind).view(dtype)
            found.append(case.function(*inputs[:i], changed, *inputs[i + 1 :]).isnan())
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@ALL
def test_gradcheck(case):
    inputs = case.inputs(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(case.function, inputs, nondet_tol=0.0)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.flops > 3000 else [])
        for case in TEST_CASES
        if case.op == "fm_interaction"
    ],
)
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(case.function, case.inputs(torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[pytest.mark.slow] if case.flops > 1800 else [])
        for case in TEST_CASES
        if case.flops <= 3000  # a small case of each op is enough
    ],
)
def test_reference_is_twice_differentiable(case):
    assert torch.autograd.gradgradcheck(case.reference, case.inputs(torch.float64, requires_grad=True))


@ALL
def test_opcheck(case):
    torch.library.opcheck(case.overload, case.arguments(*case.inputs(requires_grad=True)))


@ALL
def test_compile(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in (0, 1):
        inputs = case.inputs(requires_grad=True, seed=seed)
        out = case.function(*inputs)
        grad_out = torch.randn_like(out)
        out, grads = gradients(case.function, inputs, grad_out)
        compiled_out, compiled_grads = gradients(compiled, inputs, grad_out)
        assert torch.equal(out, compiled_out)
        assert all(torch.equal(a, b) for a, b in zip(grads, compiled_grads))


@pytest.mark.parametrize("op", sorted({case.op for case in TEST_CASES}))
def test_inductor(op):
    """The default backend compiles generated code: one case an op."""
    torch._dynamo.reset()
    case = next(c for c in TEST_CASES if c.op == op)
    inputs = case.inputs(requires_grad=True)

    def function(*tensors):
        return case.function(*tensors).sin() * 2

    grad_out = torch.randn_like(function(*inputs))
    expected, expected_grads = gradients(function, inputs, grad_out)
    out, grads = gradients(torch.compile(function, fullgraph=True, dynamic=True), inputs, grad_out)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert_close_gradients(grads, expected_grads, TOLERANCE[torch.float32])


@ALL
def test_same_bits_again(case, threads):
    inputs = case.inputs(requires_grad=True)
    grad_out = torch.randn_like(case.function(*inputs))
    first, second = (gradients(case.function, inputs, grad_out) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("shape", [(5000, 39, 10), (70, 1, 1), (3, 2000, 33), (1, 3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fm_large_and_threaded(shape, dtype, threads):
    case = fm_interaction_case(*shape)
    check(case, dtype, case.inputs(dtype, requires_grad=True))


@pytest.mark.parametrize("D", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 80, 100, 127])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fm_every_vector_tail(D, dtype, poisoned):
    for reduce_sum in (True, False):
        case = fm_interaction_case(3, 6, D, reduce_sum)
        check(case, dtype, case.inputs(dtype, requires_grad=True))


def test_fm_bits_do_not_depend_on_threads():
    case = fm_interaction_case(4099, 39, 10)
    (x,) = case.inputs(requires_grad=True)
    grad_out = torch.randn(4099, 1)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(gradients(case.function, [x], grad_out))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("D", [4, 8, 10, 16, 24, 40, 48])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fm_large_gradient_has_the_bits_of_its_parts(D, dtype, poisoned):
    """Beyond 16 MiB it is stored past the caches."""
    F = 39
    x = torch.randn(2**24 // (F * D * dtype.itemsize) + 7, F, D).to(dtype)
    grad_out = torch.randn(len(x), 1).to(dtype)
    whole, parts = (
        torch.cat([torch.ops.rankkernels.fm_interaction_backward(g, p, True) for g, p in zip(*split)])
        for split in ([[grad_out], [x]], [grad_out.chunk(3), x.chunk(3)])
    )
    assert torch.equal(whole, parts)


def test_fm_one_field_is_exactly_zero():
    x = torch.randn(100, 1, 37, requires_grad=True)
    y = fm_interaction(x)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all()


def test_fm_expanded_and_sliced_inputs():
    base = torch.randn(6, 9, 40)
    for x in (
        base[:, ::2, 3:20],
        base[:1].expand(5, 9, 40),
        base.transpose(0, 1),
        base.permute(2, 1, 0),
        base[:, :, ::3],
        base[:, :1].expand(6, 4, 40),
    ):
        # Equal samples share one sum over pairs, and with it the cancellation in it: sum_{i<j} |x_i x_j| is its scale.
        terms = reference.fm_interaction(x.double().abs()).norm().item()
        check(fm_interaction_case(*x.shape), torch.float32, [x.detach().requires_grad_()], terms)


def test_fm_infinities_and_nans_stay_in_their_sample():
    x = torch.randn(4, 3, 10)
    x[1, 2, 9], x[2, 0, 0] = torch.inf, torch.nan
    y = fm_interaction(x)
    assert y[[0, 3]].isfinite().all() and y[[1, 2]].isnan().all()


def test_autocast():
    """As torch's own sum and pow: float32 on CUDA, the input's dtype on the CPU."""
    x = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fm_interaction(x).dtype == torch.bfloat16 == (x.sum(1) ** 2).dtype
    key = torch._C.DispatchKey.AutocastCUDA
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rankkernels::fm_interaction", str(key).split(".")[-1])


def test_autocast_leaves_products_in_a_default_alone():
    """In a process of its own, where the default runs: with the library's kernels there is no product to cast."""
    code = """
        import torch
        from rankkernels import ops
        weights = [torch.randn(9, 4, requires_grad=True) for _ in range(3)]
        ids, a = [torch.arange(5)] * 3, torch.randn(1, 12, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            outs = ops.embedding_fm(weights, ids, a, modes=["none"] * 3)
            sum(out.sum() for out in outs).backward()
        assert {t.dtype for t in (*outs, a.grad, weights[0].grad)} == {torch.float32}
    """
    environment = {**os.environ, "RANKKERNELS_REFERENCE": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment, check=True)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_din_attention_alone(training):
    case = din_attention_case(4, 5, 6, [7], training=training)
    inputs = case.inputs(requires_grad=True)
    grad_out = torch.randn(4, 6)
    expected, expected_grads = gradients(case.function, inputs, grad_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = gradients(case.function, inputs, grad_out)
        assert (out.sum() * torch.ones(3, 3) @ torch.ones(3, 3)).dtype == torch.bfloat16, "autocast is on again"
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(3, 4), r"fm_interaction: x must have 3 dimensions, got 2 \(shape \[3, 4\]\)"),
        (torch.randn(1, 2, 3, 4), r"fm_interaction: x must have 3 dimensions, got 4"),
        (
            torch.ones(2, 3, 4, dtype=torch.int64),
            r"fm_interaction: x must be float32, float64, float16 or bfloat16, got",
        ),
    ],
)
def test_fm_bad_input(x, message):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        fm_interaction(x)


def test_fm_backward_bad_input():
    backward = torch.ops.rankkernels.fm_interaction_backward.default
    x = torch.randn(3, 4, 5)
    with pytest.raises(RuntimeError, match="grad_out"):
        backward(torch.randn(3, 5), x, True)
    with pytest.raises(RuntimeError, match="grad_out"):
        backward(torch.randn(3, 1).double(), x, True)
    with pytest.raises(RuntimeError, match="grad_out"):
        backward(torch.randn(2, 1), x, True)
