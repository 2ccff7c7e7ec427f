"""Batch normalization and activation of a hidden layer. Kernels: csrc/cpu/dense/norm_activation_kernel.h and
_triton/norm_activation.py."""

from __future__ import annotations

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
    is_exporting_to_onnx,
    lib,
    notice_reference,
    register_autograd,
    vjp,
    wide,
)
from rankkernels.ops.din_attention import ACTIVATIONS, check_activation

# ``activation``: its place in ACTIVATIONS. ``batch_stats``: in training with a normalization the batch's mean and its
# unbiased variance, [2 H] in float32 (or float64), else empty; the caller updates the running statistics.
# ``grad_params``: gradients of those of weight, bias and alpha that were given.
_SIGNATURE = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? alpha, Tensor? running_mean, Tensor? running_var, "
    "int activation, bool batch_norm, bool training, float norm_eps, float dice_eps"
)
lib.define(f"norm_activation({_SIGNATURE}) -> (Tensor out, Tensor batch_stats)")
lib.define(
    f"norm_activation_backward(Tensor grad_out, Tensor batch_stats, {_SIGNATURE}) "
    "-> (Tensor grad_x, Tensor[] grad_params)"
)

_NAMES = list(ACTIVATIONS)


def _check(op, x, weight, bias, alpha, running_mean, running_var, activation, batch_norm, training, norm_eps, dice_eps):
    """Ranks, sizes, dtypes and devices; the texts are those of csrc/cpu/dense/norm_activation.cpp."""
    check = torch._check
    check_activation(op, activation)
    name = _NAMES[activation]
    check(x.dim() == 2, lambda: f"{op}: x must have 2 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    N, H = x.shape
    check(batch_norm or name != "dice_batch_norm", lambda: f"{op}: dice_batch_norm needs batch_norm")
    check((weight is None) == (bias is None), lambda: f"{op}: give both weight and bias, or neither")
    check(batch_norm or weight is None, lambda: f"{op}: weight and bias belong to batch_norm")
    check(
        (alpha is not None) == bool(ACTIVATIONS[name]),
        lambda: f"{op}: activation {activation} {'needs an' if ACTIVATIONS[name] else 'has no'} alpha",
    )
    check(
        not batch_norm or training or (running_mean is not None and running_var is not None),
        lambda: f"{op}: give running_mean and running_var, or training",
    )
    check(not (batch_norm and training) or N > 1, lambda: f"{op}: training needs more than one row, got {N}")
    if batch_norm:
        check_epsilon(op, "norm_eps", norm_eps, training)
    if name == "dice":
        check_epsilon(op, "dice_eps", dice_eps, False)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var, "alpha": alpha}
    for key, t in vectors.items():
        if t is None:
            continue
        check(
            t.dim() == 1 and (t.size(0) == H or (key == "alpha" and t.size(0) == 1)),
            lambda: f"{op}: {key} must be [H] = [{H}]{' or [1]' if key == 'alpha' else ''}, got {list(t.shape)}",
        )
        check(t.dtype in FLOATING, lambda: f"{op}: {key} must be float32, float64, float16 or bfloat16, got {t.dtype}")
        check(t.device == x.device, lambda: f"{op}: {key} must be on the device of x, {x.device}, got {t.device}")


def _stats_size(x, batch_norm, training):
    return 2 * x.size(1) if batch_norm and training else 0


def _check_backward(grad_out, batch_stats, x, weight, bias, alpha, running_mean, running_var, *flags):
    _check("norm_activation", x, weight, bias, alpha, running_mean, running_var, *flags)
    op, size = "norm_activation_backward", _stats_size(x, *flags[1:3])
    check_form(op, "grad_out", grad_out, x.shape, x.dtype, x.device)
    check_form(op, "batch_stats", batch_stats, (size,), wide(x.dtype), x.device)


def _new_stats(x, batch_norm, training):
    return x.new_empty(_stats_size(x, batch_norm, training), dtype=wide(x.dtype))


@torch.library.register_fake("rankkernels::norm_activation", lib=lib)
def _(x, weight, bias, alpha, running_mean, running_var, *flags):
    _check("norm_activation", x, weight, bias, alpha, running_mean, running_var, *flags)
    return x.new_empty(x.shape), _new_stats(x, *flags[1:3])


@torch.library.register_fake("rankkernels::norm_activation_backward", lib=lib)
def _(grad_out, batch_stats, x, weight, bias, alpha, *rest):
    _check_backward(grad_out, batch_stats, x, weight, bias, alpha, *rest)
    return x.new_empty(x.shape), [p.new_empty(p.shape) for p in (weight, bias, alpha) if p is not None]


def _norm_activation(x, weight, bias, alpha, running_mean, running_var, activation, batch_norm, training, norm_eps,
                     dice_eps):  # fmt: skip
    vectors = weight, bias, alpha, running_mean, running_var
    weight, bias, alpha, running_mean, running_var = (None if p is None else p.to(wide(x.dtype)) for p in vectors)
    norm = reference.BatchNorm(weight, bias, running_mean, running_var, norm_eps) if batch_norm else None
    return reference.norm_activation(x, norm, _NAMES[activation], alpha, training, dice_eps)


def _unchecked(*arguments):
    x, *_, batch_norm, training, _norm_eps, _dice_eps = arguments
    out, stats = _norm_activation(*arguments)
    return out.contiguous(), _new_stats(x, batch_norm, training) if stats is None else torch.cat(stats)


def _reference(*arguments):
    check_strided("norm_activation", arguments[:6])
    _check("norm_activation", *arguments)
    return _unchecked(*arguments)


@torch.library.impl(lib, "norm_activation", "CompositeExplicitAutograd")
def _default(x, *rest):
    notice_reference("norm_activation", x)
    return _reference(x, *rest)


@torch.library.impl(lib, "norm_activation_backward", "CompositeExplicitAutograd")
def _default_backward(grad_out, batch_stats, x, weight, bias, alpha, running_mean, running_var, *flags):
    arguments = grad_out, batch_stats, x, weight, bias, alpha, running_mean, running_var
    check_strided("norm_activation_backward", arguments)
    _check_backward(*arguments, *flags)
    given = [p for p in (weight, bias, alpha) if p is not None]

    def forward(x, *given):
        params = iter(given)
        weight_, bias_, alpha_ = (None if p is None else next(params) for p in (weight, bias, alpha))
        return _norm_activation(x, weight_, bias_, alpha_, running_mean, running_var, *flags)[0]

    grads = [g.contiguous() for g in vjp(forward, grad_out, x, *given)]
    return grads[0], grads[1:]


if has_triton:

    @torch.library.impl(lib, "norm_activation", "CUDA")
    def _(x, weight, bias, alpha, running_mean, running_var, activation, batch_norm, training, norm_eps, dice_eps):
        from rankkernels._triton import norm_activation as kernels

        arguments = x, weight, bias, alpha, running_mean, running_var
        if not kernels.supports(x):
            return _default(*arguments, activation, batch_norm, training, norm_eps, dice_eps)
        _check("norm_activation", *arguments, activation, batch_norm, training, norm_eps, dice_eps)
        return kernels.norm_activation(*arguments, _NAMES[activation], batch_norm, training, norm_eps, dice_eps)

    @torch.library.impl(lib, "norm_activation_backward", "CUDA")
    def _(grad_out, batch_stats, x, weight, bias, alpha, running_mean, running_var, activation, batch_norm, training,
          norm_eps, dice_eps):  # fmt: skip
        from rankkernels._triton import norm_activation as kernels

        arguments = grad_out, batch_stats, x, weight, bias, alpha, running_mean, running_var
        if not kernels.supports(x):
            return _default_backward(*arguments, activation, batch_norm, training, norm_eps, dice_eps)
        _check_backward(*arguments, activation, batch_norm, training, norm_eps, dice_eps)
        return kernels.norm_activation_backward(
            *arguments, _NAMES[activation], batch_norm, training, norm_eps, dice_eps
        )


def _setup_context(ctx, inputs, output):
    x, weight, bias, alpha, running_mean, running_var, *ctx.flags = inputs
    if ctx.flags[2]:  # training: nothing reads the running statistics, and the caller updates them in place
        running_mean = running_var = None
    ctx.save_for_backward(output[1], x, weight, bias, alpha, running_mean, running_var)
    ctx.mark_non_differentiable(output[1])


_norm_activation_backward = differentiable(torch.ops.rankkernels.norm_activation_backward.default, _default_backward)


def _backward(ctx, grad_out, _):
    batch_stats, x, *vectors = ctx.saved_tensors
    grad_x, grad_params = _norm_activation_backward(grad_out, batch_stats, x, *vectors, *ctx.flags)
    grads = iter(grad_params)
    return grad_x, *(None if p is None else next(grads) for p in vectors[:3]), *[None] * 7


_forward = register_autograd("norm_activation", _reference, _backward, _setup_context)


def is_faster(x: Tensor, activation: str) -> bool:
    """Whether the op is faster than torch's normalization and activation of [N, H] one after the other. Below so many
    values a call's own cost counts, but Dice is eight of torch's ops, which take no layer of width 0. Compilers are not
    asked to look at a size."""
    return "dice" in activation or torch.compiler.is_compiling() or not x.is_cpu or not 0 < x.numel() < 1 << 17


def norm_activation(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    activation: str = "dice",
    batch_norm: bool = False,
    training: bool = False,
    norm_eps: float = 1e-5,
    dice_eps: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """What follows the product of a hidden layer: a batch normalization, if wanted, and the activation.

    Semantics: ``reference.norm_activation``; ``nn.BatchNorm1d`` and then torch-rechub's ``Dice`` or torch's activation
    of the same name; with dice_batch_norm DeepCTR-Torch's and FuxiCTR's ``Dice``, whose batch normalization (with and
    without ``weight`` and ``bias``) is this one. The precision is that of ``x``, with float32 accumulation; the
    vectors may be of another dtype. Autocast changes nothing.

    Args:
        x: [N, H], any strides; float32, float64, float16 or bfloat16.
        weight, bias: [H] of an affine normalization.
        alpha: [1] or [H], the slope of prelu and of both kinds of Dice.
        running_mean, running_var: [H], for a normalization in eval; never written.
        activation: linear, sigmoid, relu, leakyrelu, prelu, dice (statistics of a row's units) or dice_batch_norm.
        batch_norm: whether there is a normalization.
        training: normalize with the statistics of the batch.
        norm_eps, dice_eps: epsilons of the normalization and of Dice.

    Returns:
        out [N, H] in the dtype of ``x``, and in training with a normalization the batch's mean and its unbiased
        variance, one after the other [2 H], else an empty tensor.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit, a vector too many or too few, fewer than two rows in
            training with a normalization, an epsilon that is negative, or 0 in training with a normalization.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"norm_activation: unknown activation {activation!r}, expected one of {known}")
    # Sizes are tensors while torch.jit traces for the older exporter: nothing to check.
    op = _unchecked if is_exporting_to_onnx() else _forward
    return op(
        x, weight, bias, alpha, running_mean, running_var, _NAMES.index(activation), batch_norm, training, norm_eps,
        dice_eps,
    )  # fmt: skip
