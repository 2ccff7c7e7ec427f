"""Batch normalization and activation of a hidden layer. Kernels: csrc/cpu/dense/norm_activation_kernel.h and
_triton/norm_activation.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS, NAMES, check_activation, number_of
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_epsilon, check_form, check_strided, raise_documented, wide
from rankkernels.ops._library import define, has_triton, lib, only_reference, triton_serves
from rankkernels.ops._schema import no_gradients, parsed, schema_of
from rankkernels.ops._table import notice_reference
from rankkernels.ops._tracing import is_compiling


class Inputs(NamedTuple):
    """The tensors of the schema."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    alpha: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def learnt(self) -> list[Tensor]:
        """The parameters that were given, in the order of their gradients."""
        return [p for p in (self.weight, self.bias, self.alpha) if p is not None]

    def spread(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """One of ``values`` for each parameter that was given: of weight, bias and alpha."""
        left = iter(values)
        return tuple(None if p is None else next(left) for p in (self.weight, self.bias, self.alpha))


class Flags(NamedTuple):
    """The rest of the schema. ``activation``: its number in ``_activations``."""

    activation: int
    batch_norm: bool
    training: bool
    norm_eps: float
    dice_eps: float

    @property
    def name(self) -> str:
        return NAMES[self.activation]

    def stats_size(self, x: Tensor) -> int:
        """The values of ``batch_stats``."""
        return 2 * x.size(1) if self.batch_norm and self.training else 0


# ``batch_stats``: in training with a normalization the batch's mean and its unbiased variance, [2 H] in float32 (or
# float64), else empty; the caller updates the running statistics. ``grad_params``: of ``Inputs.learnt``.
_SIGNATURE = f"{schema_of(Inputs)}, {schema_of(Flags)}"
define(f"norm_activation({_SIGNATURE}) -> (Tensor out, Tensor batch_stats)")
define(
    f"norm_activation_backward(Tensor grad_out, Tensor batch_stats, {_SIGNATURE}) "
    "-> (Tensor grad_x, Tensor[] grad_params)"
)


def _check(op: str, inputs: Inputs, flags: Flags) -> None:
    """Ranks, sizes, dtypes and devices; the texts are those of csrc/cpu/dense/norm_activation.cpp."""
    check, (x, *_), training = torch._check, inputs, flags.training
    check_activation(op, flags.activation)
    check(x.dim() == 2, lambda: f"{op}: x must have 2 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    _check_given(op, inputs, flags)
    N, H = x.shape
    check(not (flags.batch_norm and training) or N != 1, lambda: f"{op}: training needs more than one row, got {N}")
    if flags.batch_norm:
        check_epsilon(op, "norm_eps", flags.norm_eps, training)
    if flags.name == "dice":
        check_epsilon(op, "dice_eps", flags.dice_eps, False)
    for key in ("weight", "bias", "running_mean", "running_var", "alpha"):
        t = getattr(inputs, key)
        if t is None:
            continue
        check(
            t.dim() == 1 and (t.size(0) == H or (key == "alpha" and t.size(0) == 1)),
            lambda: f"{op}: {key} must be [H] = [{H}]{' or [1]' if key == 'alpha' else ''}, got {list(t.shape)}",
        )
        check(t.dtype in FLOATING, lambda: f"{op}: {key} must be float32, float64, float16 or bfloat16, got {t.dtype}")
        check(t.device == x.device, lambda: f"{op}: {key} must be on the device of x, {x.device}, got {t.device}")


def _check_given(op: str, inputs: Inputs, flags: Flags) -> None:
    """Which vectors there must be."""
    check, batch_norm, learns = torch._check, flags.batch_norm, bool(ACTIVATIONS[flags.name])
    _, weight, bias, alpha, running_mean, running_var = inputs
    check(batch_norm or flags.name != "dice_batch_norm", lambda: f"{op}: dice_batch_norm needs batch_norm")
    check((weight is None) == (bias is None), lambda: f"{op}: give both weight and bias, or neither")
    check(batch_norm or weight is None, lambda: f"{op}: weight and bias belong to batch_norm")
    check(
        (alpha is not None) == learns,
        lambda: f"{op}: activation {flags.activation} {'needs an' if learns else 'has no'} alpha",
    )
    check(
        not batch_norm or flags.training or (running_mean is not None and running_var is not None),
        lambda: f"{op}: give running_mean and running_var, or training",
    )


def _check_backward(grad_out: Tensor, batch_stats: Tensor, inputs: Inputs, flags: Flags) -> None:
    _check("norm_activation", inputs, flags)
    op, x = "norm_activation_backward", inputs.x
    check_form(op, "grad_out", grad_out, x.shape, x.dtype, x.device)
    check_form(op, "batch_stats", batch_stats, (flags.stats_size(x),), wide(x.dtype), x.device)


def _new_stats(x: Tensor, flags: Flags) -> Tensor:
    return x.new_empty(flags.stats_size(x), dtype=wide(x.dtype))


@torch.library.register_fake("rankkernels::norm_activation", lib=lib)
def _(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    _check("norm_activation", inputs, flags)
    return inputs.x.new_empty(inputs.x.shape), _new_stats(inputs.x, flags)


@torch.library.register_fake("rankkernels::norm_activation_backward", lib=lib)
def _(grad_out, batch_stats, *arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    _check_backward(grad_out, batch_stats, inputs, flags)
    return inputs.x.new_empty(inputs.x.shape), [p.new_empty(p.shape) for p in inputs.learnt()]


def _normalize_and_activate(inputs: Inputs, flags: Flags) -> tuple[Tensor, reference.BatchStats | None]:
    x, *vectors = inputs
    weight, bias, alpha, mean, var = (None if p is None else p.to(wide(x.dtype)) for p in vectors)
    norm = reference.BatchNorm(weight, bias, mean, var, flags.norm_eps) if flags.batch_norm else None
    return reference.norm_activation(x, norm, flags.name, alpha, flags.training, flags.dice_eps)


def _unchecked(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    out, stats = _normalize_and_activate(inputs, flags)
    return out.contiguous(), _new_stats(inputs.x, flags) if stats is None else torch.cat(stats)


def _reference(*arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check_strided("norm_activation", inputs)
    _check("norm_activation", inputs, flags)
    return _unchecked(*arguments)


@torch.library.impl(lib, "norm_activation", "CompositeExplicitAutograd")
def _default(x, *rest):
    notice_reference("norm_activation", x)
    return _reference(x, *rest)


@torch.library.impl(lib, "norm_activation_backward", "CompositeExplicitAutograd")
def _default_backward(grad_out, batch_stats, *arguments):
    inputs, flags = parsed(arguments, Inputs, Flags)
    check_strided("norm_activation_backward", (grad_out, batch_stats, *inputs))
    _check_backward(grad_out, batch_stats, inputs, flags)

    def forward(x, *learnt):
        changed = Inputs(x, *inputs.spread(learnt), inputs.running_mean, inputs.running_var)
        out, _ = _normalize_and_activate(changed, flags)
        return out

    grad_x, *grad_params = vjp(forward, grad_out, inputs.x, *inputs.learnt())
    return grad_x.contiguous(), [g.contiguous() for g in grad_params]


def _has_kernel(x: Tensor) -> bool:
    """Whether a GPU's kernels serve x [N, H]."""
    if not triton_serves(x):
        return False
    from rankkernels._triton.norm_activation import supports

    return supports(x)


def kept_statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> Tensor:
    """``batch_stats`` of an x [0, H]: what an update leaves the running statistics as they are with."""
    zeros = x.new_zeros(x.size(1), dtype=wide(x.dtype))
    return torch.cat([zeros if t is None else t.to(zeros.dtype) for t in (running_mean, running_var)])


def dice_of(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """dice_batch_norm of x [N, H] whose normalization is y."""
    return (alpha * x + torch.sigmoid(y) * (x - alpha * x)).to(x.dtype)


def _by_torch(inputs: Inputs, flags: Flags) -> tuple[Tensor, Tensor]:
    """torch's own normalization and activation, of checked arguments."""
    x, *vectors = inputs
    weight, bias, alpha, *running = (None if t is None else t.to(wide(x.dtype)) for t in vectors)
    y, stats = x, torch.zeros_like(_new_stats(x, flags))
    if flags.stats_size(x) and x.size(0) == 0:
        stats = kept_statistics(x, *running)
    if flags.batch_norm:
        mean, var = stats.chunk(2) if flags.training else running
        # A momentum of 1 makes running statistics the batch's.
        y = F.batch_norm(x, mean, var, weight, bias, flags.training, 1.0, flags.norm_eps)
    if flags.name == "dice_batch_norm":
        return dice_of(x, y, alpha), stats
    slope = None if alpha is None else alpha.to(x.dtype)
    out = reference.activate(y, flags.name, slope, flags.dice_eps)
    return out.clone() if out is x else out, stats


def _composed(x: Tensor, *rest) -> tuple[Tensor, Tensor] | None:
    """``_by_torch``, on a GPU where no kernel serves."""
    if not x.is_cuda or only_reference or _has_kernel(x):
        return None
    inputs, flags = parsed((x, *rest), Inputs, Flags)
    _check("norm_activation", inputs, flags)
    return _by_torch(inputs, flags)


if has_triton:

    @torch.library.impl(lib, "norm_activation", "CUDA")
    def _(*arguments):
        from rankkernels._triton import norm_activation as kernels

        if (composed := _composed(*arguments)) is not None:
            out, batch_stats = composed
            return out.contiguous(), batch_stats
        inputs, flags = parsed(arguments, Inputs, Flags)
        _check("norm_activation", inputs, flags)
        if flags.stats_size(inputs.x) and inputs.x.size(0) == 0:
            return torch.empty_like(inputs.x), kept_statistics(inputs.x, inputs.running_mean, inputs.running_var)
        return kernels.norm_activation(*inputs, flags.name, flags.batch_norm, flags.training, flags.norm_eps,
                                       flags.dice_eps)  # fmt: skip

    @torch.library.impl(lib, "norm_activation_backward", "CUDA")
    def _(grad_out, batch_stats, *arguments):
        from rankkernels._triton import norm_activation as kernels

        inputs, flags = parsed(arguments, Inputs, Flags)
        if not _has_kernel(inputs.x):
            return _default_backward(grad_out, batch_stats, *arguments)
        _check_backward(grad_out, batch_stats, inputs, flags)
        return kernels.norm_activation_backward(
            grad_out, batch_stats, *inputs, flags.name, flags.batch_norm, flags.training, flags.norm_eps, flags.dice_eps
        )


def _setup_context(ctx, inputs, output):
    inputs, ctx.flags = parsed(inputs, Inputs, Flags)
    if ctx.flags.training:  # nothing reads the running statistics, and the caller updates them in place
        inputs = inputs._replace(running_mean=None, running_var=None)
    _, batch_stats = output
    ctx.save_for_backward(batch_stats, *inputs)
    ctx.mark_non_differentiable(batch_stats)


_norm_activation_backward = differentiable(torch.ops.rankkernels.norm_activation_backward.default, _default_backward)


def _backward(ctx, grad_out, _):
    batch_stats, *inputs = ctx.saved_tensors
    grad_x, grad_params = _norm_activation_backward(grad_out, batch_stats, *inputs, *ctx.flags)
    return *Inputs(grad_x, *Inputs(*inputs).spread(grad_params), None, None), *no_gradients(Flags)


# Sizes are tensors while torch.jit traces for the older exporter to ONNX: nothing to check.
_forward = register_autograd("norm_activation", _reference, _backward, _setup_context, _unchecked, _composed)


#: Values of x below which the cost per call decides between torch's normalization and activation and the op.
LEAST_VALUES, LEAST_VALUES_ON_GPU = 1 << 17, 1 << 23


def is_faster(x: Tensor, activation: str) -> bool:
    """Whether the op is faster than torch's normalization and activation of [N, H] in turn. For small x the cost per
    call decides, launches on a GPU, but Dice is eight of torch's ops; torch's take no layer of width 0. Under a
    compiler no size is read, which would specialize the graph on it."""
    least = LEAST_VALUES if x.is_cpu else LEAST_VALUES_ON_GPU
    return is_compiling() or not 0 < x.numel() < least or "dice" in activation


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
        weight: [H] of an affine normalization.
        bias: [H], beside ``weight``.
        alpha: [1] or [H], the slope of prelu and of both kinds of Dice.
        running_mean: [H], for a normalization in eval, and for one in training of no rows; never written.
        running_var: [H], beside it.
        activation: linear, sigmoid, relu, leakyrelu, prelu, dice (statistics of a row's units) or dice_batch_norm.
        batch_norm: whether there is a normalization.
        training: normalize with the statistics of the batch.
        norm_eps: epsilon of the normalization.
        dice_eps: epsilon of Dice.

    Returns:
        out [N, H] in the dtype of ``x``, and in training with a normalization the batch's mean and its unbiased
        variance, one after the other [2 H], else an empty tensor. Of no rows the running statistics (zeros where none
        are given), which an update with them leaves as they are: torch's normalization does the same.

    Raises:
        ValueError: an unknown activation, or one row in training with a normalization.
        RuntimeError: shapes, dtypes or devices that do not fit, a vector too many or too few, an epsilon that is
            negative, or 0 in training with a normalization.
    """
    number = number_of("norm_activation", activation)
    with raise_documented():
        return _forward(
            x, weight, bias, alpha, running_mean, running_var, number, batch_norm, training, norm_eps, dice_eps,
        )  # fmt: skip
