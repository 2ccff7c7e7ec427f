"""Histories of different lengths as torch.jagged holds them."""

from __future__ import annotations

import torch
from torch import Tensor


def jagged(history: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A nested history [B, j, D] as its values [N, D] and offsets [B + 1]; any other, and its offsets, as they are."""
    if not history.is_nested:
        return history, offsets
    if history.layout != torch.jagged or history.dim() != 3:
        raise ValueError(
            f"din_attention: a nested history must be [B, j, D] of layout torch.jagged, got {history.dim()} dimensions "
            f"of layout {history.layout}"
        )
    if offsets is not None:
        raise ValueError("din_attention: a nested history has offsets of its own, got others besides")
    values, offsets, lengths = history.values(), history.offsets(), history.lengths()
    if lengths is None:
        return values, offsets
    # torch.nested.narrow leaves gaps between the samples, and torch's own way to close them has no backward.
    ends = lengths.cumsum(0)
    sample = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    position = torch.arange(len(sample), device=values.device) - (ends - lengths)[sample]
    return values[offsets[sample] + position], torch.cat([ends.new_zeros(1), ends])
