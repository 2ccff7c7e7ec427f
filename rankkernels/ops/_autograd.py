"""Autograd of the ops: kernels give the first derivative, the reference all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten

from rankkernels.ops._library import lib
from rankkernels.ops._tracing import is_transformed


def _below_autograd(op: torch._ops.OpOverload) -> Callable:
    """``op``, without its autograd kernel where nothing is recorded: that is Python, and half of a small call.
    Inference mode goes without by itself."""

    def call(*arguments, **keywords):
        if is_compiling() or torch.is_inference_mode_enabled() or torch.is_grad_enabled() or is_transformed():
            return op(*arguments, **keywords)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **keywords)

    return call


def _first_derivative(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> Callable:
    """The kernel of ``op`` that records ``backward``. torch.library's own takes a tree of the arguments apart and puts
    it together at each step, which costs as much as the lookups of a small batch."""
    schema = op._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    defaults = [a.default_value for a in positional]
    keyword_defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
    kinds = {"List[Tensor]": True, "Tensor": False, "Optional[Tensor]": False}
    #: Where the tensors are among the arguments, and whether it is a list of them.
    tensor_places = [(i, kinds[str(a.type)]) for i, a in enumerate(positional) if str(a.type) in kinds]
    list_places = [i for i, is_list in tensor_places if is_list]
    gives_list = str(schema.returns[0].type) == "List[Tensor]"

    def run(keyset, arguments, keywords):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **keywords)

    class FirstDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, arguments, keywords, *tensors):
            output = run(keyset, arguments, keywords)
            inputs = (*arguments, *defaults[len(arguments) :])  # the dispatcher leaves out what is a default
            if keyword_defaults:
                setup_context(ctx, inputs, {**keyword_defaults, **keywords}, output)
            else:
                setup_context(ctx, inputs, output)
            ctx.lengths_of_lists = [len(arguments[i]) for i in list_places]
            return tuple(output) if gives_list else output

        @staticmethod
        def backward(ctx, *grad_outs):
            grads = backward(ctx, list(grad_outs)) if gives_list else backward(ctx, *grad_outs)
            grads = grads if isinstance(grads, tuple) else (grads,)
            lengths, flat = iter(ctx.lengths_of_lists), []
            for i, is_list in tensor_places:
                if is_list:
                    length = next(lengths)
                    flat += grads[i] or [None] * length
                else:
                    flat.append(grads[i])
            return None, None, None, *flat

    def kernel(keyset, *arguments, **keywords):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return run(keyset, arguments, keywords)
        tensors = []
        for i, is_list in tensor_places:
            if is_list:
                tensors += arguments[i]
            else:
                tensors.append(arguments[i])
        output = FirstDerivative.apply(keyset, arguments, keywords, *tensors)
        return list(output) if gives_list else output

    return kernel


def register_autograd(name: str, reference: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """As ``torch.library.register_autograd``, but forward mode and ``torch.func`` run ``reference``, which takes and
    returns what the op does (torch's drops forward mode's tangents silently), and ``torch.vmap`` loops.

    Returns the op, for calls that skip its autograd kernel where nothing is recorded."""
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
            selected = (v if d is None else v.select(d, i) for v, d in zip(values, dims))
            results.append(tree_flatten(op(*tree_unflatten(selected, spec), **keywords)))
        out = [torch.stack(outs) for outs in zip(*(flat for flat, _ in results))]
        out_spec = results[0][1]
        return tree_unflatten(out, out_spec), tree_unflatten([0] * len(out), out_spec)

    torch.library.register_vmap(f"rankkernels::{name}", one_by_one, lib=lib)
    return _below_autograd(op)


def differentiable(op: torch._ops.OpOverload, reference: Callable) -> Callable:
    """``op``, which has no derivative; where one may be needed (``create_graph``, forward mode, ``torch.func``), calls
    ``reference`` instead, which takes and returns the same."""

    def call(*arguments):
        return (reference if torch.is_grad_enabled() or is_transformed() else op)(*arguments)

    return call


def check_first_derivative(what: str) -> None:
    """Raises where the derivative of a backward may be needed, for one that has none."""
    if torch.is_grad_enabled() or is_transformed():
        raise RuntimeError(f"{what} is differentiable once, in reverse mode: not with create_graph, nor batched")


def vjp(fn: Callable[..., Tensor], grad_out: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
    """Gradients of ``fn(*inputs)`` for the floating-point ``inputs``, differentiable themselves.

    An op's implementation runs with the Autograd dispatch keys excluded; they are included again while ``fn`` runs.
    """
    tls = torch._C
    include, exclude = tls._dispatch_tls_local_include_set(), tls._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(tls.DispatchKey, key))
    with tls._ForceDispatchKeyGuard(include, exclude):
        return torch.func.vjp(fn, *inputs)[1](grad_out)
