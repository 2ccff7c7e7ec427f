"""What a model makes of a batch that may be too small for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def outcome(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor | None] | type[Exception]:
    """What ``forward`` gives, the parameters' gradients of its sum and the buffers after it, or the kind of error."""
    try:
        y = forward()
        y.sum().backward()
    except (RuntimeError, ValueError, IndexError) as error:
        return type(error)
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]
