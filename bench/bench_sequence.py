"""Attention to a long history by FuxiCTR's layer, and torch-rechub's BST and DIEN with histories of 50: forward, and
forward and backward, beside the library's and torch.compile of it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import rankkernels as rk
from bench.harness.peers import compiled, missing

D, HEADS = 64, 4
KINDS = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def calls(functions: dict, parameters: dict, training: bool) -> dict:
    """``functions`` of no arguments, each with the gradients of its ``parameters`` in training, without in eval."""

    def call(name, function):
        def run():
            if not training:
                with torch.no_grad():
                    return function()
            out = function()
            return out.detach(), *torch.autograd.grad(out.square().mean(), parameters[name], allow_unused=True)

        return run

    return {name: call(name, function) for name, function in functions.items()}


@KINDS
@pytest.mark.parametrize("B, L", [(64, 1000), (8, 10_000)])
def test_target_attention(B, L, training, threads, race):
    if missing("fuxictr"):
        pytest.skip("FuxiCTR is not installed")
    from fuxictr.pytorch.layers import MultiHeadTargetAttention

    torch.manual_seed(0)
    theirs = MultiHeadTargetAttention(D, D, HEADS).train(training)
    ours = rk.MultiHeadTargetAttention(D, D, HEADS).train(training)
    ours.load_state_dict(theirs.state_dict())
    target, history = torch.randn(B, D, requires_grad=True), torch.randn(B, L, D, requires_grad=True)
    mask = (torch.arange(L) < torch.randint(1, L + 1, (B, 1))).float()
    functions = {"ours": ours, **compiled({"FuxiCTR": theirs})}
    wanted = {name: [target, history, *(ours if name == "ours" else theirs).parameters()] for name in functions}
    functions = {name: lambda f=f: f(target, history, mask) for name, f in functions.items()}
    steps = calls(functions, wanted, training)
    own, others = steps["ours"](), steps["FuxiCTR"]()
    torch.testing.assert_close(own, others, rtol=1e-3, atol=1e-4)
    kind = "forward + backward" if training else "forward"
    ours = steps.pop("ours")
    race(ours, steps, case=f"MultiHeadTargetAttention B{B} L{L} D{D} {HEADS} heads", kind=kind)


@KINDS
@pytest.mark.parametrize("name", ["BST", "DIEN"])
def test_model(name, training, threads, race):
    if missing("torch-rechub"):
        pytest.skip("torch-rechub is not installed")
    from bench.harness import rechub_models as rechub

    torch.manual_seed(0)
    sizes = rechub.Sizes(B=1024, L=50, V=10_000, D=16, dims=(64, 32), attention=(36,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a transformer's fast path, which torch-rechub's activation has not
        theirs = rechub.build(name, sizes).train(training)
        ours = rk.accelerate(copy.deepcopy(theirs))
    x = rechub.batch(sizes)
    models = {"ours": ours, "torch-rechub": theirs}
    steps = calls(
        {n: lambda m=m: rechub.output(m(x)) for n, m in models.items()},
        {n: list(m.parameters()) for n, m in models.items()},
        training,
    )
    found = [[t for t in step() if t is not None] if training else step() for step in steps.values()]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    ours = steps.pop("ours")
    race(ours, steps, case=f"{name}, 3 features x 10,000 rows, B1024 L50", kind="forward + backward" if training else
         "evaluation")  # fmt: skip
