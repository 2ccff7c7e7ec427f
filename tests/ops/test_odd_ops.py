"""Odd arguments that have a meaning, and its value: masks of any bytes, layers without units, rows without columns."""

from __future__ import annotations

import pytest
import torch

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops.mixed_experts import mixed_experts
from rankkernels.testing import din_attention_case

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", r"ignore:var\(\)")


def randn(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_any_byte_of_a_mask_but_0_is_true(training, use_softmax):
    """torch makes such masks of views, and of what other libraries wrote."""
    case = din_attention_case(20, 70, 5, [6], use_softmax=use_softmax, training=training, form="mask")
    history, target, _, *params = case.inputs(requires_grad=True)
    byte = torch.randint(0, 3, (20, 70)).mul(127).byte()
    results = []
    for mask in (byte.view(torch.bool), byte != 0):
        out = case.function(history, target, mask, *params)
        results.append([out, *torch.autograd.grad(out, [history, target, *params], torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "widths, D", [([0], 5), ([6, 0], 5), ([0, 6], 5), ([0, 0, 3], 5), ([6, 5], 0), ([0], 0), ([], 0)]
)
def test_attention_without_units_or_columns(widths, D, training, activation):
    case = din_attention_case(4, 70, D, widths, activation, training=training, form="mask")
    inputs = case.inputs(torch.float64, requires_grad=True)
    wanted, results = [t for t in inputs if t.requires_grad], []
    for function in (case.function, case.reference):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, wanted, torch.ones_like(out), materialize_grads=True)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("activation, batch_norm", [(a, n) for a in ACTIVATIONS for n in (True, False)])
def test_normalization_without_units(activation, batch_norm):
    if activation == "dice_batch_norm" and not batch_norm:
        return
    alpha = randn(0) if activation == "dice_batch_norm" else randn(1) if ACTIVATIONS[activation] else None
    x, weight = randn(5, 0).requires_grad_(), randn(0).requires_grad_() if batch_norm else None
    out, stats = rk.norm_activation(
        x, weight, weight, alpha, activation=activation, batch_norm=batch_norm, training=batch_norm
    )
    out.sum().backward()
    assert out.shape == x.grad.shape == (5, 0) and stats.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("reduce_sum", [True, False])
def test_fm_without_values(shape, reduce_sum):
    x = randn(*shape).requires_grad_()
    out = rk.fm_interaction(x, reduce_sum)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(shape[0], 1 if reduce_sum else shape[2])) and x.grad.shape == shape


@pytest.mark.parametrize("N, M, K", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_weight_gradient_without_values(N, M, K):
    assert torch.equal(rk.ops.linear_weight_grad.linear_weight_grad(randn(N, M), randn(N, K)), torch.zeros(M, K))


@pytest.mark.parametrize(
    "D, dense, widths", [(5, 1, [0]), (5, 0, [4, 0, 3]), (5, 2, [150, 0]), (0, 3, [4]), (0, 0, [4, 2])]
)
@pytest.mark.parametrize("B", [0, 3, 70])
def test_deepfm_without_units_or_columns(B, D, dense, widths):
    mlp, n = [], 2 * D + dense
    for width in (*widths, 1):
        mlp += [randn(width, n), randn(width)]
        n = width
    tables, ids = [randn(9, D), randn(7, D)], [torch.randint(7, (B,)) for _ in range(2)]
    linear, columns = randn(2 * D), randn(B, dense) if dense else None
    out = torch.ops.rankkernels.deepfm(tables, ids, [0, 1], "item\nshop", linear, columns, mlp)
    e = torch.cat([t[i] for t, i in zip(tables, ids)], 1)
    x = e if columns is None else torch.cat([e, columns], 1)
    for i in range(0, len(mlp), 2):
        x = torch.nn.functional.linear(x.relu() if i else x, mlp[i], mlp[i + 1])
    torch.testing.assert_close(out, x + e @ linear[:, None] + reference.fm_interaction(e.view(B, 2, D)))


def test_experts_are_never_beyond_1():
    """Where rounding alone would have a tanh beyond it, its derivative would be negative."""
    projections = torch.stack([torch.linspace(-1, 1, 5000), torch.zeros(5000)], 1).requires_grad_()
    out = mixed_experts(projections, torch.full((1, 1, 1), 13.0))
    out.sum().backward()
    assert out.abs().max() == 1 and projections.grad.min() >= 0


@pytest.mark.parametrize("queries", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 70])
@pytest.mark.parametrize("lowest", [-3.3e38, -torch.inf])
def test_target_attention_of_scores_without_a_highest(lowest, rows, queries):
    """Scores that are all as low as a number goes weigh the same; all of -inf are no numbers, as in torch's softmax."""
    query = torch.tensor([lowest, 0.0]).repeat(1, queries, 1)
    history = torch.stack([torch.ones(rows), torch.arange(float(rows))], 1)[None]
    expected = reference.target_attention(query.double(), history.double())
    torch.testing.assert_close(rk.target_attention(query, history), expected.float(), equal_nan=True)


@pytest.mark.parametrize("queries", [2, 20])
def test_target_attention_hides_what_is_no_number(queries):
    """A hidden row gets no gradient and gives none, whatever is in it."""
    query, history = randn(3, queries, 5).requires_grad_(), randn(3, 9, 5)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 4] = False
    grads = []
    for value in (7.0, 1e30):
        rows = history.clone()
        rows[:, 4] = value
        rows.requires_grad_()
        grads.append(torch.autograd.grad(rk.target_attention(query, rows, mask=mask).sum(), (query, rows)))
    torch.testing.assert_close(grads[0], grads[1])
    assert not grads[0][1][:, 4].any() and grads[0][1].isfinite().all()
