"""The ops in torch's own operators, which is all that exporters to ONNX know: for inference, on padded rows, so that no
shape depends on values. What is not here, the definition in ``reference.py`` stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._features import Features
from rankkernels.ops.attention_params import Flags, Inputs, unflatten_wide


def _pooled(weight: Tensor, features: Features, f: int) -> Tensor:
    """A feature's bags [B, L] -> [B, D]."""
    ids, padding, mode = features.indices[f], features.padding_idx[f], features.mode(f)
    rows, kept = reference.accumulator(F.embedding(ids, weight)), (ids != padding)[..., None]
    if mode == "max":
        largest = rows.masked_fill(~kept, -torch.inf).amax(1)
        return torch.where(kept.any(1), largest, 0.0).to(weight.dtype)
    factors = features.per_sample_weights_of(f)
    out = (rows * (kept if factors is None else kept * factors[..., None])).sum(1)
    return (out / kept.sum(1).clamp(min=1) if mode == "mean" else out).to(weight.dtype)


def embedding_bag(weights: Sequence[Tensor], features: Features) -> list[Tensor]:
    """The result of each feature. Bags of [N] ids with offsets are the definition's, whose shapes depend on values."""
    outs = []
    features = features.as_rows()
    for f, (ids, t) in enumerate(zip(features.indices, features.tables)):
        if features.mode(f) == "none":
            outs.append(F.embedding(ids, weights[t]))
        elif ids.dim() == 2:
            outs.append(_pooled(weights[t], features, f))
        else:
            padding = features.padding_idx[f]
            outs.append(
                reference.embedding_bag(
                    weights[t], ids, features.offsets_of(f), features.mode(f), features.per_sample_weights_of(f),
                    None if padding < 0 else padding,
                )
            )  # fmt: skip
    return outs


def din_attention(inputs: Inputs, flags: Flags) -> Tensor:
    """The pooled rows [B, D] or the scores [B, L] of a padded history, in evaluation."""
    history, target, lengths, mask, _, history_index, *_ = inputs
    hidden, out_weight, out_bias = unflatten_wide(inputs, flags)
    if history_index is not None:
        history, lengths, mask, _ = reference.expand_histories(history, history_index, lengths, mask, None)
    dtype, (B, L, D) = history.dtype, history.shape
    rows, t = reference.accumulator(history), reference.accumulator(target)[:, None].expand(B, L, D)
    x = torch.cat([t, rows, t - rows, t * rows], -1).reshape(B * L, 4 * D)
    for layer in hidden:
        x, _ = layer(x, False)
    score = F.linear(x, out_weight, out_bias).reshape(B, L)
    if lengths is not None:
        mask = torch.arange(L, device=history.device) < lengths[:, None]
    if flags.use_softmax:
        lowest = torch.finfo(score.dtype).min if flags.count_padding else -torch.inf
        score = (score if mask is None else score.masked_fill(~mask, lowest)).softmax(1)
    if mask is not None and not (flags.use_softmax and flags.count_padding):
        score = torch.where(mask, score, 0.0)
    return (score if flags.return_scores else (score[..., None] * rows).sum(1)).to(dtype)
