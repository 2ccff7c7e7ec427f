"""Every model of torch-rechub, accelerated and not: the same outputs, gradients and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankkernels as rk
from tests.outcomes import outcome

pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
rechub = pytest.importorskip("bench.harness.rechub_models")
pytestmark = pytest.mark.usefixtures("float64")

SIZES = rechub.Sizes(B=9, L=5, V=12, D=8, dims=(7, 6), attention=(6,), dropout=0.1)


def assert_reported(ours: nn.Module, theirs: nn.Module):
    """Every layer of torch-rechub is in the report: replaced by the class that it has now, or left with a reason."""
    report = {e.path: e for e in rk.explain(ours).entries}
    before, after = dict(theirs.named_modules()), dict(ours.named_modules())
    assert report.keys() == {path for path, m in before.items() if type(m).__module__.startswith("torch_rechub.")}
    for path, entry in report.items():
        assert (entry.cls, entry.library) == (type(before[path]).__name__, "torch-rechub")
        assert entry.done == (entry.replaced_by is not None) == (type(after[path]) is not type(before[path]))
        assert entry.done != bool(entry.reason)


def test_no_model_is_left_out():
    packages = rechub.ranking, rechub.matching, rechub.multi_task
    theirs = {name for package in packages for name in package.__all__}
    assert theirs == {name.split("-")[0] for name in rechub.MODELS} and len(theirs) == 30


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", rechub.MODELS)
def test_accelerated(name, training):
    torch.manual_seed(0)
    theirs = rechub.build(name, SIZES)
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    ours = copy.deepcopy(theirs)
    if name in rechub.WITHOUT_OUR_LAYERS:
        with pytest.warns(UserWarning, match="0 layers are replaced, 0 more can be, 1 are left"):
            rk.accelerate(ours)
    else:
        rk.accelerate(ours)
    assert_reported(ours, theirs)
    found = []
    for model in (theirs, ours):
        model.train(training)
        torch.manual_seed(1)
        y = rechub.output(model(rechub.batch(SIZES)))
        (y * torch.linspace(-1, 1, len(y))).sum().backward()
        grads = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
        with torch.no_grad():
            torch.manual_seed(1)
            found.append([y.detach(), *grads, *model.buffers(), rechub.output(model(rechub.batch(SIZES)))])
    assert found[0][0].numel() >= SIZES.B and any(g.abs().max() > 0 for g in found[0][1:-1] if g.numel())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


#: What torch-rechub refuses and ours do, and how: a transformer that cannot reshape an empty batch, and in eval a
#: squeeze that makes one sample none.
SERVED = {("BST", True, 0): RuntimeError, ("BST", False, 0): RuntimeError, ("DCNv2", False, 1): IndexError}


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", rechub.MODELS)
def test_accelerated_with_hardly_a_sample(name, training, samples):
    """The same shape, gradients and buffers, or the same kind of error."""
    torch.manual_seed(0)
    theirs = rechub.build(name, SIZES)
    ours = copy.deepcopy(theirs)
    if name not in rechub.WITHOUT_OUR_LAYERS:
        rk.accelerate(ours)
    batch = torch.utils._pytree.tree_map(lambda t: t[:samples], rechub.batch(SIZES))
    found = []
    for model in (theirs, ours):
        model.train(training)
        torch.manual_seed(1)
        found.append(outcome(model, lambda model=model: rechub.output(model(dict(batch)))))
    if (name, training, samples) in SERVED:
        assert found[0] is SERVED[name, training, samples] and found[1][0].shape == (samples,)
    elif isinstance(found[0], type):
        assert found[1] is found[0]
    else:
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("emptied", [lambda ids: ids[:, :0], torch.zeros_like], ids=["length zero", "padding"])
def test_histories_without_rows(emptied):
    """DIEN's, which torch-rechub serves, too: nothing evolves, and the recurrence has no gradient."""
    torch.manual_seed(0)
    theirs = rechub.build("DIEN", SIZES)
    ours = rk.accelerate(copy.deepcopy(theirs))
    batch = {k: emptied(v) if v.dim() > 1 else v for k, v in rechub.batch(SIZES).items()}
    found = [outcome(model, lambda model=model: rechub.output(model(dict(batch)))) for model in (theirs, ours)]
    assert any(g is None for g in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
