"""The DIN attention op where padding counts, and its scores, against ``rankkernels.reference`` in float64."""

import itertools
import random

import pytest
import torch
from test_din_attention import FLAGS, FORMS, check, din_attention, inputs, make_inputs, make_params, run

from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.testing import TOLERANCE

COUNTED = FLAGS | {"count_padding": True}


def with_padding(form, B, L, D, dtype, generator):
    """As ``make_inputs``, with numbers for padding and some samples that have nothing else."""
    history, target, rows = make_inputs(form, B, L, D, dtype, generator)
    if form in ("lengths", "mask"):
        rows[form][B // 2] = 0
        history = torch.where(history.isnan(), torch.randn(history.shape, generator=generator).to(dtype), history)
    return history, target, rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_reference(form, activation):
    chooser = random.Random(f"padding {form} {activation}")
    generator = torch.Generator().manual_seed(chooser.randrange(1 << 30))
    for use_softmax, return_scores, training, dtype in itertools.product(*[(False, True)] * 3, TOLERANCE):
        D, dims = chooser.choice([1, 7, 16, 64]), chooser.choice([[36], [130], [20, 8], []])
        batch_norm = chooser.random() < 0.3
        params, stats = make_params(D, dims, activation, batch_norm, dtype, generator)
        history, target, rows = with_padding(form, 9, chooser.choice([30, 49]), D, dtype, generator)
        shape = history.shape[:-1] if return_scores else target.shape
        flags = dict(activation=activation, batch_norm=batch_norm, use_softmax=use_softmax, training=training,
                     return_scores=return_scores, count_padding=chooser.random() < 0.7, norm_eps=1e-5, dice_eps=1e-3,
                     dropout=chooser.choice([0.0, 0.0, 0.3]), seed=torch.tensor(7))  # fmt: skip
        try:
            check(history, target, params, torch.randn(shape, generator=generator).to(dtype), rows, stats, flags)
        except AssertionError as error:
            raise AssertionError(f"D {D} dims {dims} {dtype} {flags}: {error}") from error


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("form", ["lengths", "mask"])
def test_long_history(form, use_softmax):
    """Blocks of nothing but padding, before and behind those with a score."""
    generator = torch.Generator().manual_seed(4)
    history, target, rows = with_padding(form, 3, 1000, 16, torch.float32, generator)
    rows[form][0] = 700 if form == "lengths" else torch.arange(1000) >= 700
    params, stats = make_params(16, [36], "dice_batch_norm", False, torch.float32, generator)
    flags = COUNTED | dict(use_softmax=use_softmax, activation="dice_batch_norm", batch_norm=False)
    check(history, target, params, torch.randn(3, 16, generator=generator), rows, stats, flags)


@pytest.mark.parametrize("form", ["lengths", "mask"])
@pytest.mark.parametrize("use_softmax", [False, True])
def test_padding_weighs_nothing_beside_a_valid_row(form, use_softmax):
    history, target, params, _, rows, stats = inputs(form, B=7, L=9)
    history = history.nan_to_num(5.0)
    rows[form][3] = 0
    flags = COUNTED | {"use_softmax": use_softmax}
    scores, _ = din_attention(history, target, params, stats, **rows, **flags, return_scores=True)
    valid = rows["mask"] if form == "mask" else torch.arange(9) < rows["lengths"][:, None]
    some = valid.any(1)
    assert (scores[some][~valid[some]] == 0).all() and scores.dtype == history.dtype
    assert torch.equal(scores[~some], torch.full((int((~some).sum()), 9), 1 / 9 if use_softmax else 0.0))
    pooled, _ = din_attention(history, target, params, stats, **rows, **flags)
    torch.testing.assert_close(pooled, torch.einsum("bl,bld->bd", scores, history))


def test_padding_is_in_the_statistics_and_has_a_gradient_from_there():
    history, target, params, grad_out, _, stats = inputs("padded", B=7, L=9)
    lengths = torch.tensor([0, 9, 3, 1, 0, 5, 2])
    _, everything, _ = run(lambda *x: din_attention(*x, stats, **FLAGS), history, target, params, grad_out)
    _, counted, grads = run(
        lambda *x: din_attention(*x, stats, lengths=lengths, **COUNTED), history, target, params, grad_out
    )
    assert torch.equal(counted, everything)
    assert grads[0][torch.arange(9) >= lengths[:, None]].abs().min() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_bits_are_the_same_where_no_padding_counts(form, training):
    """In eval without a softmax, and without padding."""
    history, target, params, grad_out, rows, stats = inputs(form)
    if training and form in ("lengths", "mask"):
        rows[form] = torch.full_like(rows[form], 9 if form == "lengths" else True)
        history = history.nan_to_num(1.0)
    flags, counted = FLAGS | {"training": training}, COUNTED | {"training": training}
    results = [
        run(lambda *x, f=f: din_attention(*x, stats, **rows, **f), history, target, params, grad_out)
        for f in (flags, counted)
    ]
    (out, _, grads), (out_counted, _, grads_counted) = results
    assert torch.equal(out, out_counted) and all(map(torch.equal, grads, grads_counted))


def test_a_single_valid_row_has_statistics_beside_padding():
    history, target, params, grad_out, _, stats = inputs("padded", B=7, L=9)
    check(history, target, params, grad_out, {"lengths": torch.tensor([0, 1, 0, 0, 0, 0, 0])}, stats, COUNTED)


@pytest.mark.parametrize("return_scores", [False, True])
def test_bits_do_not_depend_on_threads(return_scores):
    history, target, params, grad_out, rows, stats = inputs("mask", B=300, L=21, activation="dice_batch_norm")
    history = history.nan_to_num(0.5)
    flags = COUNTED | dict(activation="dice_batch_norm", return_scores=return_scores, use_softmax=True)
    grad_out = torch.randn(300, 21) if return_scores else grad_out
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2]))
