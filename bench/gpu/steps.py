"""What checks and timings on a GPU share: a case's forward and backward, and how far off their results are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rankkernels.testing import relative_error, relative_errors


def on(device: torch.device, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in inputs]


def step(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The result of a forward, and the gradients of a backward."""
    out = function(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, grad_out, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted))]


def worst_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the result and of the gradients, small ones on the scale of the largest."""
    actual = [t.to(e.device) for t, e in zip(actual, expected, strict=True)]
    errors = [relative_error(actual[0], expected[0]), *relative_errors(actual[1:], expected[1:])]
    return float("inf") if any(e != e for e in errors) else max(errors)


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """What waits for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
