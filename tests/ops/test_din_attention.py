"""The DIN attention op against ``rankkernels.reference`` in float64, in random configurations."""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._library import cpu_isa, no_extension
from rankkernels.ops.attention_params import unflatten
from rankkernels.ops.din_attention import din_attention
from rankkernels.testing import TOLERANCE, din_attention_case

FORMS = ("padded", "lengths", "mask", "offsets")


def make_params(D, dims, activation, batch_norm, dtype, generator):
    """Parameters and running statistics in the order of the schema, in float64 rounded to ``dtype``."""

    def rand(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    params, stats, width = [], [], 4 * D
    for H in dims:
        params += [rand(H, width, scale=width**-0.5), rand(H, scale=0.3)]
        if batch_norm:
            params += [rand(H, scale=0.3, shift=1), rand(H, scale=0.3)]
            stats += [rand(H, scale=0.2), rand(H).square() + 0.5]
        if activation in ("prelu", "dice"):
            params += [rand(1 if torch.rand((), generator=generator) < 0.5 else H, scale=0.5)]
        if activation == "dice_batch_norm":
            params += [rand(H, scale=0.5), rand(H, scale=0.3, shift=1), rand(H, scale=0.3)]
            stats += [rand(H, scale=0.2), rand(H).square() + 0.5]
        width = H
    return params + [rand(1, width, scale=width**-0.5), rand(1, scale=0.3)], stats


def make_inputs(form, B, L, D, dtype, generator):
    """history, target and the keyword that tells the valid rows. Padding is NaN, and must not be seen."""
    target = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(0, L + 1, (B,), generator=generator)
    if form == "offsets":
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        history = torch.randn(int(offsets[-1]), D, generator=generator, dtype=torch.float64).to(dtype)
        return history, target, {"offsets": offsets.int()}
    history = torch.randn(B, L, D, generator=generator, dtype=torch.float64).to(dtype)
    if form == "padded":
        return history, target, {}
    mask = torch.arange(L) < lengths[:, None] if form == "lengths" else torch.rand(B, L, generator=generator) < 0.6
    history[~mask] = torch.nan
    return history, target, {form: lengths if form == "lengths" else mask}


def run(attention, history, target, params, grad_out):
    """Output, batch statistics and all gradients of one implementation."""
    leaves = [x.detach().clone().requires_grad_() for x in (history, target, *params)]
    out, stats = attention(*leaves[:2], leaves[2:])
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    return out.detach(), stats, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves)]


def expected(history, target, params, grad_out, rows, stats, flags):
    def attention(history, target, params):
        hidden, weight, bias = unflatten(
            params,
            [s.double() for s in stats],
            flags["activation"],
            flags["batch_norm"],
            flags["norm_eps"],
            flags["dice_eps"],
        )
        out, all_stats = reference.din_attention(
            history, target, hidden, weight, bias, **rows, use_softmax=flags["use_softmax"],
            count_padding=flags.get("count_padding", False), return_scores=flags.get("return_scores", False),
            training=flags["training"], dropout=flags.get("dropout", 0.0), seed=flags.get("seed"),
        )  # fmt: skip
        flat = [t for s in all_stats if s is not None for t in s]
        return out, torch.cat(flat) if flat else None

    return run(attention, history.double(), target.double(), [p.double() for p in params], grad_out.double())


def check(history, target, params, grad_out, rows, stats, flags):
    ref_out, ref_stats, ref_grads = expected(history, target, params, grad_out, rows, stats, flags)

    def attention(history, target, params):
        return din_attention(history, target, params, stats, **rows, **flags)

    out, batch_stats, grads = run(attention, history, target, params, grad_out)
    assert out.dtype == history.dtype and out.shape == grad_out.shape
    tolerance = TOLERANCE[history.dtype]

    def close(name, actual, ref, floor=0.0):
        error, scale = (actual.double() - ref).norm(), max(float(ref.norm()), floor)
        assert torch.isfinite(actual).all(), f"{name} is not finite"
        assert error <= tolerance * scale + 1e-30, f"{name}: relative error {error / scale:.2e}"

    close("out", out, ref_out)
    if flags["training"] and ref_stats is not None:
        assert_close(batch_stats.double(), ref_stats, rtol=1e-4 if history.dtype != torch.float64 else 1e-9, atol=1e-5)
    # Parameter gradients that nearly cancel are held to the rounding of larger ones. With a softmax all of them do,
    # since the gradients by a sample's scores sum to zero.
    largest = max((float(g.norm()) for g in ref_grads[2:]), default=0.0)
    for i, (actual, ref) in enumerate(zip(grads, ref_grads)):
        close(f"grad {i}", actual, ref, floor=(1.0 if flags["use_softmax"] else 0.1) * largest if i > 1 else 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_reference(form, activation):
    chooser = random.Random(f"{form} {activation}")
    generator = torch.Generator().manual_seed(chooser.randrange(1 << 30))
    for use_softmax, batch_norm, training, dtype in itertools.product(*[(False, True)] * 3, TOLERANCE):
        B, L = chooser.choice([1, 3, 9]), chooser.choice([0, 1, 5, 49])
        if training:  # of few rows' statistics, the gradient is a difference of nearly equal numbers in any precision
            B, L = 9, chooser.choice([30, 49])
        D, dims = chooser.choice([1, 7, 10, 16, 64, 200]), chooser.choice([[], [1], [36], [130], [80, 40], [8, 9, 10]])
        params, stats = make_params(D, dims, activation, batch_norm, dtype, generator)
        history, target, rows = make_inputs(form, B, L, D, dtype, generator)
        grad_out = torch.randn(B, D, generator=generator).to(dtype)
        flags = dict(activation=activation, batch_norm=batch_norm, use_softmax=use_softmax, training=training,
                     norm_eps=1e-5, dice_eps=1e-3, dropout=chooser.choice([0.0, 0.0, 0.3]),
                     seed=torch.tensor(chooser.randrange(-(2**63), 2**63)))  # fmt: skip
        try:
            check(history, target, params, grad_out, rows, stats, flags)
        except AssertionError as error:
            raise AssertionError(f"B {B} L {L} D {D} dims {dims} {dtype} {flags}: {error}") from error


FLAGS = dict(activation="dice", batch_norm=True, use_softmax=False, training=True, norm_eps=1e-5, dice_eps=1e-3)


def inputs(form="lengths", B=7, L=9, D=10, dims=(12, 5), dtype=torch.float32, activation="dice", batch_norm=True):
    generator = torch.Generator().manual_seed(3)
    history, target, rows = make_inputs(form, B, L, D, dtype, generator)
    params, stats = make_params(D, dims, activation, batch_norm, dtype, generator)
    return history, target, params, torch.randn(B, D, generator=generator).to(dtype), rows, stats


@pytest.mark.parametrize("first", range(16))
def test_every_rest_of_a_vector(first):
    """Columns and rows beyond whole vectors and tiles are computed in ways of their own."""
    generator = torch.Generator().manual_seed(first)
    for H, training in itertools.product((16 + first, 32 + first, 64 + first), (False, True)):
        dims, D, L = (H, 1 + (H + first) % 17), 5 + first, 1 + H % 19
        params, stats = make_params(D, dims, "sigmoid", True, torch.float32, generator)
        history, target, rows = make_inputs("padded", 6, L, D, torch.float32, generator)
        flags = dict(activation="sigmoid", batch_norm=True, use_softmax=False, training=training, norm_eps=1e-5)
        check(history, target, params, torch.randn(6, D, generator=generator), rows, stats, flags | {"dice_eps": 1e-3})


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_long_history(use_softmax, training, dtype):
    """More rows than a block of the kernel, so that the softmax's running maximum moves."""
    for form, D, dims, activation, batch_norm in (
        ("mask", 16, [36], "dice", True),
        ("padded", 48, [130], "dice", True),
        ("offsets", 200, [1], "dice", True),
        ("lengths", 7, [36, 10], "dice", True),
        ("mask", 64, [36], "dice_batch_norm", True),
        ("lengths", 10, [130], "sigmoid", False),
        ("offsets", 1, [36], "prelu", True),
        ("padded", 7, [1, 130], "relu", False),
    ):
        flags = dict(FLAGS, use_softmax=use_softmax, training=training, activation=activation, batch_norm=batch_norm)
        check(*inputs(form, 2, 1000, D, dims, dtype, activation, batch_norm), flags)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "activation, dtype, use_softmax",
    [("dice", torch.float32, False), ("dice_batch_norm", torch.bfloat16, True), ("sigmoid", torch.float64, False)],
    ids=str,
)
def test_bits_do_not_depend_on_threads(form, activation, dtype, use_softmax):
    history, target, params, grad_out, rows, stats = inputs(
        form, B=300, L=21, dims=[36, 8], dtype=dtype, activation=activation
    )
    flags = {**FLAGS, "activation": activation, "use_softmax": use_softmax}
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out))
    for out, batch_stats, _ in results:
        assert torch.equal(out, results[0][0]) and torch.equal(batch_stats, results[0][1])
    assert all(torch.equal(a, b) for a, b in zip(results[1][2], results[2][2]))


@pytest.mark.skipif(bool(no_extension), reason="what the C++ kernels promise")
@pytest.mark.parametrize("rows", [1, 5, 16, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("D, dims", [(64, [36]), (32, [36]), (16, [80, 40]), (7, [1])])
def test_scores_that_cancel(rows, D, dims):
    """Sample by sample: among thousands some score nearly cancels, and is as exact as its rows allow all the same."""
    generator = torch.Generator().manual_seed(0)
    flags = FLAGS | {"training": False}
    params, stats = make_params(D, dims, "dice", True, torch.bfloat16, generator)
    history, target, _ = make_inputs("padded", 3000, rows, D, torch.bfloat16, generator)
    exact, _, _ = expected(history, target, params, torch.ones_like(target), {}, stats, flags)
    out = din_attention(history, target, params, stats, **flags)[0].double()
    assert ((out - exact).norm(dim=1) / exact.norm(dim=1)).max() <= TOLERANCE[torch.bfloat16]


EVERY_LEVEL = """
import sys, torch
sys.path.insert(0, "tests/ops")
from test_din_attention import FLAGS, FORMS, cpu_isa, din_attention, inputs, run
results = []
for dtype, training, form in [(torch.bfloat16, False, f) for f in FORMS] + [
    (torch.float32, False, "mask"), (torch.float16, False, "mask"), (torch.bfloat16, True, "mask")]:
    for D, dims in (16, [36]), (64, [80, 40]), (7, [1]), (33, [24]), (1, [9]), (200, [130]):
        history, target, params, grad_out, rows, stats = inputs(form, 9, 40, D, dims, dtype)
        flags = FLAGS | {"training": training}
        out, _, grads = run(lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out)
        results.append((dtype == torch.bfloat16 and not training, out, grads))
torch.save(results, sys.argv[1])
print(cpu_isa)
"""


@pytest.mark.skipif(
    cpu_isa != "avx512_bf16",
    reason="the processor has no AVX512-BF16, or is not to use it",
)
def test_bfloat16_products(tmp_path):
    """AVX512-BF16 changes the forward of bfloat16 in eval, by no more than its rounding, and nothing else."""
    results = {}
    for isa in ("avx512_bf16", "avx512"):
        environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
        if isa == "avx512":
            environment["ATEN_CPU_CAPABILITY"] = isa
        printed = subprocess.run(
            [sys.executable, "-c", EVERY_LEVEL, tmp_path / isa],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
        assert printed.strip() == isa
        results[isa] = torch.load(tmp_path / isa)
    differ = 0
    for (rounds, out, grads), (_, exact_out, exact_grads) in zip(results["avx512_bf16"], results["avx512"]):
        differ += not torch.equal(out, exact_out)
        for a, b in zip((out, *grads), (exact_out, *exact_grads)):
            if rounds:
                assert (a.double() - b.double()).norm() <= TOLERANCE[torch.bfloat16] * b.double().norm()
            else:
                assert torch.equal(a, b)
    assert differ


def test_parameters_of_another_dtype():
    history, target, _, grad_out, rows, _ = inputs(dtype=torch.bfloat16, B=30)
    _, _, params, _, _, stats = inputs(dtype=torch.float32)
    check(history, target, params, grad_out, rows, stats, FLAGS)


def test_views_of_stacked_embeddings():
    """Slices and expanded tensors are read where they are; a stride along D is copied."""
    _, _, params, _, _, stats = inputs(D=8, form="padded")
    stacked = torch.randn(5, 12, 3, 16)
    grad_out = torch.randn(5, 8)
    for history, target in (
        (stacked[:, 1:, 0, 4:12], stacked[:, 0, 1, :8]),
        (stacked[:1, :, 1, :8].expand(5, -1, -1), stacked[0, 0, 0, :8].expand(5, -1)),
        (stacked[:, :, 2, ::2], stacked[:, 2, 0, 1::2]),
    ):
        check(history, target, params, grad_out, {}, stats, FLAGS)


def test_strided_history_and_target_are_not_copied():
    _, _, params, _, _, stats = inputs(D=8, form="padded")
    stacked = torch.randn(5, 12, 3, 16)
    views = stacked[:, 1:, 0, 4:12].requires_grad_(), stacked[:, 0, 1, :8].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out, _ = din_attention(*views, params, stats, **FLAGS)
        torch.autograd.grad(out, views, torch.ones(5, 8))
    called = {e.name for e in profile.events()}
    assert "rankkernels::din_attention_backward" in called
    assert not called & {"aten::clone", "aten::copy_"}


@pytest.mark.parametrize("gaps", [False, True])
def test_nested(gaps):
    """A nested history, also one with gaps between the samples: as the same rows with offsets."""
    _, target, params, grad_out, _, stats = inputs(B=3, D=10)
    x = torch.randn(3, 9, 10)
    starts, lengths = torch.tensor([0, 2, 5]), torch.tensor([3, 0, 4])
    kept = [x[b, s : s + n] for b, (s, n) in enumerate(zip(starts, lengths))]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    flags = {**FLAGS, "training": False}
    expected = run(lambda *p: din_attention(*p, stats, offsets=offsets, **flags), torch.cat(kept), target, params,
                   grad_out)  # fmt: skip

    def nested(history, target, params):
        if gaps:
            history = torch.nested.narrow(history, 1, starts, lengths, layout=torch.jagged)
        else:
            history = torch.nested.nested_tensor_from_jagged(history, offsets)
        return din_attention(history, target, params, stats, **flags)

    out, _, grads = run(nested, x if gaps else torch.cat(kept), target, params, grad_out)
    assert torch.equal(out, expected[0])
    if gaps:
        grad = grads[0]
        grads[0] = torch.cat([grad[b, s : s + n] for b, (s, n) in enumerate(zip(starts, lengths))])
        assert grad.count_nonzero() == grads[0].count_nonzero()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_nested():
    _, target, params, _, _, stats = inputs(B=2, D=10)
    rows = [torch.randn(3, 10), torch.randn(4, 10)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ValueError, match="^din_attention: a nested history must be .* got .* torch.strided"):
        din_attention(torch.nested.nested_tensor(rows), target, params, stats, **FLAGS)
    with pytest.raises(ValueError, match="^din_attention: a nested history has offsets of its own"):
        din_attention(jagged, target, params, stats, offsets=torch.tensor([0, 3, 7]), **FLAGS)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("training, batch_norm", [(False, True), (False, False), (True, False)])
def test_nothing_valid(training, batch_norm, dtype, use_softmax):
    history, target, params, grad_out, _, stats = inputs(dtype=dtype, batch_norm=batch_norm)
    flags = {**FLAGS, "training": training, "batch_norm": batch_norm, "use_softmax": use_softmax}
    for rows in ({"lengths": torch.zeros(7, dtype=torch.int64)}, {"mask": torch.zeros(7, 9, dtype=torch.bool)}):
        out, _, grads = run(lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out)
        assert (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("use_softmax", [False, True])
def test_empty_histories_among_others_in_training(dtype, use_softmax):
    history, target, params, grad_out, _, stats = inputs("padded", dtype=dtype, B=9, L=30)
    rows = {"lengths": torch.tensor([0, 30, 0, 0, 30, 29, 28, 30, 0])}
    flags = {**FLAGS, "use_softmax": use_softmax}
    check(history, target, params, grad_out, rows, stats, flags)
    out, _, grads = run(lambda *x: din_attention(*x, stats, **rows, **flags), history, target, params, grad_out)
    empty = rows["lengths"] == 0
    assert (out[empty] == 0).all() and (grads[0][empty] == 0).all() and (grads[1][empty] == 0).all()


@pytest.mark.parametrize("activation", ["sigmoid", "dice"])
@pytest.mark.parametrize("dims", [[1], [20]], ids=str)
def test_statistics_lose_nothing_to_means(activation, dims):
    """Units far from zero, which differ by sample and hardly within one."""
    history, target, params, grad_out, rows, stats = inputs("padded", 27, 63, 15, dims, activation=activation)
    params[1] += 100
    history = history[:, :1] + 0.1 * history
    flags = dict(FLAGS, use_softmax=False, training=True, activation=activation, batch_norm=True)
    _, found = din_attention(history, target, params, **flags)
    assert_close(found.double(), expected(history, target, params, grad_out, rows, stats, flags)[1], rtol=3e-6, atol=0)
    check(history, target, params, grad_out, rows, stats, flags)


def test_one_row_gives_no_statistics():
    history, target, params, _, _, stats = inputs()
    with pytest.raises(ValueError, match="more than one valid row"):
        din_attention(history, target, params, stats, lengths=torch.tensor([0, 1, 0, 0, 0, 0, 0]), **FLAGS)


NO_ROWS = {
    "no samples": lambda h, t: (h[:0], t[:0], {}),
    "no positions": lambda h, t: (h[:, :0], t, {}),
    "lengths": lambda h, t: (h, t, {"lengths": torch.zeros(len(t), dtype=torch.long)}),
    "mask": lambda h, t: (h, t, {"mask": torch.zeros(h.shape[:2], dtype=torch.bool)}),
    "offsets": lambda h, t: (h[:0, 0], t, {"offsets": torch.zeros(len(t) + 1, dtype=torch.long)}),
    "nested": lambda h, t: (torch.nested.nested_tensor([r[:0] for r in h], layout=torch.jagged), t, {}),
    "shared": lambda h, t: (h, t[:0], {"history_index": torch.zeros(0, dtype=torch.long)}),
}


@pytest.mark.parametrize("given", [True, False], ids=["running", "none"])
@pytest.mark.parametrize("activation", ["dice", "dice_batch_norm", "relu"])
@pytest.mark.parametrize("form", NO_ROWS)
def test_no_rows_leave_the_statistics(form, activation, given):
    """An update with what is returned changes nothing, and every parameter has a gradient: zeros."""
    history, target, params, _, _, stats = inputs(activation=activation)
    history, target, rows = NO_ROWS[form](history, target)
    params = [p.detach().requires_grad_() for p in params]
    flags = {**FLAGS, "activation": activation, "batch_norm": True, "training": True}
    out, batch_stats = din_attention(history, target, params, stats if given else (), **rows, **flags)
    assert out.shape == target.shape and not out.any()
    expected = torch.cat(stats) if given else torch.zeros(sum(map(len, stats)))
    assert torch.equal(batch_stats, expected.to(batch_stats.dtype))
    grads = torch.autograd.grad(out.sum(), params)
    assert not any(g.any() for g in grads)


def test_running_statistics_may_change_before_the_backward():
    history, target, params, grad_out, rows, stats = inputs()
    target.requires_grad_()
    out, _ = din_attention(history, target, params, stats, **rows, **FLAGS)
    for s in stats:
        s.mul_(2)
    out.backward(grad_out)
    assert target.grad.isfinite().all()


def test_philox_known_answers():
    """The vectors that Random123, the authors' own library, is tested with."""
    for counter, key, words in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        counter, key = ([torch.tensor(w) for w in x] for x in (counter, key))
        assert [int(w) for w in reference.philox(counter, key)] == words


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, H", [(torch.float64, 45), (torch.float32, 20)], ids=str)
def test_dropped_units_are_the_references(form, dtype, H):
    """Row l of each history is the unit vector l, so that out[b, l] is row l's score; unit h of a layer adds 2^h to it
    where it is kept: the scores are the masks in binary."""
    B, L, p = 5, 139, 0.5
    generator = torch.Generator().manual_seed(1)
    history = torch.eye(L, dtype=dtype).expand(B, L, L)
    _, _, rows = make_inputs("lengths" if form == "padded" else form, B, L, 1, dtype, generator)
    if form == "padded":
        rows = {}
    if form == "offsets":
        history = torch.cat([history[0, :n] for n in rows["offsets"].diff()])
    powers = 2.0 ** torch.arange(H, dtype=dtype)
    one, zero = torch.ones(H, dtype=dtype), torch.zeros(H, dtype=dtype)
    first = [torch.zeros(H, 4 * L, dtype=dtype), one]
    for layer, second in ((0, []), (1, [torch.zeros(H, H, dtype=dtype), one]), (0, [torch.eye(H, dtype=dtype), zero])):
        params = [*first, *second, powers[None] / 4, zero[:1]]
        for seed in (torch.tensor(0), torch.tensor([-(2**62) - 12345])):
            out, _ = din_attention(
                history, torch.zeros(B, L, dtype=dtype), params, **rows, activation="linear", dropout=p, seed=seed
            )
            _, sample, position = reference.valid_rows(history, **rows)
            factor = reference.dropout_factor(p, seed, layer, sample, position, H).to(dtype)
            if layer == 0 and second:
                factor = factor * reference.dropout_factor(p, seed, 1, sample, position, H).to(dtype)
            elif layer == 0:
                factor = factor * 1
            expected = torch.zeros(B, L, dtype=dtype).index_put((sample, position), factor @ (powers / 4))
            assert torch.equal(out, expected)
            assert (
                0.45 < float((reference.dropout_factor(p, seed, layer, sample, position, H) > 0).double().mean()) < 0.55
            )


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.1, 0.75, 1.0])
def test_rate_of_dropout(p):
    sample, position = torch.arange(4000) // 50, torch.arange(4000) % 50
    factor = reference.dropout_factor(p, torch.tensor(11), 0, sample, position, 36)
    assert abs(float((factor == 0).double().mean()) - p) < 4 * (p * (1 - p) / factor.numel()) ** 0.5 + 1e-6
    assert p == 1 or abs(float(factor.mean()) - 1) < 0.02
    for other in (torch.tensor(12), torch.tensor(11 + 2**32)):
        same = reference.dropout_factor(p, other, 0, sample, position, 36) == factor
        assert p in (0, 1) or abs(float(same.double().mean()) - (p * p + (1 - p) ** 2)) < 0.01


def test_everything_dropped():
    history, target, params, grad_out, rows, stats = inputs("mask", activation="sigmoid", batch_norm=False)
    flags = dict(FLAGS, activation="sigmoid", batch_norm=False, training=False, dropout=1.0, seed=torch.tensor(3))
    check(history, target, params, grad_out, rows, stats, flags)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dropout=1.5, seed=torch.tensor(1)), "dropout must be a probability, got 1.5"),
        (dict(dropout=-0.1, seed=torch.tensor(1)), "dropout must be a probability, got -0.1"),
        (dict(dropout=0.1), "dropout needs a seed of one int64, got none"),
        (dict(dropout=0.1, seed=torch.tensor([1, 2])), r"dropout needs a seed of one int64, got \[2\] torch.int64"),
        (dict(dropout=0.1, seed=torch.tensor(1.0)), r"dropout needs a seed of one int64, got \[\] torch.float32"),
    ],
)
def test_bad_dropout(change, message):
    history, target, params, _, rows, stats = inputs()
    with pytest.raises((ValueError, RuntimeError), match=f"^din_attention: {message}"):
        din_attention(history, target, params, stats, **rows, **FLAGS, **change)


@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_units_are_as_the_reference_has_them(activation, use_softmax):
    """A unit's bias is infinite or NaN, of one of two layers."""
    for layer, value in itertools.product((0, 1), (torch.inf, -torch.inf, torch.nan)):
        case = din_attention_case(5, 9, 6, [7, 20], activation, False, use_softmax, False, "lengths")
        inputs = case.inputs()
        biases = [t for t in inputs[3:] if t.shape in ((7,), (20,))]
        [t for t in biases if len(t) == (7, 20)[layer]][0][3] = value
        inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
        wanted, results = [t for t in inputs if t.requires_grad], []
        for function in (case.function, case.reference):
            out = function(*inputs)
            grads = torch.autograd.grad(out, [inputs[0], inputs[1], wanted[-2]], torch.ones_like(out))
            results.append([out, *grads])
        torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-4)
