"""The torch.library namespace ``rankkernels``, the C++ extension, and the notice that no kernel was found.

Schemas are defined in Python, beside the public function of each op. The extension registers the CPU implementations
when it is loaded; CUDA implementations are registered beside the schema. What is left runs the op's default, the
reference, under the key CompositeExplicitAutograd: torch's dispatcher chooses, and nothing else does.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

lib = torch.library.Library("rankkernels", "DEF")

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


class ReferenceWarning(UserWarning):
    """An op ran the pure-PyTorch reference because no kernel serves its device."""


def _load_extension() -> str | None:
    """Loads ``rankkernels._C``; returns why it did not, or None."""
    if os.environ.get("RANKKERNELS_REFERENCE", "0") not in ("", "0"):
        return "RANKKERNELS_REFERENCE is set"
    # Beside this package's own files, and not where an editable installation of another copy would point to.
    folder = os.path.dirname(os.path.dirname(__file__))
    if importlib.machinery.PathFinder.find_spec("rankkernels._C", [folder]) is None:
        return "rankkernels was installed without its C++ extension"
    try:
        importlib.import_module("rankkernels._C")
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


lib.define("cpu_isa() -> int")
lib.define("use_huge_pages(Tensor t) -> ()")
torch.library.impl(lib, "use_huge_pages", "CompositeExplicitAutograd")(lambda t: None)
torch.library.register_fake("rankkernels::use_huge_pages", lambda t: None, lib=lib)
no_extension: str | None = _load_extension()
#: What the C++ kernels run with, or None where there are none. Asked for once, so that no tracer sees the question.
cpu_isa: str | None = None if no_extension else CPU_ISAS[torch.ops.rankkernels.cpu_isa()]
has_triton: bool = importlib.util.find_spec("triton") is not None and no_extension != "RANKKERNELS_REFERENCE is set"


def use_huge_pages(t: Tensor) -> None:
    """Moves a large table on the CPU to huge pages, where the system has them; its values stay, its address too."""
    if t.device.type == "cpu" and t.is_contiguous() and t.numel() * t.element_size() >= 4 << 20:
        torch.ops.rankkernels.use_huge_pages.default(t.detach())


#: Ops that ran on the reference in this process, and why: what ``python -m rankkernels.info`` is about.
reference_notices: dict[tuple[str, str], str] = {}


def notice_reference(op: str, tensor: Tensor) -> None:
    """Says once per op and device that the reference runs, and why."""
    device = tensor.device.type
    if (op, device) in reference_notices:
        return
    if device == "cpu" and no_extension:
        reason = no_extension
    elif device == "cuda" and op.startswith(("embedding", "sparse_update")):
        reason = "rankkernels was built without RANKKERNELS_CUDA=1"
    elif device == "cuda" and not has_triton:
        reason = "Triton is not installed"
    elif device == "cuda":
        reason = "the Triton kernels do not serve this configuration (see the README)"
    else:
        reason = f"there is no kernel for device type {device!r}"
    reference_notices[op, device] = reason
    warnings.warn(
        f"rankkernels.{op} runs the pure-PyTorch reference on {device!r}: {reason}. "
        "`python -m rankkernels.info` lists what runs where.",
        ReferenceWarning,
        stacklevel=3,
    )


FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is kept beside tensors of ``dtype``, the one they are computed in."""
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


def check_strided(op: str, tensors: Iterable[Tensor | None]) -> None:
    """A default implementation is what torch calls with sparse and other layouts, too."""
    for t in tensors:
        if t is not None and t.layout != torch.strided:
            raise RuntimeError(f"{op}: tensors must be of layout torch.strided, got {t.layout}")


def check_epsilon(op: str, name: str, eps: float, positive: bool) -> None:
    """torch's rule: an epsilon may be 0 but where it stands beside a variance that may be."""
    rule = "be positive in training" if positive else "not be negative"
    torch._check(eps > 0 if positive else eps >= 0, lambda: f"{op}: {name} must {rule}, got {eps:g}")


class raise_documented:
    """Makes the type that is documented of the RuntimeError that an operator in C++ raises, which has that type alone:
    an error about the values in a tensor, whose text is one of these."""

    TYPES = (
        (re.compile("is out of range"), IndexError),
        (re.compile(r"is outside 0 \.\.|offsets must run|offsets decrease|more than one valid row"), ValueError),
    )

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if kind is RuntimeError:
            message = str(error).splitlines()[0]
            for text, documented in self.TYPES:
                if text.search(message):
                    raise documented(message) from None


def is_exporting() -> bool:
    """Whether a model is exported or traced, for inference: no backward follows, nor an optimizer's step."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_exporting_to_onnx() -> bool:
    """Whether only torch's own operators will do."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


#: The mode of torch's older vmap, of ``torch.autograd.grad(is_grads_batched=True)``.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")


def is_transformed() -> bool:
    """Whether tensors may be those of ``torch.func``'s transforms, or carry the tangents of forward mode."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def _below_autograd(op: torch._ops.OpOverload) -> Callable:
    """``op``, called without its autograd kernel where nothing is recorded: that is Python, half of a small call."""

    def call(*arguments, **keywords):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
            return op(*arguments, **keywords)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **keywords)

    return call


def _first_derivative(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> Callable:
    """The kernel of ``op`` that records ``backward``. torch.library's own takes a tree of the arguments apart and puts
    it together at each step, which costs as much as the lookups of a small batch."""
    schema = op._schema
    types = [a.type for a in schema.arguments if not a.kwarg_only]
    is_list = [str(t) == "List[Tensor]" for t in types]
    is_tensor = [str(t) in ("Tensor", "Optional[Tensor]") for t in types]
    gives_list = str(schema.returns[0].type) == "List[Tensor]"
    defaults = [a.default_value for a in schema.arguments if not a.kwarg_only]
    keyword_defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}

    class FirstDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, arguments, keywords, *tensors):
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **keywords)
            inputs = (*arguments, *defaults[len(arguments) :])  # the dispatcher leaves out what is a default
            if keyword_defaults:
                setup_context(ctx, inputs, {**keyword_defaults, **keywords}, output)
            else:
                setup_context(ctx, inputs, output)
            ctx.lengths_of_inputs = [len(a) if is_list[i] else is_tensor[i] for i, a in enumerate(arguments)]
            return tuple(output) if gives_list else output

        @staticmethod
        def backward(ctx, *grad_outs):
            grads = backward(ctx, list(grad_outs)) if gives_list else backward(ctx, *grad_outs)
            grads = grads if isinstance(grads, tuple) else (grads,)
            flat = []
            for i, length in enumerate(ctx.lengths_of_inputs):
                if is_list[i]:
                    flat.extend(grads[i] or [None] * length)
                elif length:
                    flat.append(grads[i])
            return None, None, None, *flat

    def kernel(keyset, *arguments, **keywords):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **keywords)
        tensors = []
        for i, argument in enumerate(arguments):
            if is_list[i]:
                tensors.extend(argument)
            elif is_tensor[i]:
                tensors.append(argument)
        output = FirstDerivative.apply(keyset, arguments, keywords, *tensors)
        return list(output) if gives_list else output

    return kernel


def register_autograd(name: str, reference: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """What ``torch.library.register_autograd`` does; but forward mode, of which that drops the tangents without a
    word, and ``torch.func`` see ``reference``, which takes and returns what the op does. ``torch.vmap`` loops.

    Returns the op, to be called without its autograd kernel where nothing is recorded."""
    op = getattr(torch.ops.rankkernels, name).default
    first_derivative = _first_derivative(op, backward, setup_context)

    def autograd(keyset, *arguments, **keywords):
        if is_transformed():
            return reference(*arguments, **keywords)
        return first_derivative(keyset, *arguments, **keywords)

    lib.impl(name, autograd, "Autograd", with_keyset=True)

    def one_by_one(info, in_dims, *arguments, **keywords):
        values, spec = tree_flatten(arguments)
        dims = spec.flatten_up_to(in_dims)
        results = []
        for i in range(info.batch_size):
            taken = (v if d is None else v.select(d, i) for v, d in zip(values, dims))
            results.append(tree_flatten(op(*tree_unflatten(taken, spec), **keywords)))
        out = [torch.stack(outs) for outs in zip(*(flat for flat, _ in results))]
        out_spec = results[0][1]
        return tree_unflatten(out, out_spec), tree_unflatten([0] * len(out), out_spec)

    torch.library.register_vmap(f"rankkernels::{name}", one_by_one, lib=lib)
    return _below_autograd(op)


def differentiable(op: torch._ops.OpOverload, reference: Callable) -> Callable:
    """``op``, which has no derivative; where one may be asked for (by ``create_graph``, forward mode, ``torch.func``)
    ``reference``, which takes and returns the same."""

    def call(*arguments):
        return (reference if torch.is_grad_enabled() or is_transformed() else op)(*arguments)

    return call


def check_first_derivative(what: str) -> None:
    """For a backward that has no derivative of its own: raises where one may be asked for."""
    if torch.is_grad_enabled() or is_transformed():
        raise RuntimeError(f"{what} is differentiable once, in reverse mode: not with create_graph, nor batched")


def vjp(fn: Callable[..., Tensor], grad_out: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
    """Gradients of ``fn(*inputs)`` for the floating-point ``inputs``, differentiable themselves.

    An op's implementation runs with the Autograd dispatch keys excluded; this lets them in again for ``fn``.
    """
    tls = torch._C
    include, exclude = tls._dispatch_tls_local_include_set(), tls._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(tls.DispatchKey, key))
    with tls._ForceDispatchKeyGuard(include, exclude):
        return torch.func.vjp(fn, *inputs)[1](grad_out)
