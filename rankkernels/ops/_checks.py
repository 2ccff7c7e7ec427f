"""What ops check of their arguments, in the words of the C++, and the types of the errors that C++ raises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are accumulated in; statistics and optimizer state are kept in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_form(op: str, name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises unless ``t`` is a tensor of this form; the text is that of csrc/stable/check.h."""
    torch._check(
        t.dim() == len(shape)
        and all(n == size for n, size in zip(t.shape, shape))
        and t.dtype == dtype
        and t.device == device,
        lambda: f"{op}: {name} must be {dtype} {list(shape)} on {device}, got {t.dtype} {list(t.shape)} on {t.device}",
    )


def check_indices(op: str, name: str, t: Tensor, size: int, sized: str) -> None:
    """Raises unless ``t`` is a vector of so many int32 or int64; ``sized`` is what the text calls the size."""
    torch._check(
        t.dim() == 1 and t.size(0) == size,
        lambda: f"{op}: {name} must be [{sized}] = [{size}], got shape {list(t.shape)}",
    )
    torch._check(t.dtype in (torch.int32, torch.int64), lambda: f"{op}: {name} must be int32 or int64, got {t.dtype}")


def check_one_device(op: str, device: torch.device, tensors: Iterable[Tensor | None]) -> None:
    for t in tensors:
        torch._check(
            t is None or t.device == device,
            lambda: f"{op}: all arguments must be on one device, got {device} and {t.device}",
        )


def check_lengths(op: str, lengths: Tensor, L: int, positions: str) -> None:
    """Raises for a length outside 0 .. L, which the text calls ``positions``."""
    for i in ((lengths < 0) | (lengths > L)).nonzero().flatten()[:1].tolist():
        raise ValueError(f"{op}: lengths[{i}] = {int(lengths[i])} is outside 0 .. {L}, {positions}")


def check_positions(
    op: str, history: Tensor, lengths: Tensor | None, offsets: Tensor | None, history_index: Tensor | None
) -> None:
    """Raises for lengths, offsets or an index that the histories [U, L, D], or [N, D] beside offsets [U + 1], do not
    have: reads the values, so not where that would synchronize."""
    if lengths is not None:
        check_lengths(op, lengths, history.size(1), "the history's positions")
    if offsets is not None:
        N, first, last = history.size(0), int(offsets[0]), int(offsets[-1])
        if first != 0 or last != N:
            raise ValueError(f"{op}: offsets must run from 0 to N = {N}, got {first} .. {last}")
        # Not their differences, which may overflow.
        for i in (offsets[1:] < offsets[:-1]).nonzero().flatten()[:1].tolist():
            raise ValueError(f"{op}: offsets decrease from {int(offsets[i])} to {int(offsets[i + 1])} at {i + 1}")
    if history_index is not None:
        U = history.size(0) if offsets is None else offsets.size(0) - 1
        for i in ((history_index < 0) | (history_index >= U)).nonzero().flatten()[:1].tolist():
            raise IndexError(f"{op}: history_index[{i}] = {int(history_index[i])} is out of range for {U} histories")


def check_strided(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises for sparse and other layouts: torch calls the default implementations with them."""
    for t in tensors:
        if t is not None and t.layout != torch.strided:
            raise RuntimeError(f"{op}: tensors must be of layout torch.strided, got {t.layout}")


def check_epsilon(op: str, name: str, eps: float, positive: bool) -> None:
    """torch's rule: an epsilon may be 0, unless the variance that it is added to may be 0, too."""
    rule = "be positive in training" if positive else "not be negative"
    torch._check(eps > 0 if positive else eps >= 0, lambda: f"{op}: {name} must {rule}, got {eps:g}")


class raise_documented:
    """Re-raises an operator's RuntimeError about values in a tensor as the documented type, which it knows by the text:
    operators in C++ can raise RuntimeError only. And torch's about a DTensor, saying what to do instead."""

    TYPES = (
        (re.compile("is out of range"), IndexError),
        (re.compile(r"is outside 0 \.\.|offsets must run|offsets decrease|more than one (valid )?row"), ValueError),
    )

    DTENSOR = re.compile(r"rankkernels\.(\w+)\.default (got mixed torch\.Tensor and DTensor|does not have a sharding)")

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if kind is RuntimeError or kind is NotImplementedError:
            message = str(error).splitlines()[0]
            if found := self.DTENSOR.search(message):
                raise NotImplementedError(
                    f"{found[1]}: takes no DTensor; tables in parts of their rows are nn.Embedding modules, which an "
                    "EmbeddingLayer calls (RowwiseParallel), or TorchRec's: docs/scale.md"
                ) from error
            for text, documented in self.TYPES:
                if text.search(message):
                    raise documented(message) from None
