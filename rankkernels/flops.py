"""Formulas for ``torch.utils.flop_counter``: importing this module registers one for each op.

They count as torch's do: two for each multiply-add of a matrix product, nothing for what is elementwise or moves
memory. So a fused layer counts what its products need, which is less than torch-rechub's where fewer are done: DIN's
first layer a quarter. Padded rows count, since shapes are all that a formula sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from rankkernels.ops._rank_plan import Layer, Plan
from rankkernels.ops._schema import parsed
from rankkernels.ops.attention_params import Flags, Inputs

_OPS = torch.ops.rankkernels
_WITHOUT_PRODUCTS = [
    _OPS.fm_interaction, _OPS.fm_interaction_backward, _OPS.norm_activation, _OPS.norm_activation_backward,
    _OPS.cross_layer, _OPS.cross_layer_backward, _OPS.ffm_interaction, _OPS.ffm_interaction_backward,
    _OPS.embedding_bag, _OPS.embedding_bag_backward, _OPS.embedding_bag_backward_sparse, _OPS.embedding_bag_update,
    _OPS.sparse_update, _OPS.embedding_catch_up, _OPS.embedding_catch_up_all, _OPS.embedding_mark_steps,
    _OPS.adam_history, _OPS.embedding_bag_exact, _OPS.embedding_bag_exact_update, _OPS.frozen_rows,
]  # fmt: skip


@register_flop_formula(_WITHOUT_PRODUCTS)
def _none(*args, out_shape=None, **kwargs) -> int:
    return 0


def _din_attention(inputs: Sequence) -> tuple[int, int]:
    """Of a forward: the products of the attention MLP's layers over all rows; those of the targets and the pooling."""
    tensors, flags = parsed(inputs, Inputs, Flags)
    N, D = prod(tensors.history[:-1]), tensors.history[-1]
    if tensors.history_index is not None and tensors.offsets is None:  # of shared jagged ones only values say how many
        N = tensors.history_index[0] * tensors.history[1]
    first, *others = (shape for shape in tensors.params if len(shape) == 2)
    units, pooling = first[0], 0 if flags.return_scores else 2 * N * D
    return 2 * N * (D * units + sum(map(prod, others))), 2 * tensors.target[0] * D * units + pooling


@register_flop_formula(_OPS.din_attention)
def _din_attention_forward(*inputs, out_shape=None, **kwargs) -> int:
    return sum(_din_attention(inputs))


@register_flop_formula(_OPS.din_attention_backward)
def _din_attention_backward(grad_out, batch_stats, saved, *inputs, out_shape=None, **kwargs) -> int:
    """Two products for one, and the layers once more."""
    layers, others = _din_attention(inputs)
    return 3 * layers + 2 * others


@register_flop_formula([_OPS.cross_network, _OPS.cross_network_backward])
def _cross_network(*inputs, out_shape=None, **kwargs) -> int:
    """One skinny product; its operands' gradients are two. The recurrence is elementwise."""
    *grads, x, weights, _ = inputs
    return (4 if grads else 2) * prod(x) * len(weights)


@register_flop_formula([_OPS.pairwise_dot, _OPS.pairwise_dot_backward])
def _pairwise_dot(*inputs, out_shape=None, **kwargs) -> int:
    """A multiply-add for each pair and column; two in the backward."""
    *grads, (B, F, D), _ = inputs
    return (2 if grads else 1) * B * F * (F - 1) * D


@register_flop_formula([_OPS.bilinear_interaction, _OPS.bilinear_interaction_backward])
def _bilinear_interaction(*inputs, out_shape=None, **kwargs) -> int:
    """A product for each weight, of a field that has pairs; in the backward two more, and it once more."""
    *grads, (B, F, D), weights, kind = inputs
    return (3 if grads else 1) * 2 * B * D * D * max(len(weights) if kind == 2 else F - 1, 0)


@register_flop_formula([_OPS.mixed_experts, _OPS.mixed_experts_backward])
def _mixed_experts(*inputs, out_shape=None, **kwargs) -> int:
    """A product for each expert; in the backward two more, and it once more."""
    *grads, (B, _), weight = inputs
    return (3 if grads else 1) * 2 * B * prod(weight)


@register_flop_formula(_OPS.mixed_cross_layer)
def _mixed_cross_layer(x0, x, u, v, weight, gates, *_, backward=False, out_shape=None, **kwargs) -> int:
    """The products with V, the gates and U, and the experts'; in the backward each twice, the experts' once more."""
    B = x0[0]
    return 2 * B * ((1 + backward) * (2 * prod(u) + prod(gates)) + (1 + 2 * backward) * prod(weight))


@register_flop_formula(_OPS.mixed_cross_layer_backward)
def _mixed_cross_layer_backward(grad_out, projections, product, *layer, out_shape=None, **kwargs) -> int:
    return _mixed_cross_layer(*layer, backward=True)


@register_flop_formula(_OPS.embedding_fm)
def _embedding_fm(*args, out_shape=None, **kwargs) -> int:
    linear_weight = args[-2]
    return 0 if linear_weight is None else 2 * out_shape[1][0] * prod(linear_weight)


@register_flop_formula([_OPS.embedding_fm_backward, _OPS.embedding_fm_backward_sparse, _OPS.embedding_fm_update])
def _embedding_fm_backward(
    grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, *args, out_shape=None, **kwargs
) -> int:
    return 0 if linear_weight is None or grad_linear is None else 4 * embeddings[0] * prod(linear_weight)


@register_flop_formula(_OPS.deepfm)
def _deepfm(weights, indices, tables, names, linear_weight, dense, mlp, *args, out_shape=None, **kwargs) -> int:
    return 2 * out_shape[0] * sum(prod(shape) for shape in (linear_weight, *mlp) if len(shape) == 2)


@register_flop_formula(_OPS.linear_weight_grad)
def _linear_weight_grad(dy, x, *args, out_shape=None, **kwargs) -> int:
    return 2 * dy[0] * dy[1] * x[1]


@register_flop_formula(_OPS.augru)
def _augru(x, input_weight, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * x[1] * (prod(input_weight) + prod(weight))


@register_flop_formula(_OPS.augru_backward)
def _augru_backward(grad_out, out, *inputs, out_shape=None, **kwargs) -> int:
    """Two products for one, and that once more."""
    return 3 * _augru(*inputs)


@register_flop_formula(_OPS.target_attention)
def _target_attention(query, history, lengths, mask, offsets, *args, out_shape=None, **kwargs) -> int:
    """Of jagged histories only values say how many rows each sample has: as many as all samples share."""
    rows = history[0] if offsets is not None else query[0] * history[1]
    return 4 * rows * prod(query[1:])


@register_flop_formula(_OPS.target_attention_backward)
def _target_attention_backward(grad_out, out, stats, *inputs, out_shape=None, **kwargs) -> int:
    return 5 * _target_attention(*inputs) // 2


def _of_candidate(layers: Sequence[Layer], inputs: int) -> int:
    """Multiply-adds of the layers, the first of so many inputs, and of the score behind the last."""
    if not layers:
        return 0
    first, *others = layers
    return inputs * first.units + sum(layer.inputs * layer.units for layer in others) + layers[-1].units


@register_flop_formula(_OPS.rank, get_raw=True)
def _rank(inputs, sides, tables, weights, plan, names, candidates, *, out_val=None, **kwargs) -> int:
    """The candidates' products: what is the user's is computed once. Rows of a history that are equal count each."""
    plan = Plan.decode(plan)

    def width(lookup: int) -> int:
        return plan.tables[plan.lookups[lookup].table].width

    columns = sum(d.width for d in plan.dense if d.column >= 0 and not sides[d.input])
    columns += sum(
        width(i) for i, each in enumerate(plan.lookups) if each.column >= 0 and not (each.history or sides[each.input])
    )
    attention = 0
    for unit in plan.units:
        L, D = inputs[plan.lookups[unit.histories[0]].input].numel(), sum(map(width, unit.histories))
        attention += L * (_of_candidate(unit.layers, D) + D)
        columns += D
    return 2 * candidates * (attention + _of_candidate(plan.layers, columns))


if torch.ops.mkldnn._linear_pointwise not in flop_registry:  # torch's own, but it has no formula for it

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_pointwise(x, weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * x[0] * prod(weight)
