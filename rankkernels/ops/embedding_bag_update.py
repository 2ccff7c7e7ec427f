"""An optimizer's step on the rows that a batch looked up. Kernels and formulas: csrc/cpu/embedding_bag_update.h."""

from __future__ import annotations

import torch

from rankkernels.ops._library import lib, notice_reference
from rankkernels.ops.embedding_bag import FEATURES

#: Optimizers, by their number in the schema.
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "adamw")

# ``hyper`` holds lr, beta1, beta2, eps, weight_decay, the number of the step, the factor of the gradients (1 over the
# loss scale) and the norm that a row's gradient is clipped to (0: none), of each table; ``states`` the state
# of each table (none for sgd, the sum for both adagrads, the two moments for adam and adamw), in float32, float64 for
# a float64 table. Returned are the gradients of the per-sample weights.
lib.define(
    f"embedding_bag_update(Tensor?[] grad_outs, Tensor(a!)[] weights, Tensor(b!)[] states, {FEATURES}, int optimizer, "
    "float[] hyper) -> Tensor[] grad_per_sample_weights"
)
# The same for one table, given its coalesced gradient.
lib.define(
    "sparse_update(Tensor(a!) weight, Tensor(b!)[] states, Tensor rows, Tensor values, int optimizer, float[] hyper) "
    "-> ()"
)


@torch.library.impl(lib, "sparse_update", "CompositeExplicitAutograd")
def _(weight, states, rows, values, optimizer, hyper):
    notice_reference("sparse_update", weight)
    lr, beta1, beta2, eps, weight_decay, step, grad_factor, max_norm = hyper
    kind = OPTIMIZERS[optimizer]
    old = [s[rows] for s in states]
    dtype = states[0].dtype if states else torch.promote_types(weight.dtype, torch.float32)
    w, g = weight[rows].to(dtype), values.to(dtype) * grad_factor
    if max_norm:
        g = g * (max_norm / g.norm(dim=1, keepdim=True)).clamp(max=1)
    if kind == "adamw":
        w = w - lr * weight_decay * w
    else:
        g = g + weight_decay * w
    if kind == "sgd":
        w = w - lr * g
    elif kind == "adagrad":
        old[0] = old[0] + g * g
        w = w - lr * g / (old[0].sqrt() + eps)
    elif kind == "rowwise_adagrad":
        old[0] = old[0] + (g * g).mean(1)
        w = w - (lr / (old[0].sqrt() + eps))[:, None] * g
    else:
        old[0] = old[0] + (1 - beta1) * (g - old[0])
        old[1] = old[1] + (1 - beta2) * (g * g - old[1])
        correction1, root2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
        if kind == "adam":
            w = w - lr * root2 / correction1 * old[0] / (old[1].sqrt() + eps)
        else:
            w = w - lr / correction1 * old[0] / (old[1].sqrt() / root2 + eps)
    weight.index_copy_(0, rows, w.to(weight.dtype))
    for state, new in zip(states, old):
        state.index_copy_(0, rows, new)


@torch.library.impl(lib, "embedding_bag_update", "CompositeExplicitAutograd")
def _(grad_outs, weights, states, *rest):
    *features, optimizer, hyper = rest
    rows, values, grad_psw = torch.ops.rankkernels.embedding_bag_backward_sparse.default(
        grad_outs, weights, [w.size(0) for w in weights], *features
    )
    n, tables = len(states) // len(weights), features[3]
    for t in {tables[f] for f, g in enumerate(grad_outs) if g is not None}:
        torch.ops.rankkernels.sparse_update.default(
            weights[t], states[n * t : n * t + n], rows[t], values[t], optimizer, hyper[8 * t : 8 * t + 8]
        )
    return grad_psw


@torch.library.register_fake("rankkernels::sparse_update", lib=lib)
def _(weight, states, rows, values, optimizer, hyper):
    return None


@torch.library.register_fake("rankkernels::embedding_bag_update", lib=lib)
def _(grad_outs, weights, states, indices, offsets, per_sample_weights, *rest):
    return [w.new_empty(w.shape) for w in per_sample_weights]
