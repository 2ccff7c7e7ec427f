"""Modules against torch-rechub's and torch's own with the same weights, called rightly and wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from draw import INTERNAL, Draw, Finding, check_unchanged, message_of, snapshot, tensors_of
from torch import Tensor, nn

from rankkernels.testing import TOLERANCE, relative_error

ERRORS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, NotImplementedError)


@dataclass
class Trial:
    """A module of ours and what its call is compared with.

    ``theirs`` has the same state_dict and takes the same ``inputs``, which are tensors and dictionaries of them.
    ``smooth``: whether gradients are continuous, so that rounding cannot move them; in float64 nobody asks.
    """

    what: str
    ours: nn.Module
    theirs: nn.Module
    inputs: list
    dtype: torch.dtype
    smooth: bool = True
    keywords: dict | None = None


def converted(value, dtype: torch.dtype | None):
    """Floating-point tensors as leaves in ``dtype``, the rest as it is."""
    if isinstance(value, dict):
        return {k: converted(v, dtype) for k, v in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if dtype is not None:
        value = value.detach().to(dtype)
    return value.detach().requires_grad_(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())


def passes(trial: Trial, module: nn.Module, dtype: torch.dtype | None, grad: Tensor | None) -> dict[str, Tensor | None]:
    """The result, the gradients and the buffers of one forward and, given ``grad``, backward."""
    inputs = [converted(v, dtype) for v in trial.inputs]
    module.zero_grad()
    torch.manual_seed(7)  # of dropout
    out = module(*inputs, **(trial.keywords or {}))
    found = {"the result": out.detach()}
    if grad is not None and out.requires_grad:
        out.backward(grad.to(out.dtype))
        leaves = [t for t in tensors_of(inputs) if t.requires_grad]
        found |= {f"the gradient of input {i}": t.grad for i, t in enumerate(leaves)}
        found |= {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    return found | {f"the buffer {name}": b.clone() for name, b in module.named_buffers()}


def floors(exact: dict[str, Tensor | None]) -> dict[str, float]:
    """Gradients may be small differences of what is summed, which is of the largest one's size."""
    sizes = {k: v.double().norm().item() for k, v in exact.items() if v is not None and "gradient" in k}
    return {k: 0.1 * max(sizes.values()) for k in sizes} if sizes else {}


def compare(trial: Trial, found: dict, exact: dict, rough: dict) -> None:
    """``rough``, by theirs in float32, tells how far rounding moves these numbers: ours may move some times as far."""
    unit = torch.finfo(trial.dtype).eps / torch.finfo(torch.float32).eps
    of_gradients = floors(exact)
    for name, right in exact.items():
        value, floor = found[name], of_gradients.get(name, 0.0)
        if (value is None) != (right is None):
            raise Finding(f"{trial.what}: {name} is {'None' if value is None else 'not None'}")
        if value is None:
            continue
        if value.shape != right.shape:
            raise Finding(f"{trial.what}: {name} is {list(value.shape)}, expected {list(right.shape)}")
        value = value.to_dense()
        rounded = max(TOLERANCE[trial.dtype], TOLERANCE.get(value.dtype, 0.0))  # an input's gradient has its dtype
        allowed = rounded + 16 * unit * relative_error(rough[name].to_dense(), right.to_dense(), floor)
        error = relative_error(value, right.to_dense(), floor)
        if not error <= allowed:
            raise Finding(f"{trial.what}: relative error {error:.2e} of {name} in {trial.dtype} {list(value.shape)}")


def check(draw: Draw, trial: Trial) -> None:
    """One pass of ``trial``, with a backward or in one of the modes without."""
    training = trial.ours.training
    mode = draw.choice((torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode))
    before = snapshot(tensors_of(trial.inputs))
    weights = {k: v.clone() for k, v in trial.ours.named_parameters()}
    exact_module, rough_module = copy.deepcopy(trial.theirs).double(), copy.deepcopy(trial.theirs).float()
    with mode():
        wanted = exact_module.train(training)
        shape = passes(trial, copy.deepcopy(wanted), torch.float64, None)["the result"].shape
        gradients = mode is torch.enable_grad and (trial.smooth or trial.dtype == torch.float64)
        grad = draw.strided(draw.normal(shape, trial.dtype), overlap=True) if gradients else None
        found = passes(trial, trial.ours, None, grad)
        exact = passes(trial, wanted, torch.float64, grad)
        rough = passes(trial, rough_module.train(training), torch.float32, grad)
    check_unchanged(before, trial.what)
    for name, p in trial.ours.named_parameters():
        if not torch.equal(p.nan_to_num(), weights[name].nan_to_num()):
            raise Finding(f"{trial.what}: a pass has written to {name}")
    compare(trial, found, exact, rough)


def outcome(trial: Trial, module: nn.Module, errors: tuple) -> dict | Exception:
    try:
        return passes(trial, module, None, None)
    except errors as error:
        return error


def check_wrong(draw: Draw, trial: Trial) -> None:
    """A call that torch-rechub's module may refuse: ours then refuses it, and says so clearly; what ours takes is
    right. Nothing is written in a refused call but the running statistics of the layers before."""
    weights = {k: v.clone() for k, v in trial.ours.named_parameters()}
    before = snapshot(tensors_of(trial.inputs))
    theirs = copy.deepcopy(trial.theirs).to(trial.dtype).train(trial.ours.training)
    found, wanted = outcome(trial, trial.ours, ERRORS), outcome(trial, theirs, (Exception,))
    check_unchanged(before, trial.what)
    for name, p in trial.ours.named_parameters():
        if not torch.equal(p, weights[name]):
            raise Finding(f"{trial.what}: a pass has written to {name}")
    if isinstance(found, Exception):
        if not (isinstance(wanted, Exception) and message_of(wanted) == message_of(found)):  # torch's own words
            refusal(trial.what, found)
    elif isinstance(wanted, Exception):
        raise Finding(f"{trial.what}: accepted, where theirs says {type(wanted).__name__}: {message_of(wanted)[:200]}")
    elif found["the result"].device.type == "cpu":
        right = found["the result"].to_dense(), wanted["the result"].to_dense()
        same = right[0].shape == right[1].shape
        error = relative_error(*right) if same else torch.inf
        both_nan = same and torch.equal(right[0].isnan(), right[1].isnan()) and bool(right[1].isnan().any())
        computed = [t.dtype for t in (right[0], *tensors_of(trial.inputs)) if t.is_floating_point() or t.is_complex()]
        dtypes = {dtype.to_real() for dtype in computed} & TOLERANCE.keys()
        if not (error <= 100 * max(TOLERANCE[d] for d in dtypes or {trial.dtype}) or both_nan):
            raise Finding(f"{trial.what}: accepted, with relative error {error:.2e}")


def refusal(what: str, error: Exception, named: str = "") -> None:
    message = message_of(error)
    if INTERNAL.search(message) or not message.strip() or named not in message:
        raise Finding(f"{what}: an unclear error: {type(error).__name__}: {message}") from error


def refused_or_right(what: str, call: Callable, named: str = "") -> object | None:
    """What ``call`` returns, or None where it refuses clearly."""
    try:
        return call()
    except ERRORS as error:
        refusal(what, error, named)
        return None
