"""Bad input to every schema: arguments, and the text of the error that the kernels, the fake and the reference raise.

An entry says which arguments change in a call that is right without it, and the text behind the op's name.
"""

from __future__ import annotations

import torch

from rankkernels.ops._activations import ACTIVATIONS

RELU, PRELU, DICE, DICE_BN = (list(ACTIVATIONS).index(n) for n in ("relu", "prelu", "dice", "dice_batch_norm"))
B, L, D, H = 3, 4, 5, 6


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def fm():
    return dict(x=randn(B, 3, D), reduce_sum=True)


def fm_backward():
    return dict(grad_out=randn(B, 1), **fm())


def cross_network():
    return dict(x=randn(B, D), weights=[randn(1, D), randn(1, D)], biases=[randn(D), randn(D)])


def cross_network_backward():
    return dict(grad_out=randn(B, D), projections=randn(B, 2), **cross_network())


def pairwise_dot():
    return dict(embeddings=randn(B, 3, D), field_weights=randn(3))


def pairwise_dot_backward():
    return dict(grad_out=randn(B, 3), **pairwise_dot())


def cross_layer():
    return dict(x0=randn(B, D), product=randn(B, D), x=randn(B, D), bias=randn(D))


def cross_layer_backward():
    return dict(grad_out=randn(B, D), x0=randn(B, D), product=randn(B, D), has_bias=True)


def mixed_experts():
    return dict(projections=randn(B, 8), weight=randn(2, 3, 3))


def mixed_experts_backward():
    return dict(grad_out=randn(B, 6), **mixed_experts())


def mixed_cross_layer():
    layer = dict(x0=randn(B, D), x=randn(B, D), u=randn(2, D, 3), v=randn(2, D, 3), weight=randn(2, 3, 3))
    return dict(**layer, gates=randn(2, D), bias=randn(D), keep_product=True)


def mixed_cross_layer_backward():
    layer = mixed_cross_layer()
    del layer["keep_product"]
    return dict(grad_out=randn(B, D), projections=randn(B, 8), product=randn(B, D), **layer)


def ffm_interaction():
    return dict(x=randn(B, 3, 3, D), reduce_sum=True)


def ffm_interaction_backward():
    return dict(grad_out=randn(B, 3, 1), **ffm_interaction())


def bilinear_interaction():
    return dict(x=randn(B, 3, D), weights=[randn(D, D), randn(D, D)], kind=1)


def bilinear_interaction_backward():
    return dict(grad_out=randn(B, 3, D), **bilinear_interaction())


def linear_weight_grad():
    return dict(dy=randn(4, 3), x=randn(4, 5))


def norm():
    return dict(
        x=randn(4, H), weight=randn(H), bias=randn(H), alpha=randn(1), running_mean=randn(H), running_var=torch.ones(H),
        activation=PRELU, batch_norm=True, training=True, norm_eps=1e-5, dice_eps=1e-3,
    )  # fmt: skip


def norm_backward():
    return dict(grad_out=randn(4, H), batch_stats=torch.ones(2 * H), **norm())


def augru():
    return dict(
        x=randn(B, L, H), input_weight=randn(3 * D, H), weight=randn(3 * D, D), bias=randn(4, D),
        attention=torch.rand(B, L), lengths=torch.tensor([0, 2, L]),
    )  # fmt: skip


def augru_backward():
    return dict(grad_out=randn(B, L, D), out=randn(B, L, D), **augru())


def target_attention():
    return dict(
        query=randn(B, 2, D), history=randn(B, L, D), lengths=torch.tensor([0, 2, L]), mask=None, offsets=None,
        history_index=None,
    )  # fmt: skip


def target_attention_backward():
    return dict(grad_out=randn(B, 2, D), out=randn(B, 2, D), stats=torch.ones(B, 2, 2), **target_attention())


INDEX = torch.zeros(B).long()


def din():
    params = [randn(H, 4 * D), randn(H), torch.ones(H), torch.zeros(H), randn(1), randn(1, H), randn(1)]
    return dict(
        history=randn(B, L, D), target=randn(B, D), lengths=None, mask=None, offsets=None, history_index=None,
        params=params, running_stats=[], activation=DICE, batch_norm=True, use_softmax=False, count_padding=False,
        return_scores=False, training=True, norm_eps=1e-5, dice_eps=1e-3, dropout=0.0, seed=None, group="",
    )  # fmt: skip


def din_backward():
    saved = B * L * (1 + 2 + H)
    return dict(grad_out=randn(B, D), batch_stats=torch.ones(2 * H), saved=torch.zeros(saved), **din())


def deepfm():
    width = 2 * D + 1
    return dict(
        weights=[randn(9, D), randn(7, D)], indices=[torch.arange(B), torch.arange(B)], tables=[0, 1],
        names="item\nshop", linear_weight=randn(2 * D), dense=randn(B, 1),
        mlp=[randn(4, width), randn(4), randn(1, 4), randn(1)],
    )  # fmt: skip


def lookup():
    """Two features of two tables, the second one pooled."""
    return dict(
        weights=[randn(5, 4), randn(6, 4)], indices=[torch.tensor([1, 2]), torch.tensor([[3], [4]])], offsets=[],
        per_sample_weights=[], tables=[0, 1], modes=[0, 1], padding_idx=[-1, -1], frozen_rows=[-1, -1], known=[],
    )  # fmt: skip


def embedding_bag():
    return dict(**lookup(), names="a\nb")


def embedding_bag_backward():
    weights, *features = lookup().items()
    return dict([("grad_outs", [torch.ones(2, 4), torch.ones(2, 4)]), weights, ("rows", [5, 6]), *features])


def embedding_bag_update():
    weights, *features = lookup().items()
    grads, step = ("grad_outs", [torch.ones(2, 4), torch.ones(2, 4)]), dict(optimizer=0, hyper=HYPER * 2)
    return dict([grads, weights, ("states", []), *features, *step.items()])


def embedding_fm():
    return dict(**lookup(), names="a\nb", linear_weight=None, dense=None)


def embedding_fm_backward():
    return dict(
        grad_embeddings=torch.ones(2, 8), grad_fm=None, grad_linear=None, embeddings=torch.ones(2, 8),
        linear_weight=None, dim=4,
    )  # fmt: skip


def embedding_fm_backward_sparse():
    weights, *features = lookup().items()
    return dict([*embedding_fm_backward().items(), weights, ("unchanged", False), ("rows", [5, 6]), *features])


def embedding_fm_update():
    _, weights, *rest = embedding_bag_update().items()
    return dict([*embedding_fm_backward().items(), weights, ("unchanged", False), *rest])


def sparse_update():
    rows, values = torch.tensor([0, 1]), torch.ones(2, 2)
    return dict(weight=torch.ones(3, 2), states=[], rows=rows, values=values, optimizer=0, hyper=HYPER)


HYPER = [0.1, 0.9, 0.9, 1e-8, 0.0, 1.0, 1.0, 0.0, 0.0]
MAKE = {
    "fm_interaction": fm, "fm_interaction_backward": fm_backward, "cross_network": cross_network,
    "cross_network_backward": cross_network_backward, "pairwise_dot": pairwise_dot,
    "pairwise_dot_backward": pairwise_dot_backward, "cross_layer": cross_layer,
    "cross_layer_backward": cross_layer_backward, "mixed_experts": mixed_experts,
    "mixed_experts_backward": mixed_experts_backward, "mixed_cross_layer": mixed_cross_layer,
    "mixed_cross_layer_backward": mixed_cross_layer_backward, "ffm_interaction": ffm_interaction,
    "ffm_interaction_backward": ffm_interaction_backward, "bilinear_interaction": bilinear_interaction,
    "bilinear_interaction_backward": bilinear_interaction_backward, "linear_weight_grad": linear_weight_grad,
    "norm_activation": norm, "norm_activation_backward": norm_backward, "din_attention": din,
    "din_attention_backward": din_backward, "deepfm": deepfm, "embedding_bag": embedding_bag,
    "embedding_bag_backward": embedding_bag_backward, "embedding_bag_backward_sparse": embedding_bag_backward,
    "embedding_bag_update": embedding_bag_update, "embedding_fm": embedding_fm,
    "embedding_fm_backward": embedding_fm_backward, "embedding_fm_backward_sparse": embedding_fm_backward_sparse,
    "embedding_fm_update": embedding_fm_update, "sparse_update": sparse_update, "augru": augru,
    "augru_backward": augru_backward, "target_attention": target_attention,
    "target_attention_backward": target_attention_backward,
}  # fmt: skip


class Entry:
    """Of a list argument, with another tensor in one place."""

    def __init__(self, at: int, value):
        self.at, self.value = at, value

    def put(self, values: list) -> list:
        return [*values[: self.at], self.value, *values[self.at :][1:]]


EVAL = dict(training=False, running_stats=[torch.zeros(H), torch.ones(H)])
FLOATING = "must be float32, float64, float16 or bfloat16, got "
OTHER_DTYPES = (
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16, torch.int8, torch.bool
)  # fmt: skip
SAVED = B * L * (3 + H)


def form(name: str, shape: list[int], got: list[int], dtype: str = "float32") -> str:
    return f"{name} must be torch.float32 {shape} on cpu, got torch.{dtype} {got} on cpu"


#: By op: arguments that change, and the text of the error behind the op's name.
BAD_INPUTS = {
    "fm_interaction": [
        (dict(x=randn(3, 4)), "x must have 3 dimensions, got 2 (shape [3, 4])"),
        (dict(x=randn()), "x must have 3 dimensions, got 0 (shape [])"),
        (dict(x=torch.ones(2, 3, 4).long()), f"x {FLOATING}torch.int64"),
        (dict(x=torch.ones(2, 3, 4).byte()), f"x {FLOATING}torch.uint8"),
        *((dict(x=torch.empty(2, 3, 4, dtype=dtype)), f"x {FLOATING}{dtype}") for dtype in OTHER_DTYPES),
    ],
    "fm_interaction_backward": [
        (dict(grad_out=randn(B, D)), form("grad_out", [B, 1], [B, D])),
        (dict(grad_out=randn(B)), form("grad_out", [B, 1], [B])),
        (dict(grad_out=randn(B, 1).double()), form("grad_out", [B, 1], [B, 1], "float64")),
        (dict(reduce_sum=False), form("grad_out", [B, D], [B, 1])),
    ],
    "cross_network": [
        (dict(x=randn(2, 3, D)), f"x must have 2 dimensions, got 3 (shape [2, 3, {D}])"),
        *((dict(x=torch.empty(B, D, dtype=dtype)), f"x {FLOATING}{dtype}") for dtype in OTHER_DTYPES),
        (dict(biases=[randn(D)]), "there must be a bias for each of 2 weights, got 1"),
        (dict(weights=Entry(1, randn(D))), form("weights[1]", [1, D], [D])),
        (dict(weights=Entry(0, randn(1, D).double())), form("weights[0]", [1, D], [1, D], "float64")),
        (dict(biases=Entry(1, randn(D + 1))), form("biases[1]", [D], [D + 1])),
    ],
    "cross_network_backward": [
        (dict(grad_out=randn(B, 1)), form("grad_out", [B, D], [B, 1])),
        (dict(projections=randn(B, 3)), form("projections", [B, 2], [B, 3])),
        (dict(biases=[]), "there must be a bias for each of 2 weights, got 0"),
    ],
    "pairwise_dot": [
        (dict(embeddings=randn(3, 4)), "embeddings must have 3 dimensions, got 2 (shape [3, 4])"),
        *((dict(embeddings=torch.empty(B, 3, D, dtype=t)), f"embeddings {FLOATING}{t}") for t in OTHER_DTYPES),
        (dict(field_weights=randn(4)), form("field_weights", [3], [4])),
        (dict(field_weights=randn(3).double()), form("field_weights", [3], [3], "float64")),
    ],
    "pairwise_dot_backward": [
        (dict(grad_out=randn(B, 4)), form("grad_out", [B, 3], [B, 4])),
        (dict(grad_out=randn(3)), form("grad_out", [B, 3], [3])),
        (dict(field_weights=randn(1, 3)), form("field_weights", [3], [1, 3])),
    ],
    "cross_layer": [
        (dict(x0=randn(D)), f"x0 must have 2 dimensions, got 1 (shape [{D}])"),
        (dict(x0=torch.ones(B, D).long()), f"x0 {FLOATING}torch.int64"),
        (dict(product=randn(B, 1)), form("product", [B, D], [B, 1])),
        (dict(x=randn(B, D).double()), form("x", [B, D], [B, D], "float64")),
        (dict(bias=randn(1, D)), form("bias", [D], [1, D])),
    ],
    "cross_layer_backward": [
        (dict(grad_out=randn(B)), form("grad_out", [B, D], [B])),
        (dict(product=randn(B, D + 1)), form("product", [B, D], [B, D + 1])),
    ],
    "mixed_experts": [
        (dict(projections=randn(8)), "projections must have 2 dimensions, got 1 (shape [8])"),
        (dict(projections=torch.ones(B, 8).long()), f"projections {FLOATING}torch.int64"),
        (dict(projections=randn(B, 6)), form("projections", [B, 8], [B, 6])),
        (dict(weight=randn(2, 9)), "weight must be [E, r, r], got [2, 9]"),
        (dict(weight=randn(2, 3, 4)), "weight must be [E, r, r], got [2, 3, 4]"),
        (dict(weight=randn(2, 3, 3).double()), form("weight", [2, 3, 3], [2, 3, 3], "float64")),
    ],
    "mixed_experts_backward": [
        (dict(grad_out=randn(B, 8)), form("grad_out", [B, 6], [B, 8])),
        (dict(weight=randn(3, 3, 3)), form("projections", [B, 12], [B, 8])),
    ],
    "mixed_cross_layer": [
        (dict(x0=randn(D)), f"x0 must have 2 dimensions, got 1 (shape [{D}])"),
        (dict(x0=torch.ones(B, D).long()), f"x0 {FLOATING}torch.int64"),
        (dict(x=randn(B, D + 1)), form("x", [B, D], [B, D + 1])),
        (dict(u=randn(2, 3, D)), form("u", [2, D, 3], [2, 3, D])),
        (dict(v=randn(1, D, 3)), form("v", [2, D, 3], [1, D, 3])),
        (dict(weight=randn(2, 3, 4)), "weight must be [E, r, r], got [2, 3, 4]"),
        (dict(weight=randn(2, 3, 3).double()), form("weight", [2, 3, 3], [2, 3, 3], "float64")),
        (dict(gates=randn(1, D)), form("gates", [2, D], [1, D])),
        (dict(bias=randn(D, 1)), form("bias", [D], [D, 1])),
    ],
    "mixed_cross_layer_backward": [
        (dict(grad_out=randn(B)), form("grad_out", [B, D], [B])),
        (dict(projections=randn(B, 6)), form("projections", [B, 8], [B, 6])),
        (dict(product=randn(0, D)), form("product", [B, D], [0, D])),
    ],
    "ffm_interaction": [
        (dict(x=randn(B, 9, D)), f"x must have 4 dimensions, got 3 (shape [{B}, 9, {D}])"),
        (dict(x=torch.ones(B, 3, 3, D).int()), f"x {FLOATING}torch.int32"),
        (dict(x=randn(B, 3, 2, D)), f"x must be [B, F, F, D], got [{B}, 3, 2, {D}]"),
    ],
    "ffm_interaction_backward": [
        (dict(grad_out=randn(B, 3, D)), form("grad_out", [B, 3, 1], [B, 3, D])),
        (dict(reduce_sum=False), form("grad_out", [B, 3, D], [B, 3, 1])),
    ],
    "bilinear_interaction": [
        (dict(x=randn(B, D)), f"x must have 3 dimensions, got 2 (shape [{B}, {D}])"),
        (dict(x=torch.ones(B, 3, D).bool()), f"x {FLOATING}torch.bool"),
        (dict(kind=3), "kind must be 0 .. 2, got 3"),
        (dict(kind=-1), "kind must be 0 .. 2, got -1"),
        (dict(kind=0), "field_all of 3 fields needs 1 weights, got 2"),
        (dict(kind=2), "field_interaction of 3 fields needs 3 weights, got 2"),
        (dict(weights=[]), "field_each of 3 fields needs 2 weights, got 0"),
        (dict(weights=Entry(1, randn(D, 1))), form("weights[1]", [D, D], [D, 1])),
    ],
    "bilinear_interaction_backward": [
        (dict(grad_out=randn(B, 3)), form("grad_out", [B, 3, D], [B, 3])),
        (dict(weights=Entry(0, randn(D, D).double())), form("weights[0]", [D, D], [D, D], "float64")),
    ],
    "linear_weight_grad": [
        (dict(x=randn(5)), "x must have 2 dimensions, got 1 (shape [5])"),
        (dict(dy=randn(3, 3)), "x must have the rows of dy, 3, got 4"),
        (dict(dy=randn(4, 3).double()), "dy must be torch.float32, got torch.float64"),
        (dict(x=randn(4, 5).half()), "x must be torch.float32, got torch.float16"),
    ],
    "norm_activation": [
        (dict(x=randn(4)), "x must have 2 dimensions, got 1 (shape [4])"),
        (dict(x=torch.ones(4, H).int()), f"x {FLOATING}torch.int32"),
        (dict(activation=7), "activation must be 0 .. 6, got 7"),
        (dict(activation=-1), "activation must be 0 .. 6, got -1"),
        (dict(activation=2**40), f"activation must be 0 .. 6, got {2**40}"),
        (dict(alpha=None), "activation 4 needs an alpha"),
        (dict(activation=RELU), "activation 2 has no alpha"),
        (dict(alpha=randn(2)), f"alpha must be [H] = [{H}] or [1], got [2]"),
        (dict(alpha=torch.ones(1).int()), f"alpha {FLOATING}torch.int32"),
        (dict(weight=randn(1, H)), f"weight must be [H] = [{H}], got [1, {H}]"),
        (dict(bias=None), "give both weight and bias, or neither"),
        (dict(batch_norm=False), "weight and bias belong to batch_norm"),
        (dict(running_var=None, training=False), "give running_mean and running_var, or training"),
        (dict(running_var=torch.ones(H - 1), training=False), f"running_var must be [H] = [{H}], got [{H - 1}]"),
        (dict(x=randn(1, H)), "training needs more than one row, got 1"),
        (dict(norm_eps=-1.0), "norm_eps must be positive in training, got -1"),
        (dict(norm_eps=0.0), "norm_eps must be positive in training, got 0"),
        (dict(norm_eps=float("nan")), "norm_eps must be positive in training, got nan"),
        (dict(norm_eps=-0.5, training=False), "norm_eps must not be negative, got -0.5"),
        (dict(activation=DICE, dice_eps=-1e-3), "dice_eps must not be negative, got -0.001"),
        (
            dict(activation=DICE_BN, alpha=randn(H), batch_norm=False, weight=None, bias=None),
            "dice_batch_norm needs batch_norm",
        ),
    ],
    "norm_activation_backward": [
        (dict(activation=9), "activation must be 0 .. 6, got 9"),
        (dict(grad_out=randn(4, H - 1)), form("grad_out", [4, H], [4, H - 1])),
        (dict(grad_out=randn(4, H).half()), form("grad_out", [4, H], [4, H], "float16")),
        (dict(batch_stats=randn(H)), form("batch_stats", [2 * H], [H])),
        (dict(batch_stats=randn()), form("batch_stats", [2 * H], [])),
        (dict(batch_stats=torch.ones(2 * H).byte()), form("batch_stats", [2 * H], [2 * H], "uint8")),
        (dict(training=False), form("batch_stats", [0], [2 * H])),
    ],
    "din_attention": [
        (dict(target=randn(D)), f"target must be [B, D], got shape [{D}]"),
        (dict(history=randn(L, D)), f"history must be [B, L, D], got shape [{L}, {D}]"),
        (dict(history=randn()), "history must be [B, L, D], got shape []"),
        (dict(offsets=torch.arange(4)), f"history must be [N, D] beside offsets, got shape [{B}, {L}, {D}]"),
        (dict(history=randn(B, L, D + 1)), f"history and target must have one width D, got {D + 1} and {D}"),
        (dict(history=randn(B + 1, L, D)), f"history and target must have one batch size B, got {B + 1} and {B}"),
        (dict(history=torch.ones(B, L, D).int()), f"history {FLOATING}torch.int32"),
        (
            dict(target=randn(B, D).double()),
            "history and target must have one dtype, got torch.float32 and torch.float64",
        ),
        (dict(lengths=torch.ones(B + 1).long()), f"lengths must be [B] = [{B}], got shape [{B + 1}]"),
        (dict(lengths=torch.ones(())), f"lengths must be [B] = [{B}], got shape []"),
        (dict(lengths=torch.ones(B)), "lengths must be int32 or int64, got torch.float32"),
        (dict(lengths=torch.ones(B).short()), "lengths must be int32 or int64, got torch.int16"),
        (dict(mask=torch.ones(B, L + 1).bool()), f"mask must be [B, L] = [{B}, {L}], got shape [{B}, {L + 1}]"),
        (dict(mask=torch.ones(B, L).byte()), "mask must be bool, true at valid rows, got torch.uint8"),
        (
            dict(mask=torch.ones(B, L).bool(), lengths=torch.ones(B).long()),
            "give one of lengths, mask and offsets, got lengths and mask",
        ),
        (dict(history=randn(B, D), offsets=torch.arange(B)), f"offsets must be [B + 1] = [{B + 1}], got shape [{B}]"),
        (dict(history=randn(B, D), offsets=torch.arange(B + 1.0)), "offsets must be int32 or int64, got torch.float32"),
        (dict(history_index=torch.zeros(B + 1).long()), f"history_index must be [B] = [{B}], got shape [{B + 1}]"),
        (dict(history_index=torch.zeros(B, 1).long()), f"history_index must be [B] = [{B}], got shape [{B}, 1]"),
        (dict(history_index=torch.zeros(B)), "history_index must be int32 or int64, got torch.float32"),
        (dict(history_index=torch.zeros(B).bool()), "history_index must be int32 or int64, got torch.bool"),
        (dict(history_index=INDEX, history=randn(L, D)), f"history must be [U, L, D], got shape [{L}, {D}]"),
        (
            dict(history_index=INDEX, history=randn(5, L, D), lengths=INDEX),
            f"lengths must be [U] = [5], got shape [{B}]",
        ),
        (
            dict(history_index=INDEX, history=randn(5, L, D), mask=torch.ones(B, L).bool()),
            f"mask must be [U, L] = [5, {L}], got shape [{B}, {L}]",
        ),
        (
            dict(history_index=INDEX, history=randn(B, D), offsets=torch.ones(0).long()),
            "offsets must be [U + 1], got shape [0]",
        ),
        (dict(params=[]), "params must be 5 tensors a hidden layer and 2 of the output layer, got 0"),
        (dict(params=[randn(1, 1)] * 6), "params must be 5 tensors a hidden layer and 2 of the output layer, got 6"),
        (
            dict(params=Entry(0, randn(H, 4 * D - 1))),
            f"the weight of hidden layer 0 must be [H, {4 * D}], got shape [{H}, {4 * D - 1}]",
        ),
        (dict(params=Entry(0, randn(H))), f"the weight of hidden layer 0 must be [H, {4 * D}], got shape [{H}]"),
        (dict(params=Entry(1, randn(H + 1))), f"hidden layer 0 needs vectors of {H} values, got [{H + 1}]"),
        (
            dict(params=Entry(4, randn(2))),
            f"hidden layer 0 needs vectors of {H} values, its slope may have one, got [2]",
        ),
        (
            dict(params=Entry(5, randn(1, H + 1))),
            f"the output layer must be [1, {H}] with a bias [1], got [1, {H + 1}] and [1]",
        ),
        (dict(params=Entry(6, randn(2))), f"the output layer must be [1, {H}] with a bias [1], got [1, {H}] and [2]"),
        (dict(params=Entry(3, torch.ones(H).long())), f"params[3] {FLOATING}torch.int64"),
        (EVAL | dict(running_stats=[]), "running_stats must hold 2 tensors for each of 1 norms, got 0"),
        (
            EVAL | dict(running_stats=[torch.zeros(H)] * 3),
            "running_stats must hold 2 tensors for each of 1 norms, got 3",
        ),
        (EVAL | dict(running_stats=[torch.zeros(H), torch.ones(2, 3)]), f"running_stats[1] must be [{H}], got [2, 3]"),
        (EVAL | dict(running_stats=[torch.zeros(H), torch.ones(H).int()]), f"running_stats[1] {FLOATING}torch.int32"),
        (
            EVAL | dict(params=[randn(1, 4 * D), randn(1)]),
            "running_stats must hold 2 tensors for each of 0 norms, got 2",
        ),
        (dict(activation=7), "activation must be 0 .. 6, got 7"),
        (dict(activation=-3), "activation must be 0 .. 6, got -3"),
        (dict(norm_eps=0.0), "norm_eps must be positive in training, got 0"),
        (EVAL | dict(norm_eps=float("nan")), "norm_eps must not be negative, got nan"),
        (dict(dice_eps=-1.0), "dice_eps must not be negative, got -1"),
        (dict(dropout=1.5, seed=torch.tensor(1)), "dropout must be a probability, got 1.5"),
        (dict(dropout=float("nan"), seed=torch.tensor(1)), "dropout must be a probability, got nan"),
        (dict(dropout=0.5), "dropout needs a seed of one int64, got none"),
        (dict(dropout=0.5, seed=torch.tensor([1, 2])), "dropout needs a seed of one int64, got [2] torch.int64"),
        (dict(dropout=0.5, seed=torch.ones(0).long()), "dropout needs a seed of one int64, got [0] torch.int64"),
        (dict(dropout=0.5, seed=torch.tensor(1).int()), "dropout needs a seed of one int64, got [] torch.int32"),
    ],
    "din_attention_backward": [
        (dict(grad_out=randn(B, D + 1)), form("grad_out", [B, D], [B, D + 1])),
        (dict(grad_out=randn(B, D).double()), form("grad_out", [B, D], [B, D], "float64")),
        (dict(return_scores=True), form("grad_out", [B, L], [B, D])),
        (dict(batch_stats=randn(0)), form("batch_stats", [2 * H], [0])),
        (dict(batch_stats=randn(2 * H).half()), form("batch_stats", [2 * H], [2 * H], "float16")),
        (dict(saved=randn(7)), form("saved", [SAVED], [7])),
        (dict(saved=randn()), form("saved", [SAVED], [])),
        (dict(saved=torch.zeros(SAVED).bfloat16()), form("saved", [SAVED], [SAVED], "bfloat16")),
    ],
    "augru": [
        (dict(x=randn(B, H)), f"x must have 3 dimensions, got 2 (shape [{B}, {H}])"),
        (dict(x=torch.ones(B, L, H).int()), f"x {FLOATING}torch.int32"),
        (dict(weight=randn(3 * D)), f"weight must be [3 D, D], got shape [{3 * D}]"),
        (dict(weight=randn(D, D)), f"weight must be [3 D, D], got shape [{D}, {D}]"),
        (dict(weight=randn(3 * D, D).double()), form("weight", [3 * D, D], [3 * D, D], "float64")),
        (dict(input_weight=randn(3 * D, H + 1)), form("input_weight", [3 * D, H], [3 * D, H + 1])),
        (dict(x=randn(B, L, 7)), form("input_weight", [3 * D, 7], [3 * D, H])),
        (dict(bias=randn(D)), form("bias", [4, D], [D])),
        (dict(attention=torch.rand(B, L + 1)), form("attention", [B, L], [B, L + 1])),
        (dict(attention=torch.rand(B, L).half()), form("attention", [B, L], [B, L], "float16")),
        (dict(lengths=torch.ones(B + 1).long()), f"lengths must be [B] = [{B}], got shape [{B + 1}]"),
        (dict(lengths=torch.ones(B)), "lengths must be int32 or int64, got torch.float32"),
    ],
    "augru_backward": [
        (dict(grad_out=randn(B, L)), form("grad_out", [B, L, D], [B, L])),
        (dict(out=randn(B, L, D).double()), form("out", [B, L, D], [B, L, D], "float64")),
    ],
    "target_attention": [
        (dict(query=randn(B, D)), f"query must have 3 dimensions, got 2 (shape [{B}, {D}])"),
        (dict(query=torch.ones(B, 2, D).int()), f"query {FLOATING}torch.int32"),
        (dict(mask=torch.ones(B, L).bool()), "give one of lengths, mask and offsets"),
        (dict(history=randn(B, D)), f"history must be [B, L, D] of D = {D} columns, got shape [{B}, {D}]"),
        (
            dict(lengths=None, offsets=torch.arange(B + 1)),
            f"history must be [N, D] of D = {D} columns, got shape [{B}, {L}, {D}]",
        ),
        (dict(history=randn(B, L, 2)), f"history must be [B, L, D] of D = {D} columns, got shape [{B}, {L}, 2]"),
        (
            dict(history=randn(B, L, D).double()),
            "history must have the dtype and device of query, torch.float32, got torch.float64",
        ),
        (dict(history=randn(2, L, D)), f"history and query must have one batch size B, got 2 and {B}"),
        (dict(lengths=torch.ones(B + 1).long()), f"lengths must be [B] = [{B}], got shape [{B + 1}]"),
        (dict(lengths=torch.ones(B)), "lengths must be int32 or int64, got torch.float32"),
        (
            dict(lengths=None, mask=torch.ones(B, L + 1).bool()),
            f"mask must be [B, L] = [{B}, {L}], got shape [{B}, {L + 1}]",
        ),
        (
            dict(lengths=None, mask=torch.ones(B, L).byte()),
            "mask must be bool, true at valid rows, got torch.uint8",
        ),
        (
            dict(lengths=None, history=randn(B, D), offsets=torch.arange(B)),
            f"offsets must be [B + 1] = [{B + 1}], got shape [{B}]",
        ),
        (
            dict(lengths=None, history=randn(B, D), offsets=torch.arange(0)),
            "offsets must be [B + 1], got shape [0]",
        ),
        (dict(history_index=torch.zeros(B + 1).long()), f"history_index must be [B] = [{B}], got shape [{B + 1}]"),
        (dict(history_index=torch.zeros(B)), "history_index must be int32 or int64, got torch.float32"),
        (
            dict(history_index=torch.zeros(B).long(), history=randn(5, L, D)),
            f"lengths must be [U] = [5], got shape [{B}]",
        ),
    ],
    "target_attention_backward": [
        (dict(grad_out=randn(B, D)), form("grad_out", [B, 2, D], [B, D])),
        (dict(out=randn(B, 2, D).double()), form("out", [B, 2, D], [B, 2, D], "float64")),
        (dict(stats=torch.ones(B, 2)), form("stats", [B, 2, 2], [B, 2])),
    ],
    "deepfm": [
        (dict(weights=[]), "weights and indices must not be empty lists"),
        (dict(indices=[]), "weights and indices must not be empty lists"),
        (dict(tables=[0]), "tables must have one entry a feature, 2, got 1"),
        (dict(tables=[0, 2]), "shop has table 2 of 2"),
        (dict(tables=[0, -1]), "shop has table -1 of 2"),
        (dict(weights=Entry(1, randn(7))), "weights[1] must be [R, D], got shape [7]"),
        (
            dict(weights=Entry(1, randn(7, D + 1))),
            f"weights[1] must be [R, {D}] torch.float32, got shape [7, {D + 1}] and torch.float32",
        ),
        (
            dict(weights=Entry(0, randn(9, D).half())),
            f"weights[0] must be [R, {D}] torch.float32, got shape [9, {D}] and torch.float16",
        ),
        (dict(indices=Entry(1, torch.arange(B + 1))), f"shop must be [{B}], got shape [{B + 1}]"),
        (dict(indices=Entry(1, torch.arange(B)[:, None])), f"shop must be [{B}], got shape [{B}, 1]"),
        (dict(indices=Entry(1, torch.arange(B + 0.0))), "shop must be int32 or int64, got torch.float32"),
        (
            dict(linear_weight=randn(3)),
            f"linear_weight must have one value a column of the embeddings, {2 * D}, and their dtype and device, "
            "torch.float32 on cpu, got shape [3] and torch.float32 on cpu",
        ),
        (
            dict(dense=randn(B)),
            f"dense must be [B, n] with B = {B} like the embeddings, torch.float32 on cpu, got shape [{B}] "
            "and torch.float32 on cpu",
        ),
        (
            dict(dense=randn(B, 1).double()),
            f"dense must be [B, n] with B = {B} like the embeddings, torch.float32 on cpu, got shape [{B}, 1] "
            "and torch.float64 on cpu",
        ),
        (dict(mlp=[]), "mlp must be the weight and the bias of each of two layers or more, got 0 tensors"),
        (
            dict(mlp=[randn(1, 2 * D + 1), randn(1)]),
            "mlp must be the weight and the bias of each of two layers or more, got 2 tensors",
        ),
        (
            dict(mlp=Entry(0, randn(4, 3))),
            f"mlp's layer 0 must have a weight [H, {2 * D + 1}] and its bias, got shapes [4, 3] and [4]",
        ),
        (
            dict(mlp=Entry(1, randn(5))),
            f"mlp's layer 0 must have a weight [H, {2 * D + 1}] and its bias, got shapes [4, {2 * D + 1}] and [5]",
        ),
        (
            dict(mlp=Entry(2, randn(2, 4))),
            "mlp's layer 1 must have a weight [1, 4] and its bias, got shapes [2, 4] and [1]",
        ),
        (dict(mlp=Entry(3, randn(1).double())), "mlp's layer 1 must be torch.float32, got torch.float64 on cpu"),
    ],
}


def features(a: str, b: str) -> list[tuple[dict, str]]:
    """Of every op that takes a lookup's features, which it calls ``a`` and ``b``."""
    row, absent = "must be -1 or a row of its table with", [torch.empty(0), torch.tensor([0, 1])]
    flat = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    return [
        (dict(tables=[0, 2]), f"{b} has table 2 of 2"),
        (dict(tables=[-1, 1]), f"{a} has table -1 of 2"),
        (dict(modes=[0, 4]), f"{b} has unknown mode 4"),
        (dict(modes=[0, -1]), f"{b} has unknown mode -1"),
        (dict(padding_idx=[-1, 6]), f"padding_idx of {b} {row} 6 rows, got 6"),
        (dict(frozen_rows=[-2, -1]), f"frozen_rows[0] {row} 5 rows, got -2"),
        (dict(padding_idx=[-1, -1, 0]), "padding_idx must have one entry a feature, 2, got 3"),
        (dict(modes=[0]), "modes must have one entry a feature, 2, got 1"),
        (dict(frozen_rows=[-1]), "frozen_rows must have one entry a table, 2, got 1"),
        (dict(known=[0, 0, -1]), "known must have 3 entries a feature, 6, or none, got 3"),
        *(
            (
                dict(known=[0, 0, -1, unknown, size, hidden]),
                f"{b} has unknown ids of kind {unknown}, which must be 0, 1 or 2, in {size} rows but {hidden}",
            )
            for unknown, size, hidden in ((3, 6, -1), (-1, 6, -1), (1, 0, -1), (2, 6, 6), (2, 6, -2))
        ),
        (dict(offsets=absent), f"{b} of shape [2, 1] and mode sum takes no offsets, got shape [2]"),
        (
            dict(indices=flat, offsets=[torch.empty(0, dtype=torch.int64)] * 2),
            f"{b} must be [B, L], or [N] beside offsets [B], got shape [2] beside offsets [0]",
        ),
    ]


LIKE = "the gradient's width and dtype, 4 and torch.float32, got shape"
OF_BACKWARDS = [
    (dict(grad_outs=[None, None]), "grad_outs has no gradient"),
    (dict(grad_outs=[torch.ones(2, 4)]), "grad_outs must have one entry a feature, 2, got 1"),
    (dict(grad_outs=Entry(0, torch.ones(8))), "grad_outs[0] must be [2, D] like the result, got shape [8]"),
    (dict(grad_outs=Entry(0, torch.ones(1, 2, 4))), "grad_outs[0] must be [2, D] like the result, got shape [1, 2, 4]"),
    (dict(grad_outs=Entry(0, torch.ones(3, 0))), "grad_outs[0] must be [2, D] like the result, got shape [3, 0]"),
    (dict(grad_outs=Entry(0, torch.ones(2, 4).cfloat())), f"grad_outs[0] {FLOATING}torch.complex64"),
    (dict(rows=[-1, 6]), "rows[0] must be a table's number of rows, got -1"),
    (dict(rows=[5, 2**62]), f"rows[1] must be a table's number of rows, got {2**62}"),
    (dict(weights=Entry(0, torch.ones(3, 4))), f"weights[0] must have 5 rows of {LIKE} [3, 4] and torch.float32"),
    (dict(weights=Entry(0, torch.ones(5, 3))), f"weights[0] must have 5 rows of {LIKE} [5, 3] and torch.float32"),
    (dict(weights=[torch.ones(5, 4)]), "weights must have one entry a table, 2, got 1"),
    (dict(weights=[], modes=[0, 3]), "weights must have one entry a table, 2, got 0"),
]


def of_fm_backwards(width: str) -> list[tuple[dict, str]]:
    """``width``: what is said of a ``dim`` that does not fit."""

    def like(name, columns, shape, dtype="float32"):
        return (
            f"{name} must be [2, {columns}] like the embeddings, torch.float32 on cpu, got shape {shape} and "
            f"torch.{dtype} on cpu"
        )

    return [
        *((dict(dim=dim), f"embeddings must {width.format(dim=dim)}") for dim in (-1, 0, 3, 2**63 - 1)),
        (dict(grad_embeddings=torch.ones(2, 4)), like("grad_embeddings", 8, [2, 4])),
        (dict(grad_fm=torch.ones(2)), like("grad_fm", 1, [2])),
        (dict(grad_fm=torch.ones(2, 1).double()), like("grad_fm", 1, [2, 1], "float64")),
        (
            dict(linear_weight=torch.ones(7)),
            "linear_weight must have one value a column of the embeddings, 8, and their dtype and device, "
            "torch.float32 on cpu, got shape [7] and torch.float32 on cpu",
        ),
    ]


ROUNDING = "rounding must be 0 or an integer below 2^53, got "
COUNT = "where rounding is not 0, step must be an integer below 2^32, got "
TABLE = "a table must be [R, D] with elements side by side in rows that do not overlap, got shape"
OF_UPDATES = [
    (dict(weights=Entry(0, torch.ones(1, 4).expand(5, 4))), f"{TABLE} [5, 4] and strides [0, 1]"),
    (dict(weights=Entry(0, torch.ones(9).as_strided((5, 4), (1, 1)))), f"{TABLE} [5, 4] and strides [1, 1]"),
    (dict(weights=Entry(0, torch.ones(4, 5).t())), f"{TABLE} [5, 4] and strides [1, 5]"),
    (dict(weights=Entry(0, torch.ones(5, 4).cfloat())), f"weights[0] {FLOATING}torch.complex64"),
    (dict(optimizer=99), "unknown optimizer 99"),
    (dict(hyper=HYPER), "hyper must hold 9 numbers a table, got 9 for 2"),
    (dict(states=[torch.ones(5, 4)]), "states must hold 0 tensors a table, got 1 for 2"),
    *(
        (dict(hyper=[*HYPER[:-1], r] * 2), f"{ROUNDING}{text}")
        for r, text in ((-1.0, "-1"), (0.5, "0.5"), (2.0**53, "9.0072e+15"))
    ),
    (dict(hyper=[*HYPER[:5], 2.5, *HYPER[6:-1], 1.0] * 2), f"{COUNT}2.5"),
]
SPARSE = "rows must be int64 [n] and values [n, D] like the table of shape [3, 2] and torch.float32, got shapes"
WIDTH, WIDTH_OF_FEATURES = (
    "have a multiple of dim = {dim} columns, got 8",
    "be [B, F * dim] of 2 features with dim = {dim}, got shape [2, 8]",
)
BAD_INPUTS |= {
    "embedding_bag": features("a", "b"),
    "embedding_bag_backward": [*features("indices[0]", "indices[1]"), *OF_BACKWARDS],
    "embedding_bag_backward_sparse": [*features("indices[0]", "indices[1]"), *OF_BACKWARDS],
    "embedding_bag_update": [*features("indices[0]", "indices[1]"), *OF_UPDATES],
    "embedding_fm": features("a", "b"),
    "embedding_fm_backward": of_fm_backwards(WIDTH),
    "embedding_fm_backward_sparse": [
        *features("indices[0]", "indices[1]"),
        *of_fm_backwards(WIDTH_OF_FEATURES),
    ],
    "embedding_fm_update": [
        *features("indices[0]", "indices[1]"),
        *of_fm_backwards(WIDTH_OF_FEATURES),
        *OF_UPDATES,
    ],
    "sparse_update": [
        (dict(weight=torch.ones(1, 2).expand(3, 2)), f"{TABLE} [3, 2] and strides [0, 1]"),
        (dict(weight=torch.ones(3)), f"{TABLE} [3]"),
        (dict(hyper=[*HYPER[:-1], float("nan")]), f"{ROUNDING}nan"),
        (dict(hyper=[*HYPER[:5], 2.0**32, *HYPER[6:-1], 1.0]), f"{COUNT}4.29497e+09"),
        (dict(rows=torch.tensor([[0, 1]])), f"{SPARSE} [1, 2] and [2, 2], torch.int64 and torch.float32"),
        (dict(values=torch.ones(2, 0)), f"{SPARSE} [2] and [2, 0], torch.int64 and torch.float32"),
    ],
}
#: The names with which an error may begin beside the op's own: a check that several ops share says whose it is.
SHARED = {
    "embedding_bag", "embedding_bag_backward", "embedding_bag_update", "embedding_fm_backward", "din_attention",
    "norm_activation", "augru", "target_attention",
}  # fmt: skip


def arguments(op: str, changes: dict) -> list:
    made = MAKE[op]()
    assert changes.keys() <= made.keys()
    made |= {k: v.put(made[k]) if isinstance(v, Entry) else v for k, v in changes.items()}
    return list(made.values())
