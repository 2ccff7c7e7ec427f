"""Autograd of the ops: kernels give the first derivative, the reference all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rankkernels.ops._library import lib
from rankkernels.ops._tracing import is_traced, is_transformed, plain_classes


def _redispatching(op: torch._ops.OpOverload, keyset) -> Callable:
    """``op`` as its autograd kernel goes on with it."""

    def run(*arguments, **keywords):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **keywords)

    return run


class _FirstDerivative:
    """How calls of ``op`` record ``backward``. torch.library's own way takes a tree of the arguments apart and puts it
    together at each step, which costs as much as the lookups of a small batch."""

    def __init__(self, op: torch._ops.OpOverload, backward: Callable, setup_context: Callable):
        schema = op._schema
        positional = [a for a in schema.arguments if not a.kwarg_only]
        kinds = {"List[Tensor]": True, "Tensor": False, "Optional[Tensor]": False}
        #: Where the tensors are among the arguments, and whether it is a list of them.
        self.tensor_places = [(i, kinds[str(a.type)]) for i, a in enumerate(positional) if str(a.type) in kinds]
        self.gives_list = str(schema.returns[0].type) == "List[Tensor]"
        function = self._function(schema, positional, backward, setup_context)
        # torch.autograd.Function's own looks at each argument once more, for tensors of transforms that are over.
        self.apply = super(torch.autograd.Function, function).apply

    def _function(self, schema, positional: list, backward: Callable, setup_context: Callable) -> type:
        defaults = [a.default_value for a in positional]
        keyword_defaults = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
        tensor_places, gives_list = self.tensor_places, self.gives_list
        list_places = [i for i, is_list in tensor_places if is_list]

        class FirstDerivative(torch.autograd.Function):
            @staticmethod
            def forward(ctx, run, arguments, keywords, *tensors):
                output = run(*arguments, **keywords)
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

        return FirstDerivative

    def tensors(self, arguments: Sequence) -> list[Tensor | None]:
        """Those among the arguments, which autograd has to be given one by one."""
        tensors = []
        for i, is_list in self.tensor_places:
            if is_list:
                tensors += arguments[i]
            else:
                tensors.append(arguments[i])
        return tensors

    def record(self, run: Callable, arguments: Sequence, keywords: Mapping, tensors: Sequence[Tensor | None]):
        """``run(*arguments, **keywords)``, with its backward."""
        output = self.apply(run, arguments, keywords, *tensors)
        return list(output) if self.gives_list else output


def _caller(
    op: torch._ops.OpOverload, first_derivative: _FirstDerivative, to_onnx: Callable, composed: Callable
) -> Callable:
    """``op`` without its autograd kernel, where plain tensors are called from plain Python: the way through the
    dispatcher to a kernel in Python and back is half of a small call. Compilers are asked for first, since they cannot
    ask for inference mode, which goes without by itself."""
    absent = {type(None)}

    def below(*arguments, **keywords):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **keywords)

    def call(*arguments, **keywords):
        if is_traced():
            return (to_onnx if torch.onnx.is_in_onnx_export() else op)(*arguments, **keywords)
        if torch.is_inference_mode_enabled() or is_transformed():
            return op(*arguments, **keywords)
        if (output := composed(*arguments)) is not None:
            return output
        tensors = first_derivative.tensors(arguments) if torch.is_grad_enabled() else ()
        if not torch._C._any_requires_grad(*tensors):
            return below(*arguments, **keywords)
        if torch._C._is_torch_function_mode_enabled() or set(map(type, tensors)).difference(plain_classes, absent):
            return op(*arguments, **keywords)
        return first_derivative.record(below, arguments, keywords, tensors)

    return call


def _never(*arguments) -> None:
    """Nothing is composed."""


def register_autograd(
    name: str,
    reference: Callable,
    backward: Callable,
    setup_context: Callable,
    to_onnx: Callable | None = None,
    composed: Callable = _never,
) -> Callable:
    """As ``torch.library.register_autograd``, but forward mode and ``torch.func`` run ``reference``, which takes and
    returns what the op does (torch's drops forward mode's tangents silently), and ``torch.vmap`` loops. Exporters to
    ONNX get ``to_onnx``, by default ``reference``: of a model as it is called, of a program of torch.export here.

    ``composed`` returns what the op does, too, computed by torch's ops under their own autograd, or None where the op
    is to be called. Returns the op, for calls that skip the way to its autograd kernel where they can."""
    op = getattr(torch.ops.rankkernels, name).default
    first_derivative = _FirstDerivative(op, backward, setup_context)
    to_onnx = reference if to_onnx is None else to_onnx

    def autograd(keyset, *arguments, **keywords):
        if is_transformed():
            return reference(*arguments, **keywords)
        if torch.onnx.is_in_onnx_export():
            return to_onnx(*arguments, **keywords)
        if (output := composed(*arguments)) is not None:
            return output
        run = _redispatching(op, keyset)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return run(*arguments, **keywords)
        return first_derivative.record(run, arguments, keywords, first_derivative.tensors(arguments))

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
    return _caller(op, first_derivative, to_onnx, composed)


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
