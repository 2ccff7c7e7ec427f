"""What DIN's attention checks before it reads anything, in the words of csrc/cpu/din_attention/checks.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankkernels.ops._activations import check_activation
from rankkernels.ops._checks import (
    FLOATING,
    check_epsilon,
    check_form,
    check_indices,
    check_one_device,
    check_positions,
    wide,
)
from rankkernels.ops._tracing import is_traced, is_transformed
from rankkernels.ops.attention_params import (
    Flags,
    Inputs,
    hidden_widths,
    norms_per_layer,
    params_per_layer,
    saved_size_on_gpu,
)

_FLOATING = "float32, float64, float16 or bfloat16"


def check(op: str, inputs: Inputs, flags: Flags) -> None:
    """Ranks, sizes, dtypes and devices, everything that needs no value."""
    check_activation(op, flags.activation)
    check_history(op, inputs)
    _check_history_dtypes(op, inputs)
    _check_params(op, inputs, flags)
    seed, dropout = flags.seed, flags.dropout
    torch._check(0 <= dropout <= 1, lambda: f"{op}: dropout must be a probability, got {dropout:g}")
    torch._check(
        dropout == 0 or (seed is not None and seed.numel() == 1 and seed.dtype == torch.int64),
        lambda: (
            f"{op}: dropout needs a seed of one int64, got "
            f"{'none' if seed is None else f'{list(seed.shape)} {seed.dtype}'}"
        ),
    )
    device = inputs.history.device
    torch._check(
        device.type == "cpu" or not is_joint(inputs.params, flags),
        lambda: f"{op}: statistics of a group's rows are taken on the CPU alone, got {device}",
    )
    check_one_device(op, device, (*inputs.tensors(), seed))


def check_history(op: str, inputs: Inputs) -> None:
    """Shapes of history and target, and what says which rows are valid."""
    check, (history, target, lengths, mask, offsets, history_index, *_) = torch._check, inputs
    given = [n for n in ("lengths", "mask", "offsets") if getattr(inputs, n) is not None]
    check(len(given) < 2, lambda: f"{op}: give one of lengths, mask and offsets, got {' and '.join(given)}")
    check(target.dim() == 2, lambda: f"{op}: target must be [B, D], got shape {list(target.shape)}")
    n = "B" if history_index is None else "U"
    rank, form = (2, "[N, D] beside offsets") if offsets is not None else (3, f"[{n}, L, D]")
    check(history.dim() == rank, lambda: f"{op}: history must be {form}, got shape {list(history.shape)}")
    D, B = history.size(-1), target.size(0)
    check(D == target.size(1), lambda: f"{op}: history and target must have one width D, got {D} and {target.size(1)}")
    U = B if history_index is None else history.size(0)
    if history_index is not None:
        check_indices(op, "history_index", history_index, B, "B")
    elif offsets is None:
        check(
            history.size(0) == B,
            lambda: f"{op}: history and target must have one batch size B, got {history.size(0)} and {B}",
        )
    if lengths is not None:
        check_indices(op, "lengths", lengths, U, n)
    if mask is not None:
        L = history.size(1)
        fits = mask.dim() == 2 and mask.size(0) == U and mask.size(1) == L
        check(fits, lambda: f"{op}: mask must be [{n}, L] = [{U}, {L}], got shape {list(mask.shape)}")
        check(mask.dtype == torch.bool, lambda: f"{op}: mask must be bool, true at valid rows, got {mask.dtype}")
    if offsets is not None:
        fits = history_index is None or (offsets.dim() == 1 and offsets.size(0) > 0)
        check(fits, lambda: f"{op}: offsets must be [U + 1], got shape {list(offsets.shape)}")
        check_indices(op, "offsets", offsets, B + 1 if history_index is None else offsets.size(0), f"{n} + 1")


def _check_history_dtypes(op: str, inputs: Inputs) -> None:
    check, history, target = torch._check, inputs.history, inputs.target
    check(history.dtype in FLOATING, lambda: f"{op}: history must be {_FLOATING}, got {history.dtype}")
    check(
        history.dtype == target.dtype,
        lambda: f"{op}: history and target must have one dtype, got {history.dtype} and {target.dtype}",
    )


def _check_params(op: str, inputs: Inputs, flags: Flags) -> None:
    """The attention MLP: how many tensors, and the shape of each."""
    check, params, running_stats = torch._check, inputs.params, inputs.running_stats
    per_layer, norms = (f(flags.name, flags.batch_norm) for f in (params_per_layer, norms_per_layer))
    layers, rest = divmod(len(params) - 2, per_layer)
    check(
        layers >= 0 and rest == 0,
        lambda: f"{op}: params must be {per_layer} tensors a hidden layer and 2 of the output layer, got {len(params)}",
    )
    for name, tensors in (("params", params), ("running_stats", running_stats)):
        for i, t in enumerate(tensors):
            check(t.dtype in FLOATING, lambda: f"{op}: {name}[{i}] must be {_FLOATING}, got {t.dtype}")
    none = not running_stats or (len(running_stats) == 1 and running_stats[0].numel() == 0)
    check(
        (none and (flags.training or not norms)) or len(running_stats) == 2 * norms * layers,
        lambda: f"{op}: running_stats must hold 2 tensors for each of {norms * layers} norms, got {len(running_stats)}",
    )
    *hidden, out_weight, out_bias = params
    width = 4 * inputs.history.size(-1)
    for i in range(layers):
        width = _check_layer(op, i, hidden[i * per_layer : (i + 1) * per_layer], width, flags.name)
        for j in () if none else range(2 * norms * i, 2 * norms * (i + 1)):
            t = running_stats[j]
            fits = t.dim() == 1 and t.size(0) == width
            check(fits, lambda: f"{op}: running_stats[{j}] must be [{width}], got {list(t.shape)}")
    shape = out_weight.shape
    check(
        len(shape) == 2 and shape[0] == 1 and shape[1] == width and out_bias.numel() == 1,
        lambda: (
            f"{op}: the output layer must be [1, {width}] with a bias [1], got {list(shape)} and {list(out_bias.shape)}"
        ),
    )
    if layers and flags.batch_norm:
        check_epsilon(op, "norm_eps", flags.norm_eps, flags.training)
    if layers and flags.name in ("dice", "dice_batch_norm"):
        check_epsilon(op, "dice_eps", flags.dice_eps, flags.training and flags.name == "dice_batch_norm")


def _check_layer(op: str, i: int, layer: list[Tensor], width: int, activation: str) -> int:
    """Hidden layer ``i``, whose input is ``width`` wide. -> its units."""
    weight, *vectors = layer
    torch._check(
        weight.dim() == 2 and weight.size(1) == width,
        lambda: f"{op}: the weight of hidden layer {i} must be [H, {width}], got shape {list(weight.shape)}",
    )
    H = weight.size(0)
    for k, v in enumerate(vectors, 1):
        slope = activation in ("prelu", "dice") and k == len(vectors)
        torch._check(
            v.dim() == 1 and (v.size(0) == H or (slope and v.size(0) == 1)),
            lambda: (
                f"{op}: hidden layer {i} needs vectors of {H} values{', its slope may have one' if slope else ''}, got "
                f"{list(v.shape)}"
            ),
        )
    return H


def check_positions_at_hand(op: str, inputs: Inputs) -> None:
    """``check_positions``, where reading them waits for no device and no one follows."""
    positions = [t for t in (inputs.lengths, inputs.offsets, inputs.history_index) if t is not None]
    at_hand = all(type(t) is Tensor and t.is_cpu for t in positions)
    if positions and at_hand and not (is_traced() or is_transformed()):
        check_positions(op, inputs.history, inputs.lengths, inputs.offsets, inputs.history_index)


def check_values(op: str, inputs: Inputs, flags: Flags) -> None:
    """``check_positions``, and how many rows there are to take statistics of."""
    history, _, lengths, mask, offsets, history_index, params, _ = inputs
    check_positions(op, history, lengths, offsets, history_index)
    if takes_statistics(params, flags):
        valid = num_rows(inputs)
        if not flags.count_padding and (lengths is not None or mask is not None):
            valid = mask.sum(1) if lengths is None else lengths
            valid = int((valid if history_index is None else valid[history_index]).sum())
        if valid == 1:
            raise ValueError(f"{op}: training needs more than one valid row to take statistics of, got {valid}")


def depends_on_values(inputs: Inputs) -> bool:
    """Whether only values say how many rows all samples have together: those of jagged histories that are shared."""
    return inputs.offsets is not None and inputs.history_index is not None


def num_rows(inputs: Inputs) -> int:
    """The rows of all samples together, padding included."""
    history, target, history_index = inputs.history, inputs.target, inputs.history_index
    if history_index is None:
        return math.prod(history.shape[:-1])  # Size.numel would make an int of a size that is unknown in a graph
    if inputs.offsets is None:
        return target.size(0) * history.size(1)
    return int(inputs.offsets.diff()[history_index].sum())


def out_shape(inputs: Inputs, flags: Flags, rows: int | None) -> tuple[int, ...]:
    """The pooled rows' [B, D], or the scores': [B, L], or of jagged histories [rows]."""
    if not flags.return_scores:
        return tuple(inputs.target.shape)
    return (rows,) if inputs.offsets is not None else (inputs.target.size(0), inputs.history.size(1))


def stats_size(params: list[Tensor], flags: Flags) -> int:
    """The values of ``batch_stats``."""
    norms = norms_per_layer(flags.name, flags.batch_norm)
    return 2 * norms * sum(hidden_widths(params, flags)) if flags.training else 0


def takes_statistics(params: list[Tensor], flags: Flags) -> bool:
    """Whether the batch's rows give those of a normalization."""
    return len(params) > 2 and flags.training and norms_per_layer(flags.name, flags.batch_norm) > 0


def is_joint(params: list[Tensor], flags: Flags) -> bool:
    """Whether the rows of several processes do."""
    return flags.group != "" and takes_statistics(params, flags)


def saved_size(inputs: Inputs, flags: Flags, rows: int, on_gpu: bool | None = None) -> int:
    """The values of ``saved``. On the CPU, of a row: its weight in the sum; in training Dice's two statistics in each
    layer, and z of the normalized layers (of the first only if all widths together are at most 4 D); and at the end the
    number of rows in joint statistics. On a GPU: ``saved_size_on_gpu``."""
    history, target, *_, params, _ = inputs
    values, widths = 1, hidden_widths(params, flags)
    if history.device.type == "cuda" if on_gpu is None else on_gpu:
        return saved_size_on_gpu(*target.shape, widths, rows, flags.use_softmax)
    if flags.training and flags.name == "dice":
        values += 2 * len(widths)
    if flags.training and norms_per_layer(flags.name, flags.batch_norm):
        values += sum(widths if sum(widths) <= 4 * target.size(1) else widths[1:])
    return rows * values + is_joint(params, flags)


def check_backward(
    grad_out: Tensor,
    batch_stats: Tensor,
    saved: Tensor,
    inputs: Inputs,
    flags: Flags,
    on_gpu: bool | None = None,
    traced: bool = False,
) -> None:
    """``traced``: no value can be read."""
    check("din_attention", inputs, flags)
    op, history, kept = "din_attention_backward", inputs.history, wide(inputs.history.dtype)
    rows = None if traced and depends_on_values(inputs) else num_rows(inputs)
    if rows is not None or not flags.return_scores:
        check_form(op, "grad_out", grad_out, out_shape(inputs, flags, rows), history.dtype, history.device)
    check_form(op, "batch_stats", batch_stats, (stats_size(inputs.params, flags),), kept, history.device)
    if rows is not None:
        check_form(op, "saved", saved, (saved_size(inputs, flags, rows, on_gpu),), kept, history.device)
