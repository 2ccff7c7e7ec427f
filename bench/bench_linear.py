"""The linear layers of DeepFM's and DIN's MLPs: ``rankkernels.nn.linear`` and ``nn.Linear``, eager and under
torch.compile. Where ours is torch's own call there is nothing to time: small products, and rows of whole cache lines on
any CPU but AMD's with AVX-512."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.harness import peers
from rankkernels.nn.linear import LINE, linear, onednn_is_faster

SHAPES = pytest.mark.parametrize(
    "shape", [(4096, 429, 256), (4096, 256, 128), (1024, 80, 256), (1024, 256, 128)], ids=str
)


@SHAPES
def test_forward_backward(shape, threads, race):
    n, k, m = shape
    if not onednn_is_faster() and k % LINE == 0:
        pytest.skip("not an AMD CPU with AVX-512: ours is nn.Linear")
    module, x, dy = nn.Linear(k, m), torch.randn(n, k, requires_grad=True), torch.randn(n, m)
    wanted = [x, *module.parameters()]

    def step(function):
        out = function(x)
        return out.detach(), *torch.autograd.grad(out, wanted, dy)

    functions = peers.compiled({"eager": module}, {"eager": "compile"})
    ours = lambda: step(lambda x: linear(module, x))  # noqa: E731
    for a, b in zip(ours(), step(module)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    race(
        ours,
        {name: lambda f=f: step(f) for name, f in functions.items()},
        case=f"Linear B{n} {k} -> {m}",
        kind="forward + backward",
        size=4 * (2 * n * k + 2 * n * m + 2 * k * m),
        flops=6 * n * k * m,
    )
