"""DIN's target attention over a history: four-way concat, attention MLP, optional softmax, weighted sum-pooling.

Kernels: csrc/cpu/din_attention/forward_kernel.h and _triton/din_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._library import (
    FLOATING,
    check_epsilon,
    check_form,
    check_strided,
    differentiable,
    has_triton,
    lib,
    notice_reference,
    raise_documented,
    register_autograd,
    vjp,
    wide,
)

# ``params``: for each hidden layer its weight [H, in] and bias [H]; with ``batch_norm`` the norm's weight and bias [H];
# what the activation learns (ACTIVATIONS); and at the end the output layer's weight [1, H] and bias [1].
# ``running_stats``: the running mean and variance [H] of every normalization, in the order the layers meet them; a
# layer's own comes before its Dice's. ``batch_stats``: in training, mean and unbiased variance of each of them in the
# same order, one after the other in one float32 (or float64) tensor; empty in eval. The caller updates the running
# statistics.
# ``activation``: its place in ACTIVATIONS (a str argument of a C++ op leaks a copy at every call, torch 2.13).
# ``dropout``: the probability of dropping a unit behind the activation of each hidden layer; ``seed``: an int64 scalar
# that chooses which (``reference.dropout_factor``), drawn by the caller, so that the same call gives the same bits and
# the backward draws the same units again; unused without dropout.
# ``saved``: what an implementation keeps for its backward, a float32 (or float64) vector of ``saved_size``.
_SIGNATURE = (
    "Tensor history, Tensor target, Tensor? lengths, Tensor? mask, Tensor? offsets, Tensor[] params, "
    "Tensor[] running_stats, int activation, bool batch_norm, bool use_softmax, bool training, float norm_eps, "
    "float dice_eps, float dropout, Tensor? seed"
)
lib.define(f"din_attention({_SIGNATURE}) -> (Tensor out, Tensor batch_stats, Tensor saved)")
lib.define(
    f"din_attention_backward(Tensor grad_out, Tensor batch_stats, Tensor saved, {_SIGNATURE}) "
    "-> (Tensor grad_history, Tensor grad_target, Tensor[] grad_params)"
)

#: Activations of the hidden layers, and how many tensors each adds to ``params`` per layer: prelu its slope and dice
#: its alpha, [1] or [H]; dice_batch_norm alpha, weight and bias [H] of its normalization.
ACTIVATIONS = {"linear": 0, "sigmoid": 0, "relu": 0, "leakyrelu": 0, "prelu": 1, "dice": 1, "dice_batch_norm": 3}
_NAMES = list(ACTIVATIONS)


def check_activation(op: str, activation: int) -> None:
    last = len(_NAMES) - 1
    torch._check(0 <= activation <= last, lambda: f"{op}: activation must be 0 .. {last}, got {activation}")


def params_per_layer(activation: str, batch_norm: bool) -> int:
    return 2 + 2 * batch_norm + ACTIVATIONS[activation]


def norms_per_layer(activation: str, batch_norm: bool) -> int:
    return batch_norm + (activation == "dice_batch_norm")


def unflatten(
    params: Sequence[Tensor],
    running_stats: Sequence[Tensor],
    activation: str,
    batch_norm: bool,
    norm_eps: float,
    dice_eps: float,
) -> tuple[list[reference.Hidden], Tensor, Tensor]:
    """The flat lists of the schema as the reference's hidden layers, output weight and output bias."""
    params, stats, hidden = list(params), list(running_stats), []

    def norm(weight: Tensor, bias: Tensor, eps: float) -> reference.BatchNorm:
        mean, var = (stats.pop(0), stats.pop(0)) if stats else (None, None)
        return reference.BatchNorm(weight, bias, mean, var, eps)

    per_layer = params_per_layer(activation, batch_norm)
    while len(params) > 2:
        layer, params = params[:per_layer], params[per_layer:]
        weight, bias = layer.pop(0), layer.pop(0)
        layer_norm = norm(layer.pop(0), layer.pop(0), norm_eps) if batch_norm else None
        alpha = layer.pop(0) if layer else None
        dice_norm = norm(layer.pop(0), layer.pop(0), dice_eps) if layer else None
        hidden.append(reference.Hidden(weight, bias, layer_norm, activation, alpha, dice_norm, dice_eps))
    return hidden, params[0], params[1]


def _check(op, history, target, lengths, mask, offsets, params, running_stats, flags):
    """Ranks, sizes, dtypes and devices, everything that needs no value; the texts are those of
    csrc/cpu/din_attention/checks.h."""
    check = torch._check
    check_activation(op, flags.activation)
    given = [n for n, t in (("lengths", lengths), ("mask", mask), ("offsets", offsets)) if t is not None]
    check(len(given) < 2, lambda: f"{op}: give one of lengths, mask and offsets, got {' and '.join(given)}")
    check(target.dim() == 2, lambda: f"{op}: target must be [B, D], got shape {list(target.shape)}")
    rank, form = (2, "[N, D] beside offsets") if offsets is not None else (3, "[B, L, D]")
    check(history.dim() == rank, lambda: f"{op}: history must be {form}, got shape {list(history.shape)}")
    check(
        history.size(-1) == target.size(1),
        lambda: f"{op}: history and target must have one width D, got {history.size(-1)} and {target.size(1)}",
    )
    check(
        history.dtype in FLOATING,
        lambda: f"{op}: history must be float32, float64, float16 or bfloat16, got {history.dtype}",
    )
    check(
        history.dtype == target.dtype,
        lambda: f"{op}: history and target must have one dtype, got {history.dtype} and {target.dtype}",
    )
    B = target.size(0)
    if offsets is None:
        L = history.size(1)
        check(
            history.size(0) == B,
            lambda: f"{op}: history and target must have one batch size B, got {history.size(0)} and {B}",
        )
        if lengths is not None:
            check(
                lengths.dim() == 1 and lengths.size(0) == B,
                lambda: f"{op}: lengths must be [B] = [{B}], got shape {list(lengths.shape)}",
            )
        if mask is not None:
            check(
                mask.dim() == 2 and mask.size(0) == B and mask.size(1) == L,
                lambda: f"{op}: mask must be [B, L] = [{B}, {L}], got shape {list(mask.shape)}",
            )
            check(mask.dtype == torch.bool, lambda: f"{op}: mask must be bool, true at valid rows, got {mask.dtype}")
    else:
        check(
            offsets.dim() == 1 and offsets.size(0) == B + 1,
            lambda: f"{op}: offsets must be [B + 1] = [{B + 1}], got shape {list(offsets.shape)}",
        )
    for name, t in (("lengths", lengths), ("offsets", offsets)):
        if t is not None:
            check(t.dtype in (torch.int32, torch.int64), lambda: f"{op}: {name} must be int32 or int64, got {t.dtype}")
    activation, batch_norm, training, seed = flags.name, flags.batch_norm, flags.training, flags.seed
    per_layer = params_per_layer(activation, batch_norm)
    layers, rest = divmod(len(params) - 2, per_layer)
    check(
        layers >= 0 and rest == 0,
        lambda: f"{op}: params must be {per_layer} tensors a hidden layer and 2 of the output layer, got {len(params)}",
    )
    for name, tensors in (("params", params), ("running_stats", running_stats)):
        for i, t in enumerate(tensors):
            check(
                t.dtype in FLOATING,
                lambda: f"{op}: {name}[{i}] must be float32, float64, float16 or bfloat16, got {t.dtype}",
            )
    norms = norms_per_layer(activation, batch_norm)
    check(
        training or len(running_stats) == 2 * norms * layers,
        lambda: f"{op}: running_stats must hold 2 tensors for each of {norms * layers} norms, got {len(running_stats)}",
    )
    width = 4 * history.size(-1)
    for i in range(layers):
        weight, *vectors = params[i * per_layer : (i + 1) * per_layer]
        check(
            weight.dim() == 2 and weight.size(1) == width,
            lambda: f"{op}: the weight of hidden layer {i} must be [H, {width}], got shape {list(weight.shape)}",
        )
        width = weight.size(0)
        for v in vectors:
            slope = activation in ("prelu", "dice") and v is vectors[-1]
            check(
                v.dim() == 1 and (v.size(0) == width or (slope and v.size(0) == 1)),
                lambda: (
                    f"{op}: hidden layer {i} needs vectors of {width} values"
                    f"{', its slope may have one' if slope else ''}, got {list(v.shape)}"
                ),
            )
        for j in () if training else range(2 * norms * i, 2 * norms * (i + 1)):
            t = running_stats[j]
            check(
                t.dim() == 1 and t.size(0) == width,
                lambda: f"{op}: running_stats[{j}] must be [{width}], got {list(t.shape)}",
            )
    weight, bias = params[-2:]
    check(
        weight.dim() == 2 and weight.size(0) == 1 and weight.size(1) == width and bias.numel() == 1,
        lambda: (
            f"{op}: the output layer must be [1, {width}] with a bias [1], got {list(weight.shape)} "
            f"and {list(bias.shape)}"
        ),
    )
    if layers and batch_norm:
        check_epsilon(op, "norm_eps", flags.norm_eps, training)
    if layers and activation in ("dice", "dice_batch_norm"):
        check_epsilon(op, "dice_eps", flags.dice_eps, training and activation == "dice_batch_norm")
    check(0 <= flags.dropout <= 1, lambda: f"{op}: dropout must be a probability, got {flags.dropout:g}")
    check(
        flags.dropout == 0 or (seed is not None and seed.numel() == 1 and seed.dtype == torch.int64),
        lambda: (
            f"{op}: dropout needs a seed of one int64, got "
            f"{'none' if seed is None else f'{list(seed.shape)} {seed.dtype}'}"
        ),
    )
    for t in (target, lengths, mask, offsets, seed, *params, *running_stats):
        if t is not None:
            check(
                t.device == history.device,
                lambda: f"{op}: all arguments must be on one device, got {history.device} and {t.device}",
            )


def _check_values(op, history, lengths, mask, offsets, params, flags):
    """Lengths and offsets against the history they describe, and how many rows there are to take statistics of: reads
    the values, so not where that would synchronize."""
    if lengths is not None and lengths.numel():
        L = history.size(1)
        bad = (lengths < 0) | (lengths > L)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(f"{op}: lengths[{i}] = {int(lengths[i])} is outside 0 .. {L}, the history's positions")
    if offsets is not None:
        N = history.size(0)
        if int(offsets[0]) != 0 or int(offsets[-1]) != N:
            raise ValueError(f"{op}: offsets must run from 0 to N = {N}, got {int(offsets[0])} .. {int(offsets[-1])}")
        down = (offsets[1:] < offsets[:-1]).nonzero()  # and not their differences, which may overflow
        if down.numel():
            i = int(down[0])
            raise ValueError(f"{op}: offsets decrease from {int(offsets[i])} to {int(offsets[i + 1])} at {i + 1}")
    if len(params) > 2 and flags.training and norms_per_layer(flags.name, flags.batch_norm):
        valid = history.shape[:-1].numel()
        if lengths is not None or mask is not None:
            valid = int((mask if lengths is None else lengths).sum())
        if valid < 2:
            raise ValueError(f"{op}: training needs more than one valid row to take statistics of, got {valid}")


class Flags(NamedTuple):
    """The end of the schema, behind the tensors."""

    activation: int
    batch_norm: bool
    use_softmax: bool
    training: bool
    norm_eps: float
    dice_eps: float
    dropout: float
    seed: Tensor | None

    @property
    def name(self) -> str:
        return _NAMES[self.activation]


def _stats_size(params, flags):
    if not flags.training:
        return 0
    per_layer = params_per_layer(flags.name, flags.batch_norm)
    widths = sum(p.size(0) for p in params[:-2:per_layer])
    return 2 * widths * norms_per_layer(flags.name, flags.batch_norm)


def saved_size(history, target, params, flags, on_gpu: bool | None = None):
    """The weight of each row in the sum and, in training, Dice's two statistics of the row in each layer and z of the
    normalized layers, of the first where all widths together are at most 4 D. On a GPU the
    score of each row, and with a softmax the sum in float32, the scores' peak and their total of each sample."""
    rows = math.prod(history.shape[:-1])  # Size.numel would make an int of a size that is unknown in a graph
    if history.device.type == "cuda" if on_gpu is None else on_gpu:
        return rows + (target.size(0) * (target.size(1) + 2) if flags.use_softmax else 0)
    per_layer = params_per_layer(flags.name, flags.batch_norm)
    width, layers = 1, (len(params) - 2) // per_layer
    if flags.training and flags.name == "dice":
        width += 2 * layers
    if flags.training and norms_per_layer(flags.name, flags.batch_norm):
        widths = [p.size(0) for p in params[:-2:per_layer]]
        width += sum(widths if sum(widths) <= 4 * target.size(1) else widths[1:])
    return rows * width


def _check_backward(
    grad_out, batch_stats, saved, history, target, lengths, mask, offsets, params, running_stats, flags, on_gpu=None
):
    _check("din_attention", history, target, lengths, mask, offsets, params, running_stats, flags)
    op, kept, device = "din_attention_backward", wide(history.dtype), history.device
    check_form(op, "grad_out", grad_out, target.shape, history.dtype, device)
    check_form(op, "batch_stats", batch_stats, (_stats_size(params, flags),), kept, device)
    check_form(op, "saved", saved, (saved_size(history, target, params, flags, on_gpu),), kept, device)


@torch.library.register_fake("rankkernels::din_attention", lib=lib)
def _(history, target, lengths, mask, offsets, params, running_stats, *flags):
    flags = Flags(*flags)
    _check("din_attention", history, target, lengths, mask, offsets, params, running_stats, flags)
    stats = history.new_empty(_stats_size(params, flags), dtype=wide(history.dtype))
    saved = history.new_empty(saved_size(history, target, params, flags), dtype=wide(history.dtype))
    return target.new_empty(target.shape), stats, saved


@torch.library.register_fake("rankkernels::din_attention_backward", lib=lib)
def _(grad_out, batch_stats, saved, history, target, lengths, mask, offsets, params, running_stats, *flags):
    tensors = history, target, lengths, mask, offsets, params, running_stats
    _check_backward(grad_out, batch_stats, saved, *tensors, Flags(*flags))
    return history.new_empty(history.shape), target.new_empty(target.shape), [p.new_empty(p.shape) for p in params]


def _din_attention(history, target, lengths, mask, offsets, params, running_stats, flags):
    params, running_stats = ([t.to(wide(history.dtype)) for t in tensors] for tensors in (params, running_stats))
    hidden, out_weight, out_bias = unflatten(
        params, running_stats, flags.name, flags.batch_norm, flags.norm_eps, flags.dice_eps
    )
    return reference.din_attention(
        history, target, hidden, out_weight, out_bias, lengths=lengths, mask=mask, offsets=offsets,
        use_softmax=flags.use_softmax, training=flags.training, dropout=flags.dropout, seed=flags.seed,
    )  # fmt: skip


def _reference(history, target, lengths, mask, offsets, params, running_stats, *flags):
    flags = Flags(*flags)
    check_strided("din_attention", (history, target, lengths, mask, offsets, flags.seed, *params, *running_stats))
    _check("din_attention", history, target, lengths, mask, offsets, params, running_stats, flags)
    _check_values("din_attention", history, lengths, mask, offsets, params, flags)
    out, all_stats = _din_attention(history, target, lengths, mask, offsets, params, running_stats, flags)
    flat = [t for stats in all_stats if stats is not None for t in stats]
    kept = wide(history.dtype)
    stats = torch.cat(flat).to(kept) if flat else history.new_empty(0, dtype=kept)
    return out, stats, history.new_zeros(saved_size(history, target, params, flags), dtype=kept)


@torch.library.impl(lib, "din_attention", "CompositeExplicitAutograd")
def _default(history, *rest):
    notice_reference("din_attention", history)
    return _reference(history, *rest)


@torch.library.impl(lib, "din_attention_backward", "CompositeExplicitAutograd")
def _default_backward(
    grad_out, batch_stats, saved, history, target, lengths, mask, offsets, params, running_stats, *flags
):
    flags = Flags(*flags)
    tensors = lengths, mask, offsets, params, running_stats
    check_strided(
        "din_attention_backward",
        (grad_out, batch_stats, saved, history, target, lengths, mask, offsets, flags.seed, *params, *running_stats),
    )
    _check_backward(grad_out, batch_stats, saved, history, target, *tensors, flags)
    _check_values("din_attention", history, lengths, mask, offsets, params, flags)

    def forward(history, target, *params):
        return _din_attention(history, target, lengths, mask, offsets, params, running_stats, flags)[0]

    grad_history, grad_target, *grad_params = vjp(forward, grad_out, history, target, *params)
    return grad_history.contiguous(), grad_target.contiguous(), [g.contiguous() for g in grad_params]


if has_triton:

    def _kernels(history, params, flags):
        """The Triton kernels, where they serve these arguments."""
        from rankkernels._triton import din_attention as kernels

        return kernels if kernels.supports(history, params, flags) else None

    @torch.library.impl(lib, "din_attention", "CUDA")
    def _(history, target, lengths, mask, offsets, params, running_stats, *flags):
        flags = Flags(*flags)
        tensors = history, target, lengths, mask, offsets, params, running_stats
        kernels = _kernels(history, params, flags)
        if kernels is None:
            return _default(*tensors, *flags)
        _check("din_attention", *tensors, flags)
        return kernels.din_attention(*tensors, flags)

    @torch.library.impl(lib, "din_attention_backward", "CUDA")
    def _(grad_out, batch_stats, saved, history, target, lengths, mask, offsets, params, running_stats, *flags):
        flags = Flags(*flags)
        tensors = history, target, lengths, mask, offsets, params, running_stats
        kernels = _kernels(history, params, flags)
        if kernels is None:
            return _default_backward(grad_out, batch_stats, saved, *tensors, *flags)
        _check_backward(grad_out, batch_stats, saved, *tensors, flags, on_gpu=True)
        return kernels.din_attention_backward(grad_out, batch_stats, saved, *tensors, flags)


def _setup_context(ctx, inputs, output):
    history, target, lengths, mask, offsets, params, running_stats, *ctx.flags, seed = inputs
    ctx.num_params, ctx.num_stats = len(params), len(running_stats)
    training = Flags(*ctx.flags, seed).training
    # In training nothing reads the running statistics, and the caller updates them in place before the backward.
    saved_stats = [] if training else running_stats
    ctx.save_for_backward(*output[1:], history, target, lengths, mask, offsets, seed, *params, *saved_stats)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for ``saved``, as large as it


_din_attention_backward = differentiable(torch.ops.rankkernels.din_attention_backward.default, _default_backward)


def _backward(ctx, grad_out, *_):
    batch_stats, saved, history, target, lengths, mask, offsets, seed, *rest = ctx.saved_tensors
    params, running_stats = rest[: ctx.num_params], rest[ctx.num_params :]
    nothing = [None] * ctx.num_stats, *[None] * len(Flags._fields)
    if grad_out is None:
        return *[None] * 5, [None] * ctx.num_params, *nothing
    grad_history, grad_target, grad_params = _din_attention_backward(
        grad_out, batch_stats, saved, history, target, lengths, mask, offsets, params, running_stats, *ctx.flags, seed
    )
    return grad_history, grad_target, None, None, None, grad_params, *nothing


_forward = register_autograd("din_attention", _reference, _backward, _setup_context)


def _without_autocast(op: torch._ops.OpOverload, key: str):
    def run(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return op(*arguments)

    return run


# Autocast changes nothing: the precision is that of ``history``, and what an implementation calls stays in it.
for _op in (torch.ops.rankkernels.din_attention.default, torch.ops.rankkernels.din_attention_backward.default):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        lib.impl(_op.name().removeprefix("rankkernels::"), _without_autocast(_op, _key), _key)


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


def din_attention(
    history: Tensor,
    target: Tensor,
    params: Sequence[Tensor],
    running_stats: Sequence[Tensor] = (),
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    activation: str = "dice",
    batch_norm: bool = False,
    use_softmax: bool = False,
    training: bool = False,
    norm_eps: float = 1e-5,
    dice_eps: float = 1e-3,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """DIN's attention pooling, out_b = sum_l w_l h_l with w_l = MLP([t, h_l, t - h_l, t * h_l]).

    Semantics: ``reference.din_attention``; Zhou et al., "Deep Interest Network" (2018), as torch-rechub's
    ``ActivationUnit``, DeepCTR-Torch's ``AttentionSequencePoolingLayer`` and FuxiCTR's ``DIN_Attention`` compute it.
    The precision is that of ``history``, with float32 accumulation; parameters may be of another dtype.

    Args:
        history: [B, L, D], or with ``offsets`` [N, D], or a nested tensor [B, j, D] of layout torch.jagged.
        target: [B, D], the dtype of ``history``.
        params: for each hidden layer its weight [H, in] and bias [H]; with ``batch_norm`` the normalization's weight
            and bias [H]; then what ``activation`` learns: prelu its slope [1] or [H], dice its alpha [1] or [H],
            dice_batch_norm alpha, weight and bias [H]. At the end the output layer's weight [1, H] and bias [1].
        running_stats: running mean and variance [H] of each normalization, in order; unused in training.
        lengths: [B], int32 or int64: the first ``lengths[b]`` rows of sample b are valid.
        mask: [B, L], bool: true at the valid rows.
        offsets: [B + 1], int32 or int64, from 0 to N: sample b has the rows ``offsets[b]:offsets[b + 1]``.
        activation: linear, sigmoid, relu, leakyrelu, prelu, dice (row statistics) or dice_batch_norm.
        batch_norm: a batch normalization after each hidden linear layer.
        use_softmax: softmax of the scores over each sample's valid rows.
        training: normalize with the statistics of the batch's valid rows.
        norm_eps, dice_eps: epsilons of the batch normalization and of Dice.
        dropout: probability of dropping a unit behind each hidden layer's activation; the others are scaled by
            1 / (1 - dropout), as torch does it. It applies wherever it is not 0, in eval too.
        seed: [] or [1], int64, needed with dropout: the units dropped are a function of it, of the unit, the row's
            position in its sample, the sample and the layer (``reference.dropout_factor``), so the same in every form
            of the history.

    Returns:
        out [B, D] in the dtype of ``history`` (zeros where a sample has no valid row), and in training the mean and
        unbiased variance of each normalization, one after the other; no running statistic is written.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, two of lengths, mask and offsets at once, an epsilon or
            a dropout out of its range, dropout without a seed.
        ValueError: a nested history of another form, lengths outside 0 .. L, offsets that decrease or do not run from
            0 to N, fewer than two valid rows in training with a normalization.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"din_attention: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    history, offsets = jagged(history, offsets)
    with raise_documented():
        out, batch_stats, _ = _forward(
            history, target, lengths, mask, offsets, list(params), list(running_stats), _NAMES.index(activation),
            batch_norm, use_softmax, training, norm_eps, dice_eps, dropout, seed,
        )  # fmt: skip
    return out, batch_stats
