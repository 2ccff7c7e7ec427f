"""Histories that samples share (``history_index``), against the reference and against a copy for each sample."""

import itertools
import random

import pytest
import torch
from test_din_attention import FLAGS, FORMS, check, din_attention, make_inputs, make_params, run

from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._library import has_triton
from rankkernels.ops.attention_params import Inputs
from rankkernels.testing import TOLERANCE


def shared_inputs(form, U, B, L, D, dtype, generator):
    """Histories of U users, targets [B], the keywords of both; the last user has no sample, if there are others."""
    history, _, rows = make_inputs(form, U, L, D, dtype, generator)
    target = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(max(U - 1, 1), (B,), generator=generator)
    return history, target, rows | {"history_index": index if B % 2 else index.int()}


def copies(history, rows):
    """The same batch with a history for each sample."""
    forms = [rows.get(name) for name in ("lengths", "mask", "offsets")]
    history, *forms = reference.expand_histories(history, rows["history_index"], *forms)
    return history, {n: t for n, t in zip(("lengths", "mask", "offsets"), forms) if t is not None}


def summed_in_double(grad, history, rows):
    """Copies' gradients, added up."""
    offsets, index = rows.get("offsets"), rows["history_index"]
    place = torch.arange(len(history))
    place = reference.expand_histories(place, index, None, None, offsets)[0]
    return torch.zeros(history.shape, dtype=torch.float64).index_add(0, place, grad.double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_reference(form, activation):
    chooser = random.Random(f"shared {form} {activation}")
    generator = torch.Generator().manual_seed(chooser.randrange(1 << 30))
    for use_softmax, training in itertools.product((False, True), (False, True)):
        U, B, L, dtype = map(chooser.choice, ([1, 2, 5], [1, 8, 60], [1, 5, 70], list(TOLERANCE)))
        if training:
            U, B, L = 4, 20, 30
        D, dims = chooser.choice([1, 7, 16, 64]), chooser.choice([[], [1], [36], [80, 40]])
        batch_norm, counted = chooser.random() < 0.5, chooser.random() < 0.3
        params, stats = make_params(D, dims, activation, batch_norm, dtype, generator)
        history, target, rows = shared_inputs(form, U, B, L, D, dtype, generator)
        history = history.nan_to_num(0.5) if counted else history
        return_scores = chooser.random() < 0.3
        shape = copies(history, rows)[0].shape[:-1] if return_scores else target.shape
        flags = dict(activation=activation, batch_norm=batch_norm, use_softmax=use_softmax, training=training,
                     norm_eps=1e-5, dice_eps=1e-3, count_padding=counted, return_scores=return_scores,
                     dropout=chooser.choice([0.0, 0.3]), seed=torch.tensor(chooser.randrange(2**63)))  # fmt: skip
        try:
            check(history, target, params, torch.randn(shape, generator=generator).to(dtype), rows, stats, flags)
        except AssertionError as error:
            raise AssertionError(f"U {U} B {B} L {L} D {D} dims {dims} {dtype} {flags}: {error}") from error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("return_scores", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["dice", "dice_batch_norm"])
def test_equals_a_copy_for_each_sample(form, return_scores, training, activation):
    """Values, statistics, dropped units and gradients; in eval each sample's bits."""
    generator = torch.Generator().manual_seed(5)
    params, stats = make_params(16, [20, 9], activation, True, torch.float64, generator)
    history, target, rows = shared_inputs(form, 6, 200, 40, 16, torch.float64, generator)
    flags = FLAGS | dict(activation=activation, training=training, return_scores=return_scores, use_softmax=True)
    flags |= dict(dropout=0.4, seed=torch.tensor(11))
    own, own_rows = copies(history, rows)
    grad_out = torch.randn(own.shape[:-1] if return_scores else target.shape, generator=generator, dtype=torch.float64)
    out, batch_stats, grads = run(
        lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out
    )
    own_out, own_stats, own_grads = run(
        lambda *x: din_attention(*x, stats, **own_rows, **flags), own, target, params, grad_out
    )
    assert training or torch.equal(out, own_out)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close((out, batch_stats), (own_out, own_stats), **close)
    torch.testing.assert_close(grads, [summed_in_double(own_grads[0], history, rows), *own_grads[1:]], **close)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("U, B", [(1, 300), (3, 400), (200, 400)])
def test_bits_do_not_depend_on_threads(form, dtype, U, B):
    """A user's samples in one task, or in many. In training the backward's sums for a normalization depend on the
    number of threads, and with them all gradients."""
    generator = torch.Generator().manual_seed(7)
    params, stats = make_params(20, [36], "dice", True, dtype, generator)
    history, target, rows = shared_inputs(form, U, B, 21, 20, dtype, generator)
    grad_out = torch.randn(B, 20, generator=generator).to(dtype)
    for training in (False, True):
        flags, results = FLAGS | {"training": training}, []
        for threads in (2, 1, 3, 2):
            torch.set_num_threads(threads)
            results.append(
                run(lambda *x, f=flags: din_attention(*x, stats, **rows, **f), history, target, params, grad_out)
            )
        (out, batch_stats, grads), *others = results
        for other_out, other_stats, (grad_history, grad_target, *_) in others:
            assert torch.equal(out, other_out) and torch.equal(batch_stats, other_stats)
            assert training or (torch.equal(grads[0], grad_history) and torch.equal(grads[1], grad_target))
        assert all(map(torch.equal, grads, results[-1][2]))


@pytest.mark.parametrize("form", FORMS)
def test_order_of_samples_does_not_matter(form):
    generator = torch.Generator().manual_seed(8)
    params, stats = make_params(16, [12], "prelu", False, torch.float32, generator)
    history, target, rows = shared_inputs(form, 5, 61, 30, 16, torch.float32, generator)
    flags = FLAGS | dict(activation="prelu", batch_norm=False, training=False)
    out, _ = din_attention(history, target, params, stats, **rows, **flags)
    order = torch.randperm(61, generator=generator)
    other = rows | {"history_index": rows["history_index"][order]}
    assert torch.equal(din_attention(history, target[order], params, stats, **other, **flags)[0], out[order])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("U, B, L", [(3, 0, 4), (0, 0, 4), (2, 5, 0), (0, 0, 0)])
def test_nothing_there(form, U, B, L):
    generator = torch.Generator().manual_seed(9)
    params, stats = make_params(6, [5], "dice", True, torch.float32, generator)
    history, target, rows = shared_inputs(form, U, B, L, 6, torch.float32, generator)
    flags = FLAGS | {"training": False}
    for return_scores in (False, True):
        shape = copies(history, rows)[0].shape[:-1] if return_scores else target.shape
        out, _, grads = run(
            lambda *x, r=return_scores: din_attention(*x, stats, **rows, **flags, return_scores=r),
            history, target, params, torch.ones(shape),
        )  # fmt: skip
        assert out.shape == shape and (out == 0).all() and all((g == 0).all() for g in grads)


def test_a_history_without_samples_has_no_gradient(poisoned):
    generator = torch.Generator().manual_seed(10)
    params, stats = make_params(6, [5], "dice", True, torch.float32, generator)
    history, target = torch.randn(9, 4, 6, generator=generator), torch.randn(12, 6, generator=generator)
    index = torch.tensor([7, 3, 3, 4] * 3)
    _, _, grads = run(
        lambda *x: din_attention(*x, stats, history_index=index, **FLAGS), history, target, params, torch.ones(12, 6)
    )
    has = (grads[0] != 0).flatten(1).any(1)
    assert has.tolist() == [u in (3, 4, 7) for u in range(9)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested():
    generator = torch.Generator().manual_seed(12)
    params, stats = make_params(6, [5], "dice", True, torch.float32, generator)
    history, target, rows = shared_inputs("offsets", 4, 15, 9, 6, torch.float32, generator)
    nested = torch.nested.nested_tensor_from_jagged(history, rows["offsets"].long())
    index = rows["history_index"]
    out, batch_stats = din_attention(nested, target, params, stats, history_index=index, **FLAGS)
    expected = din_attention(history, target, params, stats, **rows, **FLAGS)
    assert torch.equal(out, expected[0]) and torch.equal(batch_stats, expected[1])


@pytest.mark.parametrize("form", ["mask", "offsets"])
def test_compiled(form):
    """Also where only values say how many rows there are."""
    generator = torch.Generator().manual_seed(13)
    params, stats = make_params(6, [5], "dice", True, torch.float32, generator)
    flags = FLAGS | dict(training=False)

    def attend(history, target, rows, params):
        return din_attention(history, target, params, stats, **rows, **flags)[0].sin()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=form == "offsets"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        for U, B in ((4, 15), (3, 20)):
            history, target, rows = shared_inputs(form, U, B, 9, 6, torch.float32, generator)
            results = []
            for function in (attend, compiled):
                leaves = [x.clone().requires_grad_() for x in (history, target, *params)]
                out = function(leaves[0], leaves[1], rows, leaves[2:])
                results.append([out, *torch.autograd.grad(out.sum(), leaves)])
            torch.testing.assert_close(*results)


def test_transforms():
    """Forward mode and vmap run the reference, or loop."""
    generator = torch.Generator().manual_seed(14)
    params, stats = make_params(6, [5], "sigmoid", False, torch.float64, generator)
    history, target, rows = shared_inputs("lengths", 4, 9, 7, 6, torch.float64, generator)
    history = history.nan_to_num(0.0)
    flags = FLAGS | dict(activation="sigmoid", batch_norm=False, training=False)

    def attend(history):
        return din_attention(history, target, params, stats, **rows, **flags)[0]

    tangent = torch.randn(history.shape, generator=generator, dtype=torch.float64)
    _, forward = torch.func.jvp(attend, (history,), (tangent,))
    step = 1e-6
    near = (attend(history + step * tangent) - attend(history - step * tangent)) / (2 * step)
    torch.testing.assert_close(forward, near, rtol=1e-6, atol=1e-8)
    batch = torch.stack([history, tangent])
    torch.testing.assert_close(torch.vmap(attend)(batch), torch.stack([attend(history), attend(tangent)]))


@pytest.mark.skipif(not has_triton, reason="Triton is not installed")
@pytest.mark.parametrize("form", FORMS)
def test_copies_for_a_gpu_and_their_gradients(form):
    from rankkernels.ops.din_attention import expanded, summed

    generator = torch.Generator().manual_seed(15)
    history, target, rows = shared_inputs(form, 5, 31, 7, 3, torch.float16, generator)
    forms = [rows.get(name) for name in ("lengths", "mask", "offsets")]
    inputs = Inputs(history, target, *forms, rows["history_index"], [], [])
    (own, own_target, *own_forms, _, _), copied = expanded(inputs)
    expected, expected_rows = copies(history, rows)
    assert torch.equal(own.nan_to_num(9.0), expected.nan_to_num(9.0)) and own_target is target
    assert all(torch.equal(t, expected_rows[n]) for n, t in zip(("lengths", "mask", "offsets"), own_forms) if n in rows)
    grad = torch.randn(own.shape, generator=generator).half()
    found = summed(grad, copied, history)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), summed_in_double(grad, history, rows), rtol=1e-3, atol=1e-6)
    assert expanded(inputs._replace(history_index=None))[1] is None and summed(grad, None, history) is grad
