"""DIN's attention out of a library's products and ``norm_activation``, for GPUs where no fused kernel serves.

    x = [h, t * h] [Wh - Wd, Wp]^T + c,    c = (Wt + Wd) t + bias, once a sample

and then layer by layer, under plain autograd: what [t, h, t - h, t * h] would have cost, and a second forward in the
backward, are spared. Nothing waits for the device and no size depends on values: padding is computed like any row and
has no weight, in the sum and in batch statistics. All sums have a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._checks import wide
from rankkernels.ops.attention_params import Flags, Inputs, norms_per_layer, unflatten_wide
from rankkernels.ops.norm_activation import dice_of, kept_statistics, norm_activation
from rankkernels.reference import BatchNorm, Hidden


class _Segments(NamedTuple):
    """Which rows of [N, ..] are whose: sample b's ``offsets[b]:offsets[b + 1]``. ``sample`` [N] is B outside."""

    offsets: Tensor
    sample: Tensor


class _OfSamples(torch.autograd.Function):
    """What each row's sample has: x [B, ..] -> [N, ..], ``outside`` where a row has no sample."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: _Segments, outside: float) -> Tensor:
        ctx.segments = segments
        return torch.cat([x, x.new_full((1, *x.shape[1:]), outside)]).index_select(0, segments.sample)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _SumsOfRows.apply(grad, ctx.segments), None, None


class _SumsOfRows(torch.autograd.Function):
    """The sum of each sample's rows, in order: x [N, ..] -> [B, ..]."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: _Segments) -> Tensor:
        ctx.segments = segments
        return torch.segment_reduce(x.contiguous(), "sum", offsets=segments.offsets, initial=0, unsafe=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _OfSamples.apply(grad, ctx.segments, 0.0), None


class _Padded(NamedTuple):
    """Histories [B, L, D]; ``valid`` [B, L] where some rows have no weight."""

    history: Tensor
    valid: Tensor | None

    def of_samples(self, x: Tensor) -> Tensor:
        return x[:, None]

    def places(self) -> tuple[Tensor, Tensor]:
        """Each row's sample and position there."""
        B, L, _ = self.history.shape
        sample, position = (torch.arange(n, device=self.history.device) for n in (B, L))
        return sample[:, None].expand(B, L).flatten(), position.expand(B, L).flatten()

    def weights(self, score: Tensor, flags: Flags) -> Tensor:
        B, L, _ = self.history.shape
        score, valid = score.view(B, L), self.valid
        if flags.use_softmax:
            if valid is not None:
                score = score.masked_fill(~valid, torch.finfo(score.dtype).min)
            score = score.softmax(1)
            if flags.count_padding:
                return score
        return score if valid is None else score.masked_fill(~valid, 0.0)

    def pooled(self, weight: Tensor) -> Tensor:
        return torch.bmm(weight.to(self.history.dtype)[:, None], self.history).squeeze(1)


class _Jagged(NamedTuple):
    """Histories [N, D], one after the other."""

    history: Tensor
    segments: _Segments
    valid: None = None

    def of_samples(self, x: Tensor, outside: float = 0.0) -> Tensor:
        return _OfSamples.apply(x, self.segments, outside)

    def places(self) -> tuple[Tensor, Tensor]:
        offsets, sample = self.segments
        row = torch.arange(sample.numel(), dtype=offsets.dtype, device=sample.device)
        return sample, row - offsets[sample]

    def weights(self, score: Tensor, flags: Flags) -> Tensor:
        if not flags.use_softmax:
            return score
        peak = torch.segment_reduce(score.detach(), "max", offsets=self.segments.offsets, unsafe=True)
        e = torch.exp(score - self.of_samples(peak))
        return e / self.of_samples(_SumsOfRows.apply(e, self.segments), 1.0)

    def pooled(self, weight: Tensor) -> Tensor:
        return _SumsOfRows.apply(weight[:, None] * self.history, self.segments)


def _rows(inputs: Inputs, flags: Flags) -> _Padded | _Jagged:
    history, _, lengths, mask, offsets, history_index, *_ = inputs
    if history_index is not None:
        history, lengths, mask, offsets = reference.expand_histories(history, history_index, lengths, mask, offsets)
    if offsets is not None:
        offsets = offsets.contiguous()
        row = torch.arange(history.size(0), dtype=offsets.dtype, device=history.device)
        before = torch.searchsorted(offsets, row, right=True) - 1
        return _Jagged(history, _Segments(offsets, before % offsets.numel()))
    if lengths is not None:
        mask = torch.arange(history.size(1), device=history.device) < lengths[:, None]
    if mask is not None and not flags.count_padding:  # whatever padding's memory holds, infinities too
        history = history.masked_fill(~mask[..., None], 0.0)
    return _Padded(history, mask)


def _first_layer(layer: Hidden, rows: _Padded | _Jagged, target: Tensor) -> Tensor:
    """[N, H], without concatenating the four parts."""
    w_target, w_history, w_difference, w_product = layer.weight.chunk(4, dim=1)
    weight = torch.cat([w_history - w_difference, w_product], 1).to(target.dtype)
    of_target = F.linear(target, (w_target + w_difference).to(target.dtype), layer.bias.to(target.dtype))
    history = rows.history
    x = F.linear(torch.cat([history, history * rows.of_samples(target)], -1), weight) + rows.of_samples(of_target)
    return x.flatten(0, -2)


def _normalized_over(valid: Tensor, x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The batch normalization of x [N, H] with the statistics of the rows where ``valid`` [N] is 1, and these [2 H]: of
    no row the running ones, as ``norm_activation`` has it."""
    n, xa = valid.sum(), reference.accumulator(x)
    mean = torch.mv(xa.t(), valid) / n.clamp(min=1)
    centred = xa - mean
    var = torch.mv(centred.square().t(), valid) / n.clamp(min=1)
    y = torch.addcmul(norm.bias, centred, norm.weight * torch.rsqrt(var + norm.eps))
    stats = torch.cat([mean, var * (n / (n - 1).clamp(min=1))]).detach()
    return y.to(x.dtype), torch.where(n > 0, stats, kept_statistics(x, norm.running_mean, norm.running_var))


def _normalize_and_activate(
    x: Tensor, norm: BatchNorm | None, activation: str, layer: Hidden, training: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    alpha = layer.alpha if activation == layer.activation else None
    if norm is None or not training or valid is None:
        norm, batch_norm = norm or BatchNorm(None, None, None, None, 0.0), norm is not None
        return norm_activation(
            x, norm.weight, norm.bias, alpha, norm.running_mean, norm.running_var, activation=activation,
            batch_norm=batch_norm, training=training, norm_eps=norm.eps, dice_eps=layer.dice_epsilon,
        )  # fmt: skip
    y, stats = _normalized_over(valid, x, norm)
    if activation == "dice_batch_norm":
        return dice_of(x, y, alpha), stats
    return norm_activation(y, alpha=alpha, activation=activation, dice_eps=layer.dice_epsilon)[0], stats


def _behind_product(x: Tensor, layer: Hidden, training: bool, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Normalizations and activation of a hidden layer, and the statistics of the batch."""
    if layer.activation != "dice_batch_norm":
        x, stats = _normalize_and_activate(x, layer.norm, layer.activation, layer, training, valid)
        return x, [stats]
    all_stats = []
    if layer.norm is not None:
        x, stats = _normalize_and_activate(x, layer.norm, "linear", layer, training, valid)
        all_stats.append(stats)
    x, stats = _normalize_and_activate(x, layer.dice_norm, layer.activation, layer, training, valid)
    return x, [*all_stats, stats]


def attend(inputs: Inputs, flags: Flags) -> tuple[Tensor, Tensor]:
    """What the op returns first and second, of its checked arguments. Products are in the dtype of ``history``."""
    rows, target, dtype = _rows(inputs, flags), inputs.target, inputs.history.dtype
    hidden, out_weight, out_bias = unflatten_wide(inputs, flags)
    last = Hidden(out_weight, out_bias, None, "linear")
    statistics = hidden and flags.training and norms_per_layer(flags.name, flags.batch_norm)
    total = rows.history.shape[:-1].numel()
    if statistics and total == 1:
        raise ValueError(f"din_attention: training needs more than one valid row to take statistics of, got {total}")
    valid = None
    if statistics and total and rows.valid is not None and not flags.count_padding:
        valid = rows.valid.flatten().to(wide(dtype))
    x, all_stats = _first_layer((*hidden, last)[0], rows, target), []
    for i, layer in enumerate(hidden):
        if i:
            x = F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
        x, stats = _behind_product(x, layer, flags.training, valid)
        all_stats += stats
        if flags.dropout > 0:
            factor = reference.dropout_factor(flags.dropout, flags.seed, i, *rows.places(), x.size(1))
            x = x * factor.to(dtype)
    if hidden:
        x = F.linear(x, out_weight.to(dtype), out_bias.to(dtype))
    weight = rows.weights(reference.accumulator(x.squeeze(1)), flags)
    batch_stats = torch.cat(all_stats) if statistics else weight.new_empty(0)
    return (weight if flags.return_scores else rows.pooled(weight)).to(dtype), batch_stats
