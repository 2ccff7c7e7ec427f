"""DIN's target attention over a history: four-way concat, attention MLP, optional softmax, weighted sum-pooling.

Kernels: csrc/cpu/din_attention/forward_kernel.h and _triton/din_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops import _attention_library, _onnx
from rankkernels.ops._activations import number_of
from rankkernels.ops._attention_checks import (
    check,
    check_backward,
    check_values,
    depends_on_values,
    is_joint,
    num_rows,
    out_shape,
    saved_size,
    stats_size,
    takes_statistics,
)
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import check_strided, raise_documented, wide
from rankkernels.ops._jagged import jagged
from rankkernels.ops._library import (
    define,
    has_cpu_kernel,
    has_triton,
    lib,
    only_reference,
    triton_serves,
    without_autocast,
)
from rankkernels.ops._schema import no_gradients, nothing, parsed, schema_of
from rankkernels.ops._table import notice_reference
from rankkernels.ops.attention_params import Flags, Inputs, has_gpu_kernel, unflatten_wide

# ``batch_stats``: in training, mean and unbiased variance of every normalization, in the order of the running ones, one
# after the other in one float32 (or float64) tensor; empty in eval. The caller updates the running statistics.
# ``saved``: what an implementation keeps for its backward, a float32 (or float64) vector of ``saved_size``.
_SIGNATURE = f"{schema_of(Inputs)}, {schema_of(Flags)}"
define(f"din_attention({_SIGNATURE}) -> (Tensor out, Tensor batch_stats, Tensor saved)")
define(
    f"din_attention_backward(Tensor grad_out, Tensor batch_stats, Tensor saved, {_SIGNATURE}) "
    "-> (Tensor grad_history, Tensor grad_target, Tensor[] grad_params)"
)


@torch.library.register_fake("rankkernels::din_attention", lib=lib)
def _(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check("din_attention", inputs, flags)
    empty, accumulated = inputs.history.new_empty, wide(inputs.history.dtype)
    rows = torch.library.get_ctx().new_dynamic_size() if depends_on_values(inputs) else num_rows(inputs)
    sizes = stats_size(inputs.params, flags), saved_size(inputs, flags, rows)
    stats, saved = (empty(n, dtype=accumulated) for n in sizes)
    return empty(out_shape(inputs, flags, rows)), stats, saved


@torch.library.register_fake("rankkernels::din_attention_backward", lib=lib)
def _(grad_out, batch_stats, saved, *arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check_backward(grad_out, batch_stats, saved, inputs, flags, traced=True)
    history, target = inputs.history, inputs.target
    return (
        history.new_empty(history.shape),
        target.new_empty(target.shape),
        [p.new_empty(p.shape) for p in inputs.params],
    )


def _attend(inputs: Inputs, flags: Flags) -> tuple[Tensor, list[reference.BatchStats | None]]:
    torch._check(
        not is_joint(inputs.params, flags),
        lambda: "din_attention: the kernel alone takes statistics of a group's rows, and is differentiable once",
    )
    hidden, out_weight, out_bias = unflatten_wide(inputs, flags)
    return reference.din_attention(
        inputs.history, inputs.target, hidden, out_weight, out_bias, lengths=inputs.lengths, mask=inputs.mask,
        offsets=inputs.offsets, history_index=inputs.history_index, use_softmax=flags.use_softmax,
        count_padding=flags.count_padding, return_scores=flags.return_scores, training=flags.training,
        dropout=flags.dropout, seed=flags.seed,
    )  # fmt: skip


def _reference(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check_strided("din_attention", (*inputs.tensors(), flags.seed))
    check("din_attention", inputs, flags)
    check_values("din_attention", inputs, flags)
    out, all_stats = _attend(inputs, flags)
    flat = [t for stats in all_stats if stats is not None for t in stats]
    history, accumulated = inputs.history, wide(inputs.history.dtype)
    stats = torch.cat(flat).to(accumulated) if flat else history.new_empty(0, dtype=accumulated)
    return out, stats, history.new_zeros(saved_size(inputs, flags, num_rows(inputs)), dtype=accumulated)


@torch.library.impl(lib, "din_attention", "CompositeExplicitAutograd")
def _default(history, *rest):
    notice_reference("din_attention", history)
    return _reference(history, *rest)


@torch.library.impl(lib, "din_attention_backward", "CompositeExplicitAutograd")
def _default_backward(grad_out, batch_stats, saved, *arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check_strided("din_attention_backward", (grad_out, batch_stats, saved, *inputs.tensors(), flags.seed))
    check_backward(grad_out, batch_stats, saved, inputs, flags)
    check_values("din_attention", inputs, flags)

    def forward(history, target, *params):
        out, _ = _attend(inputs._replace(history=history, target=target, params=params), flags)
        return out

    grad_history, grad_target, *grad_params = vjp(forward, grad_out, inputs.history, inputs.target, *inputs.params)
    return grad_history.contiguous(), grad_target.contiguous(), [g.contiguous() for g in grad_params]


def _has_kernel(inputs: Inputs, flags: Flags) -> bool:
    """Whether a GPU's kernels serve these arguments."""
    if not triton_serves(inputs.history):
        return False
    from rankkernels._triton.din_attention import supports

    if takes_statistics(inputs.params, flags) and not (inputs.target.size(0) and inputs.history.numel()):
        return False  # the kernels take no statistics of no rows
    return supports(inputs.history, inputs.params, flags)


def _composed(history: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor] | None:
    """A library's products and ``norm_activation``, on a GPU where no kernel serves."""
    if not history.is_cuda or only_reference:
        return None
    inputs, flags = parsed((history, *rest), Inputs, Flags)
    if _has_kernel(inputs, flags):
        return None
    check("din_attention", inputs, flags)
    accumulated = wide(history.dtype)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)):
        out, batch_stats = _attention_library.attend(inputs, flags)
    return out, batch_stats.to(accumulated), history.new_empty(0, dtype=accumulated)


if has_triton:

    def expanded(inputs: Inputs) -> tuple[tuple, Tensor | None]:
        """The tensors as the kernels take them, a history for each sample, and of which histories (rows, with offsets)
        they are copies. The size of shared jagged ones waits for the device."""
        history, target, lengths, mask, offsets, history_index, *rest = inputs
        copied = history_index
        if history_index is not None:
            numbers = torch.arange(history.size(0), device=history.device)
            copied, *_ = reference.expand_histories(numbers, history_index, None, None, offsets)
            rows = reference.expand_histories(history, history_index, lengths, mask, offsets)
            history, lengths, mask, offsets = rows
        return (history, target, lengths, mask, offsets, *rest), copied

    def summed(grad_history: Tensor, copied: Tensor | None, history: Tensor) -> Tensor:
        """The copies' gradients, added up in a fixed order: ``index_put_`` sorts."""
        if copied is None:
            return grad_history
        grads = reference.accumulator(grad_history)
        sums = grads.new_zeros(history.shape).index_put_((copied,), grads, accumulate=True)
        return sums.to(history.dtype)

    @torch.library.impl(lib, "din_attention", "CUDA")
    def _(*arguments):
        from rankkernels._triton import din_attention as kernels

        inputs, flags = parsed(arguments, Inputs, Flags)
        if (composed := _composed(*arguments)) is not None:
            out, batch_stats, saved = composed
            return out, batch_stats, saved.new_empty(saved_size(inputs, flags, num_rows(inputs)))
        check("din_attention", inputs, flags)
        of_samples, _ = expanded(inputs)
        return kernels.din_attention(*of_samples, flags)

    @torch.library.impl(lib, "din_attention_backward", "CUDA")
    def _(grad_out, batch_stats, saved, *arguments):
        from rankkernels._triton import din_attention as kernels

        inputs, flags = parsed(arguments, Inputs, Flags)
        if not _has_kernel(inputs, flags):
            return _default_backward(grad_out, batch_stats, saved, *arguments)
        check_backward(grad_out, batch_stats, saved, inputs, flags, on_gpu=True)
        of_samples, copied = expanded(inputs)
        grad_history, *grads = kernels.din_attention_backward(grad_out, batch_stats, saved, *of_samples, flags)
        return summed(grad_history, copied, inputs.history), *grads


def _setup_context(ctx, inputs, output):
    inputs, flags = parsed(inputs, Inputs, Flags)
    _, *kept = output
    # In training nothing reads the running statistics, and the caller updates them in place before the backward.
    *ctx.settings, seed, ctx.group = flags
    ctx.num_params, ctx.num_stats = len(inputs.params), len(inputs.running_stats)
    saved = inputs._replace(running_stats=()) if flags.training else inputs
    ctx.save_for_backward(*kept, seed, *saved.tensors())
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as ``saved``


_din_attention_backward = differentiable(torch.ops.rankkernels.din_attention_backward.default, _default_backward)


def _backward(ctx, grad_out, *_):
    batch_stats, saved, seed, history, target, lengths, mask, offsets, history_index, *rest = ctx.saved_tensors
    params, running_stats = rest[: ctx.num_params], rest[ctx.num_params :]
    grad_history, grad_target, grad_params = None, None, nothing(params)
    if grad_out is not None:
        grad_history, grad_target, grad_params = _din_attention_backward(
            grad_out, batch_stats, saved, history, target, lengths, mask, offsets, history_index, params, running_stats,
            *ctx.settings, seed, ctx.group,
        )  # fmt: skip
    grads = Inputs(grad_history, grad_target, None, None, None, None, grad_params, [None] * ctx.num_stats)
    return *grads, *no_gradients(Flags)


def _to_onnx(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    if inputs.offsets is not None or flags.training or flags.dropout:
        out, _ = _attend(inputs, flags)
    else:
        out = _onnx.din_attention(inputs, flags)
    nothing_kept = inputs.history.new_empty(0)
    return out, nothing_kept, nothing_kept


_forward = register_autograd("din_attention", _reference, _backward, _setup_context, _to_onnx, _composed)


# The op's precision is that of ``history``, and what an implementation calls stays in it.
for _op in (torch.ops.rankkernels.din_attention.default, torch.ops.rankkernels.din_attention_backward.default):
    without_autocast(_op)


def _as_linear_takes_it(x: Tensor) -> Tensor:
    """``x`` as ``nn.Linear`` multiplies it on a GPU: under autocast, in its dtype."""
    if x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return x.to(torch.get_autocast_dtype("cuda"))
    return x


def has_joint_kernel(weight: Tensor) -> bool:
    """Whether the device of ``weight`` has a kernel that takes the statistics of several processes' rows."""
    return has_cpu_kernel(weight)


def has_kernel(history: Tensor, *options: bool) -> bool:
    """Whether these options (``has_gpu_kernel``'s) have a kernel on the history's device."""
    return history.is_cpu or has_gpu_kernel(*options)


def din_attention(
    history: Tensor,
    target: Tensor,
    params: Sequence[Tensor],
    running_stats: Sequence[Tensor] = (),
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    history_index: Tensor | None = None,
    activation: str = "dice",
    batch_norm: bool = False,
    use_softmax: bool = False,
    count_padding: bool = False,
    return_scores: bool = False,
    training: bool = False,
    norm_eps: float = 1e-5,
    dice_eps: float = 1e-3,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    group: str = "",
) -> tuple[Tensor, Tensor]:
    """DIN's attention pooling, out_b = sum_l w_l h_l with w_l = MLP([t, h_l, t - h_l, t * h_l]).

    Semantics: ``reference.din_attention``; Zhou et al., "Deep Interest Network" (2018), as torch-rechub's
    ``ActivationUnit``, DeepCTR-Torch's ``AttentionSequencePoolingLayer`` and FuxiCTR's ``DIN_Attention`` compute it.
    The precision is that of ``history``, with float32 accumulation; parameters may be of another dtype. On a GPU
    products have the precision of ``nn.Linear`` beside them: on tensor cores, 16-bit histories in their dtype, float32
    in tf32 where ``torch.set_float32_matmul_precision`` allows it, and under autocast in its dtype.

    Args:
        history: [B, L, D], or with ``offsets`` [N, D], or a nested tensor [B, j, D] of layout torch.jagged.
        target: [B, D], the dtype of ``history``.
        params: for each hidden layer its weight [H, in] and bias [H]; with ``batch_norm`` the normalization's weight
            and bias [H]; then what ``activation`` learns: prelu its slope [1] or [H], dice its alpha [1] or [H],
            dice_batch_norm alpha, weight and bias [H]. At the end the output layer's weight [1, H] and bias [1].
        running_stats: running mean and variance [H] of each normalization, in order; in training, if given, what is
            returned where no row is valid.
        lengths: [B], int32 or int64: the first ``lengths[b]`` rows of sample b are valid.
        mask: [B, L], bool: true at the valid rows.
        offsets: [B + 1], int32 or int64, from 0 to N: sample b has the rows ``offsets[b]:offsets[b + 1]``.
        history_index: [B], int32 or int64, in any order: sample b has history ``history_index[b]`` of U, which are
            [U, L, D] with ``lengths`` [U] or ``mask`` [U, L], or [N, D] with ``offsets`` [U + 1], or nested. Meta's
            IKBO calls it ``cand_to_user_index``. All is as if each sample had a copy: its rows count in the batch
            statistics, its units are dropped by its own number, and a history's gradient is the sum of its samples', in
            a fixed order, zero where it has none. On the CPU no copy is made; on a GPU each sample gets one.
        activation: linear, sigmoid, relu, leakyrelu, prelu, dice (row statistics) or dice_batch_norm.
        batch_norm: a batch normalization after each hidden linear layer.
        use_softmax: softmax of the scores over each sample's valid rows.
        count_padding: whether padding (what ``lengths`` or ``mask`` leave out) is in the batch statistics like any row,
            and gets a gradient from there; and whether the softmax of a sample without valid rows is uniform over its
            padding. Otherwise padding is as if it were not there. Where there is a valid row it never has a weight.
        return_scores: the rows' weights in the sum, in place of the sum.
        training: normalize with the statistics of the batch's valid rows.
        norm_eps: epsilon of the batch normalization.
        dice_eps: epsilon of Dice.
        dropout: probability of dropping a unit behind each hidden layer's activation; the others are scaled by
            1 / (1 - dropout), as torch does it. It applies wherever it is not 0, in eval too.
        seed: [] or [1], int64, needed with dropout: the units dropped are a function of it, of the unit, the row's
            position in its sample, the sample and the layer (``reference.dropout_factor``), so the same in every form
            of the history.
        group: the name of a process group (``torch.distributed``'s ``group_name``): ``training`` normalizes with the
            statistics of the valid rows of all its processes, which all call the op, and its backward. A process may
            have no row. On the CPU alone, and differentiable once.

    Returns:
        out [B, D] in the dtype of ``history`` (zeros where a sample has no valid row), or the scores [B, L], zero at
        padding that has none; with ``offsets`` the scores are [N], those of all samples one after the other (with
        ``history_index`` sample b's begin behind the ``offsets.diff()[history_index[:b]].sum()`` of those before it).
        And in training the mean and unbiased variance of each normalization, one after the other; no running statistic
        is written.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, two of lengths, mask and offsets at once, an epsilon or
            a dropout out of its range, dropout without a seed, a process of ``group`` that does not come.
        ValueError: a nested history of another form, lengths outside 0 .. L, offsets that decrease or do not run from
            0 to N, one valid row in training with a normalization.
        IndexError: a value of ``history_index`` outside 0 .. U - 1.
    """
    number = number_of("din_attention", activation)
    history, offsets = jagged(history, offsets)
    if not running_stats and torch.compiler.is_exporting():  # AOTInductor makes None of an empty list
        running_stats = [history.new_empty(0)]
    dtype, history, target = history.dtype, _as_linear_takes_it(history), _as_linear_takes_it(target)
    with raise_documented():
        out, batch_stats, _ = _forward(
            history, target, lengths, mask, offsets, history_index, list(params), list(running_stats), number,
            batch_norm, use_softmax, count_padding, return_scores, training, norm_eps, dice_eps, dropout, seed,
            group,
        )  # fmt: skip
    return out.to(dtype), batch_stats
