"""Every schema of DIN attention, normalization, FM, DeepFM and the weight's gradient on what does not fit: an error
that names op, argument, what was expected and what was given, one text from the kernels, the fake and the reference.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rankkernels as rk
from rankkernels.ops.din_attention import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:.*sparse:UserWarning")
OPS = torch.ops.rankkernels
RELU, PRELU, DICE, DICE_BN = (list(ACTIVATIONS).index(n) for n in ("relu", "prelu", "dice", "dice_batch_norm"))
B, L, D, H = 3, 4, 5, 6


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def fm():
    return dict(x=randn(B, 3, D), reduce_sum=True)


def fm_backward():
    return dict(grad_out=randn(B, 1), **fm())


def linear_weight_grad():
    return dict(dy=randn(4, 3), x=randn(4, 5))


def norm():
    return dict(
        x=randn(4, H), weight=randn(H), bias=randn(H), alpha=randn(1), running_mean=randn(H), running_var=torch.ones(H),
        activation=PRELU, batch_norm=True, training=True, norm_eps=1e-5, dice_eps=1e-3,
    )  # fmt: skip


def norm_backward():
    return dict(grad_out=randn(4, H), batch_stats=torch.ones(2 * H), **norm())


def din():
    params = [randn(H, 4 * D), randn(H), torch.ones(H), torch.zeros(H), randn(1), randn(1, H), randn(1)]
    return dict(
        history=randn(B, L, D), target=randn(B, D), lengths=None, mask=None, offsets=None, params=params,
        running_stats=[], activation=DICE, batch_norm=True, use_softmax=False, training=True, norm_eps=1e-5,
        dice_eps=1e-3, dropout=0.0, seed=None,
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


MAKE = {
    "fm_interaction": fm, "fm_interaction_backward": fm_backward, "linear_weight_grad": linear_weight_grad,
    "norm_activation": norm, "norm_activation_backward": norm_backward, "din_attention": din,
    "din_attention_backward": din_backward, "deepfm": deepfm,
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
        (dict(x=randn(0, H)), "training needs more than one row, got 0"),
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
        (dict(batch_stats=randn(0)), form("batch_stats", [2 * H], [0])),
        (dict(batch_stats=randn(2 * H).half()), form("batch_stats", [2 * H], [2 * H], "float16")),
        (dict(saved=randn(7)), form("saved", [SAVED], [7])),
        (dict(saved=randn()), form("saved", [SAVED], [])),
        (dict(saved=torch.zeros(SAVED).bfloat16()), form("saved", [SAVED], [SAVED], "bfloat16")),
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


def arguments(op: str, changes: dict) -> list:
    made = MAKE[op]()
    assert changes.keys() <= made.keys()
    made |= {k: v.put(made[k]) if isinstance(v, Entry) else v for k, v in changes.items()}
    return list(made.values())


def bytes_of(values: list) -> list[bytes]:
    tensors = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
    return [bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors if t.numel() and not t.is_sparse]


@pytest.mark.parametrize(
    "op, changes, message",
    [pytest.param(op, *entry, id=f"{op}: {entry[-1]}") for op, entries in BAD_INPUTS.items() for entry in entries],
)
@pytest.mark.parametrize("fake", [False, True], ids=["kernel", "fake"])
def test_bad_input(op, changes, message, fake):
    values, overload = arguments(op, changes), getattr(OPS, op).default
    before = None if fake else bytes_of(values)
    with pytest.raises(RuntimeError) as info:
        if fake:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                to_fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
                overload(*([to_fake(t) for t in v] if isinstance(v, list) else to_fake(v) for v in values))
        else:
            overload(*values)
    name, _, text = str(info.value).splitlines()[0].partition(": ")
    assert text == message
    assert name in (op, op.removesuffix("_backward"), "embedding_bag")
    assert fake or bytes_of(values) == before


@pytest.mark.parametrize("op", MAKE)
def test_good_input(op):
    """What the table changes is right without the change, and may be of any strides."""
    values = arguments(op, {})
    getattr(OPS, op).default(*values)

    def apart(t):
        return torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t

    spread = [[apart(t) for t in v] if isinstance(v, list) else apart(v) for v in values]
    torch.testing.assert_close(*(getattr(OPS, op).default(*v) for v in (values, spread)))


def public(**changes):
    a = din() | changes
    a["activation"] = list(ACTIVATIONS)[a["activation"]]
    positional = [a.pop(n) for n in ("history", "target", "params", "running_stats")]
    return rk.din_attention(*positional, **a)[0]


BEYOND = 2**63 - 1


@pytest.mark.parametrize(
    "rows, message",
    [
        (dict(lengths=torch.tensor([9, 1, 1])), f"lengths[0] = 9 is outside 0 .. {L}, the history's positions"),
        (dict(lengths=torch.tensor([1, 1, -1])), f"lengths[2] = -1 is outside 0 .. {L}, the history's positions"),
        (dict(lengths=torch.tensor([1, 1, -(2**63)])), f"lengths[2] = {-(2**63)} is outside 0 .. {L}, the"),
        (dict(offsets=torch.tensor([0, 2, 4, 8])), "offsets must run from 0 to N = 7, got 0 .. 8"),
        (dict(offsets=torch.tensor([1, 2, 4, 7])), "offsets must run from 0 to N = 7, got 1 .. 7"),
        (dict(offsets=torch.tensor([0, 4, 2, 7])), "offsets decrease from 4 to 2 at 2"),
        (dict(offsets=torch.tensor([0, BEYOND, -2, 7])), f"offsets decrease from {BEYOND} to -2 at 2"),
        (dict(lengths=torch.tensor([1, 0, 0])), "training needs more than one valid row to take statistics of, got 1"),
        (dict(mask=torch.zeros(B, L).bool()), "training needs more than one valid row to take statistics of, got 0"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_have_the_documented_type(rows, message):
    history = randn(7, D) if "offsets" in rows else randn(B, L, D)
    with pytest.raises(ValueError) as info:
        public(history=history, **rows)
    assert str(info.value).startswith(f"din_attention: {message}")
    unit = rk.ActivationUnit(D, [H])
    with pytest.raises(ValueError) as info:
        unit(history, randn(B, D), **rows)
    assert str(info.value).startswith(f"din_attention: {message}")


def test_an_id_outside_its_table_has_the_documented_type():
    values = deepfm() | dict(indices=[torch.arange(B), torch.arange(B) + 5])
    with pytest.raises(IndexError, match=r"shop\[2\] = 7 is out of range for a table with 7 rows"):
        rk.ops.deepfm.call(*values.values())


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "_mkldnn"])
def test_layouts_other_than_strided(layout):
    def other(t):
        return {"sparse_coo": t.to_sparse, "sparse_csr": t.to_sparse_csr, "_mkldnn": t.to_mkldnn}[layout]()

    for op, name in (
        ("linear_weight_grad", "x"),
        ("norm_activation", "x"),
        ("din_attention", "target"),
        ("deepfm", "dense"),
    ):
        values = MAKE[op]()
        values[name] = other(values[name])
        with pytest.raises(RuntimeError, match=f"^{op}: tensors must be of layout torch.strided, got torch.{layout}$"):
            getattr(OPS, op).default(*values.values())
