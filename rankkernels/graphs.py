"""A training step, or an inference, as a CUDA graph: one launch in the place of all of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["graphed"]


class _Captured(NamedTuple):
    """A graph, the tensors that it reads and what it gives."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any


def _on_side_stream(run: Callable[[], Any]) -> Any:
    """``run()`` as warm-ups have to: what autograd remembers of streams must not be those of other work."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        outputs = run()
    current.wait_stream(side)
    return outputs


def _capture(run: Callable[[], Any], pool) -> tuple[Callable[[], None], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return graph.replay, outputs


def _is_on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def graphed(function: Callable, *, warmup: int = 3, most: int = 8) -> Callable:
    """``function`` as CUDA graphs, one for each shape of its arguments: for small batches, whose launches cost the host
    more than the device.

    ``function`` is a whole training step (zeroing gradients, forward, backward, optimizers) or a forward in eval. It
    may read its arguments' tensors and write to parameters, gradients and state, but must not read a value on the host,
    nor take another way for other values. Optimizers in it need ``capturable=True``: torch's and those of ``optim``.
    Every call is one run: of each shape the first ``warmup`` ones run as they are, the next is captured and replayed,
    and so are all that follow.

    Graphs keep their memory, and each new shape costs a capture. So pad batches to a few sizes, histories to a few
    lengths; beyond ``most`` shapes further ones run as they are. Without a GPU all do.

    Args:
        function: takes tensors, or dictionaries, lists and tuples of tensors; other arguments choose a graph, too.
        warmup: calls of a shape before its capture; kernels are compiled and optimizers' state is made in them.
        most: how many graphs there are at most.

    Returns:
        What takes and returns the same. The tensors it returns are written to by the next call of that shape.

    Raises:
        ValueError: ``warmup`` or ``most`` is less than 1.
        RuntimeError: while capturing, what waits for the device, and a fused optimizer that is not capturable.
    """
    if warmup < 1 or most < 1:
        raise ValueError(f"graphed: warmup and most must be at least 1, got {warmup} and {most}")
    graphs: dict[Any, _Captured] = {}
    calls: dict[Any, int] = {}
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def call(*arguments, **keywords):
        leaves, spec = tree_flatten((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (*((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves), str(spec))
        captured = graphs.get(key)
        if captured is None:
            run = calls.get(key, 0)
            if not any(map(_is_on_gpu, tensors)) or (run == 0 and len(calls) >= most):
                return function(*arguments, **keywords)
            calls[key] = run + 1
            if run < warmup:
                return _on_side_stream(lambda: function(*arguments, **keywords))
            static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_arguments, own_keywords = spec.unflatten(static)
            replay, outputs = _capture(lambda: function(*own_arguments, **own_keywords), pool)
            own = [leaf for leaf in static if isinstance(leaf, Tensor)]
            captured = graphs[key] = _Captured(replay, own, outputs)
        with torch.no_grad():
            for own, given in zip(captured.inputs, tensors):
                own.copy_(given)
        captured.replay()
        return captured.outputs

    return call
