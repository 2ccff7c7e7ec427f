"""The linear layers of an MLP: the numbers of ``nn.Linear``, and torch's call where a caller could tell."""

import pytest
import torch
from torch import nn

from rankkernels.nn import MLP, layers
from rankkernels.ops import linear as linear_module
from rankkernels.ops._library import no_extension
from rankkernels.ops.linear_weight_grad import linear_weight_grad

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN product",
)


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """oneDNN on any CPU, for products of any size."""
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear_module, "MIN_MULTIPLY_ADDS", 1)


def linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear_module.linear(x, module.weight, module.bias)


def uses_onednn(function) -> bool:
    with torch.profiler.profile() as recorded:
        function()
    return any("mkldnn" in e.name for e in recorded.events())


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 10, 3), (0, 5, 4), (300, 429, 256), (64, 128, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("faster", [True, False])
def test_linear_is_torchs(shape, bias, strided, faster, monkeypatch):
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: faster)
    n, k, m = shape
    module = nn.Linear(k, m, bias=bias)
    x = torch.randn(n, 2 * k)[:, ::2] if strided else torch.randn(n, k)
    x = x.detach().requires_grad_()
    dy = torch.randn(n, m)
    assert uses_onednn(lambda: linear(module, x)) == (faster and n > 0)
    (grad_x,) = torch.autograd.grad(linear(module, x), x, dy)  # without a graph: in rows of whole lines
    torch.testing.assert_close(grad_x, dy @ module.weight.detach(), rtol=1e-4, atol=1e-4)
    results = []
    for function, dtype in ((linear, torch.float32), (lambda module, x: module(x), torch.float64)):
        module.to(dtype)
        copy = x.detach().to(dtype).requires_grad_()
        out = function(module, copy)
        first = torch.autograd.grad(out, [copy, *module.parameters()], dy.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first[:2]), [copy, module.weight])
        results.append([out, *first, *second])
    for ours, exact in zip(*results):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_an_mlp_uses_it_only_where_it_is_what_was_asked_for():
    mlp, x = MLP(20, dims=[16, 8]), torch.randn(32, 20)
    assert uses_onednn(lambda: mlp(x))
    linears = [m for m in mlp.mlp if isinstance(m, nn.Linear)]
    seen = []
    handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in linears]
    assert not uses_onednn(lambda: mlp(x)) and len(seen) == 3
    for handle in handles:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(lambda: linear(linears[0], x))
        assert linear(linears[0], x).dtype == torch.bfloat16
    assert not uses_onednn(lambda: mlp.double()(x.double()))


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "prelu", "dice"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("faster", [True, False])
@torch.no_grad()
def test_a_normalization_goes_into_the_weights_in_eval(activation, affine, faster, monkeypatch):
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: faster)
    mlp, x = MLP(20, dims=[16, 8], activation=activation), torch.randn(32, 20)
    for i in (1, 5):
        mlp.mlp[i] = nn.BatchNorm1d(mlp.mlp[i].num_features, affine=affine)
    mlp.mlp[4] = nn.Linear(16, 8, bias=False)
    for t in mlp.state_dict().values():
        t.add_(torch.rand(t.shape).to(t.dtype))
    mlp.eval()
    for _ in range(2):
        torch.testing.assert_close(mlp(x), mlp.mlp(x), rtol=1e-5, atol=1e-5)
        mlp.mlp[0].weight.data.mul_(2), mlp.mlp[5].running_var.data.add_(1)  # no version of a tensor tells
    calls = []
    monkeypatch.setattr(layers, "_fused_activation", lambda norm, activation, x: calls.append(1))
    mlp(x)
    assert not calls
    for how in (mlp.train, lambda: mlp.eval().mlp[1].register_forward_hook(lambda *_: None)):
        how()
        calls.clear()
        mlp(x)
        assert calls
    mlp.eval()
    with torch.enable_grad():
        calls.clear()
        mlp(x)
    assert len(calls) == 2


@torch.no_grad()
def test_infinities_and_nans_pass_as_through_the_modules():
    mlp, x = MLP(20, dims=[16, 8]).eval(), torch.randn(32, 20)
    x[3, 5], x[7, 2] = torch.nan, torch.inf
    torch.testing.assert_close(mlp(x), mlp.mlp(x), equal_nan=True)
    assert mlp(x)[3].isnan().all()


def test_wrong_widths_are_torchs_own_error():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(nn.Linear(20, 4), torch.randn(3, 19))


needs_kernels = pytest.mark.skipif(bool(no_extension), reason="what the C++ kernels promise")


@needs_kernels
@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (1, 1, 1), (129, 17, 5), (4097, 65, 7), (300, 70, 133), (64, 429, 1)], ids=str
)
@pytest.mark.parametrize("strided", [False, True])
def test_weight_gradient(shape, strided):
    n, k, m = shape
    wide = torch.randn(n, 2 * k), torch.randn(n, 2 * m)
    x, dy = (t[:, ::2] if strided else t[:, : t.shape[1] // 2] for t in wide)
    exact = dy.double().t() @ x.double()
    grad = linear_weight_grad(dy, x)
    assert grad.shape == (m, k) and (grad - exact).norm() <= 2e-6 * exact.norm()
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    assert torch.equal(grad, linear_weight_grad(dy, x))
    torch.set_num_threads(before)


@needs_kernels
def test_weight_gradient_is_an_op():
    dy, x = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.rankkernels.linear_weight_grad.default, (dy, x))
    for bad, text in (
        ((dy, x[0]), "2 dimensions"),
        ((dy, x[1:]), "x must have the rows of dy, 5, got 4"),
        ((dy.double(), x.double()), "dy must be torch.float32, got torch.float64"),
        ((dy, x.half()), "x must be torch.float32, got torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=text):
            linear_weight_grad(*bad)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_equal_run_after_run(threads):
    torch.set_num_threads(threads)
    module, x, dy = nn.Linear(429, 256), torch.randn(512, 429, requires_grad=True), torch.randn(512, 256)
    runs = [torch.autograd.grad(linear(module, x), [x, *module.parameters()], dy) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))
