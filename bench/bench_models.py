"""Every model of torch-rechub as it is, and accelerated: forward and backward, and evaluation, on one thread.

Three features of 10,000 rows, histories of 20, 1024 samples: so little that what a call costs beside its arithmetic is
seen. Accelerated they must not be slower.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import rankkernels as rk
from bench.harness.peers import missing


def make(name: str):
    """The model as it is and accelerated, and a batch for both."""
    from bench.harness import rechub_models as rechub

    sizes = rechub.Sizes(B=1024, L=20, V=10_000, D=16, dims=(64, 32), attention=(36,))
    torch.manual_seed(0)
    untouched = rechub.build(name, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models without a layer of ours, which show what a ratio of 1 looks like
        accelerated = rk.accelerate(copy.deepcopy(untouched))
    for ours, theirs in zip(accelerated.parameters(), untouched.parameters(), strict=True):
        ours.data = theirs.data  # a copy of a model runs up to 6 % slower than the model: it lies elsewhere in memory
    return untouched, accelerated, rechub.batch(sizes), rechub.output


def names() -> list[str]:
    if missing("torch-rechub"):
        return []
    from bench.harness import rechub_models as rechub

    return list(rechub.MODELS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", names())
def test_model(name, training, race):
    torch.set_num_threads(1)
    untouched, accelerated, x, output = make(name)
    gradients = []
    for model in (untouched.train(training), accelerated.train(training)):
        torch.manual_seed(0)
        output(model(x)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

    def trained(model):
        def call():
            model.zero_grad()
            output(model(x)).square().mean().backward()

        return call

    def evaluated(model):
        def call():
            with torch.no_grad():
                model(x)

        return call

    of = trained if training else evaluated
    race(
        of(accelerated), {"torch-rechub": of(untouched)}, case=f"{name}, 3 features x 10,000 rows, B1024",
        kind="forward + backward" if training else "evaluation",
    )  # fmt: skip
    race.benchmark.extra_info["replaced"] = len(rk.explain(accelerated).replaced)
