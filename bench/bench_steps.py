"""Whole training steps and evaluation passes: ours and torch-rechub's, eager and under torch.compile, same optimizer.

The losses of the first steps are compared before anything is timed. Where the time goes: docs/performance/deepfm.md
and ``python -m bench.profile_step``.
"""

from __future__ import annotations

import copy

import pytest
import torch

from bench.harness import machine
from bench.harness.peers import missing
from bench.workloads import CycledStep, Step, Workload, deepfm, din

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


@named([DEEPFM, LARGE])
@pytest.mark.parametrize("other", ["eager", "our lazy Adam"])
def test_exact_adam(workload, other, threads, race):
    """Dense Adam's numbers from the rows looked up, against dense Adam itself, without weight decay; and beside our
    lazy Adam, which trains another model."""
    models, batches, adam = workload.models(), [workload.batch(seed) for seed in range(8)], {"lr": 1e-3}
    theirs = models.pop("torch-rechub") if other == "eager" else copy.deepcopy(models["ours"])
    ours = CycledStep(models["ours"], batches, fused=True, exact=True, adam=adam)
    theirs = CycledStep(theirs, batches, fused=other != "eager", adam=adam)
    losses = first_losses(ours), first_losses(theirs)
    torch.testing.assert_close(*losses, rtol=1e-5 if other == "eager" else 1e-2, atol=0)
    race(
        lambda: (ours(), None)[1],
        {other: lambda: (theirs(), None)[1]},
        case=workload.name,
        kind="training step, exact Adam",
        missing=missing("torch-rechub"),
    )


@named([DEEPFM])
def test_evaluation_after_exact_adam(workload, threads, race):
    """Beside the model that lazy Adam trained: ``eval()`` has brought all rows up to date."""
    model, batches = workload.models()["ours"], [workload.batch(seed) for seed in range(8)]
    models = {"ours": model, "our lazy Adam": copy.deepcopy(model)}
    for name, model in models.items():
        first_losses(CycledStep(model, batches, fused=True, exact=name == "ours", adam={"lr": 1e-3}))
        model.eval()

    @torch.inference_mode()
    def evaluate(model):
        model(batches[0][0])

    race(
        lambda: evaluate(models["ours"]),
        {"our lazy Adam": lambda: evaluate(models["our lazy Adam"])},
        case=workload.name,
        kind="evaluation, trained by exact Adam",
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
