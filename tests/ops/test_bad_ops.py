"""Every schema on what does not fit: an error that names op, argument, what was expected and what was given, one text
from the kernels, the fake and the reference, before anything is written. The table is ``bad_inputs``.
"""

from __future__ import annotations

import functools

import pytest
import torch
from bad_inputs import BAD_INPUTS, MAKE, SHARED, B, D, H, L, arguments, deepfm, din, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import rankkernels as rk
from rankkernels.ops._activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:.*sparse:UserWarning")
OPS = torch.ops.rankkernels


def bytes_of(values: list) -> list[bytes]:
    tensors = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]
    return [bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors if t.numel() and not t.is_sparse]


@pytest.mark.parametrize(
    "op, changes, message",
    [pytest.param(op, *entry, id=f"{op}: {entry[-1]}") for op, entries in BAD_INPUTS.items() for entry in entries],
)
@pytest.mark.parametrize("how", ["kernel", "reference", "fake"])
def test_bad_input(op, changes, message, how):
    values, overload = arguments(op, changes), getattr(OPS, op).default
    before = None if how == "fake" else bytes_of(values)
    with pytest.raises(RuntimeError) as info:
        if how == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                to_fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
                overload(*([to_fake(t) for t in v] if isinstance(v, list) else to_fake(v) for v in values))
        elif how == "reference":
            overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *values)
        else:
            overload(*values)
    name, _, text = str(info.value).splitlines()[0].partition(": ")
    assert text == message
    assert name == op or name in SHARED
    assert how == "fake" or bytes_of(values) == before


@pytest.mark.parametrize("op", MAKE)
def test_good_input(op):
    """What the table changes is right without the change, and may be of any strides."""
    values, overload = arguments(op, {}), getattr(OPS, op).default
    overload(*values)

    def apart(t):
        return torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t

    spread = [[apart(t) for t in v] if isinstance(v, list) else apart(v) for v in values]
    if not overload._schema.is_mutable:  # a table that is written has its rows side by side
        torch.testing.assert_close(*(overload(*v) for v in (values, spread)))


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
        (dict(mask=torch.arange(B * L).view(B, L) == 1), "training needs more than one valid row to take"),
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


@pytest.mark.parametrize("op", ["din_attention", "target_attention"])
@pytest.mark.parametrize(
    "rows, message",
    [
        (dict(lengths=torch.tensor([1, -1, 9])), f"lengths[1] = -1 is outside 0 .. {L}, the history's positions"),
        (dict(offsets=torch.tensor([0, 2, 4, 8])), "offsets must run from 0 to N = 7, got 0 .. 8"),
        (dict(offsets=torch.tensor([0, 4, 2, 7])), "offsets decrease from 4 to 2 at 2"),
        (dict(offsets=torch.tensor([0, BEYOND, -2, 7])), f"offsets decrease from {BEYOND} to -2 at 2"),
        (
            dict(offsets=torch.tensor([0, 3, 7]), history_index=torch.tensor([1, 0, 2])),
            "history_index[2] = 2 is out of range for 2 histories",
        ),
    ],
)
def test_positions_that_do_not_fit_have_one_text(op, rows, message):
    history = randn(7, D) if "offsets" in rows else randn(B, L, D)
    refuses(op, dict(lengths=None, history=history) | rows, message)


def test_lengths_beyond_the_positions_have_one_text():
    refuses(
        "augru", dict(lengths=torch.tensor([1, L + 1, 0])), f"lengths[1] = {L + 1} is outside 0 .. {L}, the positions"
    )


def refuses(op: str, changes: dict, message: str) -> None:
    """Kernel and reference."""
    values, overload = arguments(op, changes), getattr(OPS, op).default
    default = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for call in (overload, functools.partial(overload.redispatch, default)):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as info:
            call(*values)
        assert str(info.value).splitlines()[0] == f"{op}: {message}"


@pytest.mark.parametrize("index, i, value", [([0, 2, 1], 1, 2), ([0, -1, 1], 1, -1), ([0, 0, BEYOND], 2, BEYOND)])
@pytest.mark.parametrize("form", ["padded", "offsets"])
def test_an_index_outside_the_histories_has_the_documented_type(index, i, value, form):
    history = randn(7, D) if form == "offsets" else randn(2, L, D)
    rows = dict(offsets=torch.tensor([0, 3, 7])) if form == "offsets" else {}
    index, message = torch.tensor(index), f"history_index[{i}] = {value} is out of range for 2 histories"
    for function in (public, lambda target, **rows: rk.ActivationUnit(D, [H])(target=target, **rows)):
        with pytest.raises(IndexError) as info:
            function(history=history, target=randn(B, D), history_index=index, **rows)
        assert str(info.value).startswith(f"din_attention: {message}")
    with pytest.raises(IndexError, match="out of range for 0 histories"):
        public(history=randn(0, L, D), history_index=index)


def test_an_id_outside_its_table_has_the_documented_type():
    values = deepfm() | dict(indices=[torch.arange(B), torch.arange(B) + 5])
    with pytest.raises(IndexError, match=r"shop\[2\] = 7 is out of range for a table with 7 rows"):
        rk.ops.deepfm.run_op(*values.values())


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
