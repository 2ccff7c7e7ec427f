"""Whole training steps and evaluation passes, drop-in: ours and torch-rechub's, eager and under torch.compile, with the
same optimizer. The losses of the first steps are compared before anything is timed. See ``steps.py``.

Where the time of training steps goes says ``profile_step.py``. DeepFM's evaluation is one op (csrc/cpu/deepfm.h): of
5.8 ms on one thread 0.1 are Python's for 39 features and the folding of the normalizations, 4.7 the op's 1.17 GFLOP of
products, at the rate of the machine's best, 0.5 its lookups, 0.1 FM and the linear term, 0.1 the arranging of the
weights, which may change between any two calls. Tried without a gain: the next block's rows asked for between the tiles
of this one's product (5 % slower: they hold up the product's loads), or asked for into the second-level cache there and
copied later (8 %), fewer rows on their way (16: 6 %), more (128: none), panels with a single vector, another order of
arranging.

Without AVX-512 (two Zen 3 cores, sgemm 182 GFLOP/s) both sides' products are by one library at one rate: 3.5 GFLOP are
19 ms of the 40 of a step with 1,000 rows and of torch-rechub's 62, 1.17 GFLOP 6.4 of the evaluation's 8.8 and of its
15.0, so that nothing can be more than 3.2 and 2.3 times as fast. To leave the 13 dense columns out of the first layer's
gradient, which nobody reads, would save 0.5 ms, and a hook on the MLP would see it. That op instead of its parts: 8.5
for 8.9 ms, and as long as they for a request of 100 to 700 candidates; it is left to AVX-512.
"""

from __future__ import annotations

import copy

import pytest
import torch

from bench.harness import machine
from bench.harness.peers import missing
from bench.workloads import Step, Workload, deepfm, din

STEPS = 6
DIN, DEEPFM, SMALL, LARGE = din(), deepfm(100_000), deepfm(1_000), deepfm(1_000_000)


def named(workloads: list[Workload]):
    return pytest.mark.parametrize("workload", workloads, ids=lambda w: w.id)


def first_losses(step: Step) -> torch.Tensor:
    return torch.tensor([step() for _ in range(STEPS)])


@pytest.fixture(autouse=True)
def rechub():
    if machine.missing("torch-rechub"):
        pytest.skip("torch-rechub is not installed")


@named([DIN, DEEPFM, SMALL])
def test_step(workload, threads, race):
    models, batch = workload.models(), workload.batch()
    models["compile"] = torch.compile(copy.deepcopy(models["torch-rechub"]))
    steps = {name: Step(model, *batch) for name, model in models.items()}
    losses = {name: first_losses(step) for name, step in steps.items()}
    for name in steps:
        torch.testing.assert_close(losses["ours"], losses[name], rtol=1e-4, atol=0)
    ours = steps.pop("ours")
    race(
        lambda: (ours(), None)[1],
        {{"torch-rechub": "eager"}.get(name, name): lambda s=step: (s(), None)[1] for name, step in steps.items()},
        case=workload.name,
        kind="training step",
        missing=missing("torch-rechub"),
    )


@named([DEEPFM, LARGE])
def test_fused_optimizer(workload, threads, race):
    """Adam on the rows looked up, against dense Adam on all of them: other losses, the same work for a user."""
    models, batch = workload.models(), workload.batch()
    ours, theirs = Step(models["ours"], *batch, fused=True), Step(models["torch-rechub"], *batch)
    first, their_first = (float(first_losses(step)[0]) for step in (ours, theirs))
    assert first == pytest.approx(their_first, rel=1e-4)
    race(
        lambda: (ours(), None)[1],
        {"eager": lambda: (theirs(), None)[1]},
        case=workload.name,
        kind="training step, fused optimizer",
        missing=missing("torch-rechub"),
    )


@named([DIN, DEEPFM])
@torch.inference_mode()
def test_eval(workload, threads, race):
    models, (x, _) = workload.models(), workload.batch()
    ours, theirs = models["ours"].eval(), models["torch-rechub"].eval()
    code = torch.compile(theirs)
    race(
        lambda: ours(x),
        {"eager": lambda: theirs(x), "compile": lambda: code(x)},
        case=workload.name,
        kind="evaluation",
        missing=missing("torch-rechub"),
    )
