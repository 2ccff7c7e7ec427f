"""Normalization and activation: sizes, threads and extremes beyond the cases of ``rankkernels.testing``, the layers
that use the op, and the Dice of other libraries."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_ops import check, gradients
from torch import nn

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._schema import parsed
from rankkernels.ops.norm_activation import Flags, Inputs, _by_torch, is_faster
from rankkernels.testing import TOLERANCE, norm_activation_case, relative_error

EVERY = [(name, norm) for name in ACTIVATIONS for norm in (True, False) if norm or name != "dice_batch_norm"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation, batch_norm", EVERY)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(activation, batch_norm, training, dtype):
    for N, H in ((2, 5), (130, 3), (300, 48), (17, 1000)):
        case = norm_activation_case(N, H, activation, batch_norm, affine=N % 2 == 0, training=training)
        check(case, dtype, case.inputs(dtype, requires_grad=True))


def test_on_a_gpu_small_layers_are_torchs():
    """Launches decide there, up to some 8 million values; Dice is eight of torch's."""
    layer = lambda N, H: torch.empty(N, H, device="meta")  # noqa: E731
    assert not is_faster(layer(4096, 256), "relu") and not is_faster(layer(30_000, 256), "prelu")
    assert is_faster(layer(65_536, 256), "relu") and is_faster(layer(0, 256), "relu")
    assert is_faster(layer(16, 4), "dice")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation, batch_norm", EVERY)
def test_by_torchs_ops(activation, batch_norm, training):
    """What a GPU runs where no kernel serves."""
    case = norm_activation_case(9, 5, activation, batch_norm, training=training)
    inputs = case.inputs(torch.float64, requires_grad=True)
    given = parsed(case.arguments(*inputs), Inputs, Flags)
    (out, stats), (_, expected_stats) = (
        _by_torch(*given),
        torch.ops.rankkernels.norm_activation(*case.arguments(*inputs)),
    )
    assert torch.allclose(stats, expected_stats) and out is not inputs[0]
    expected = case.reference(*inputs)
    torch.testing.assert_close(out, expected)
    of = dict(inputs=inputs, grad_outputs=torch.linspace(-1, 1, 45, dtype=torch.float64).view(9, 5))
    torch.testing.assert_close(torch.autograd.grad(out, **of), torch.autograd.grad(expected, **of))


@pytest.mark.parametrize("H", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 80, 100, 127])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_vector_tail(H, dtype):
    for activation in ("dice", "dice_batch_norm") if H > 1 else ("dice_batch_norm",):
        case = norm_activation_case(19, H, activation)
        check(case, dtype, case.inputs(dtype, requires_grad=True))


@pytest.mark.parametrize("activation, batch_norm", EVERY)
def test_bits_do_not_depend_on_threads(activation, batch_norm):
    case = norm_activation_case(5003, 65, activation, batch_norm)
    inputs = case.inputs(requires_grad=True)
    grad_out, results = torch.randn(5003, 65), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, grads = gradients(case.function, inputs, grad_out)
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("H", [16, 33, 40, 48, 256])
@pytest.mark.parametrize("activation", ["relu", "dice", "dice_batch_norm"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_result_has_the_bits_of_its_parts(activation, H, dtype, poisoned):
    """Beyond 16 MiB it is stored past the caches."""
    case = norm_activation_case(2**24 // (H * dtype.itemsize) + 7, H, activation, training=False)
    x, *rest = case.inputs(dtype)
    assert torch.equal(case.function(x, *rest), torch.cat([case.function(part, *rest) for part in x.chunk(3)]))


def test_variance_far_from_zero():
    """The variance of values around 1000 loses nothing to their mean."""
    x = torch.randn(4000, 20) + 1000
    _, stats = rk.norm_activation(x, activation="linear", batch_norm=True, training=True)
    assert (
        relative_error(stats[20:], x.double().var(0)) < 1e-6 and relative_error(stats[:20], x.double().mean(0)) < 1e-7
    )


def test_infinities_and_nans_stay_in_their_row():
    x = torch.randn(40, 33)
    x[3, 5], x[7, 32] = torch.inf, torch.nan
    y, _ = rk.norm_activation(x, alpha=torch.ones(1) * 0.3, activation="dice")
    rows = torch.ones(40, dtype=torch.bool)
    rows[[3, 7]] = False
    assert y[rows].isfinite().all() and not y[3].isfinite().all() and y[7].isnan().any()


EXTREMES = [torch.inf, -torch.inf, torch.nan, 1e38, -1e38, 6e4, -6e4, 720.0, -720.0, 100.0, -100.0, -80.0, 1.0, -1.0]
EXTREMES += [0.0, -0.0, 1e-40, -1e-40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation, batch_norm", [(a, n) for a, n in EVERY if a != "dice"])
def test_extremes_have_torchs_value(activation, batch_norm, dtype):
    """Infinities, NaN, zeros of both signs, tails and halfs that overflow, forward and backward, of gradients that are
    such themselves, too."""
    for H, alpha, upstream in itertools.product((3, 40), (0.0, 0.25, -2.0), (1.0, 0.0, torch.inf, torch.nan)):
        if activation == "dice_batch_norm" and upstream == torch.inf:
            continue  # the sum of two infinities there, here the product of their factors' sum
        x = torch.tensor(EXTREMES).to(dtype)[:, None].repeat(1, H).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        slope = torch.full((H,), alpha, dtype=wide, requires_grad=True) if ACTIVATIONS[activation] else None
        stats = (torch.zeros(H), torch.ones(H)) if batch_norm else (None, None)
        norm = reference.BatchNorm(None, None, *stats, 1e-5) if batch_norm else None
        wanted = [x] if slope is None else [x, slope]
        out, _ = rk.norm_activation(x, None, None, slope, *stats, activation=activation, batch_norm=batch_norm)
        expected, _ = reference.norm_activation(x, norm, activation, slope)
        results = [(y, *torch.autograd.grad(y, wanted, torch.full_like(y, upstream))) for y in (out, expected)]
        torch.testing.assert_close(*results, equal_nan=True, check_dtype=False)
        here = ~out.isnan()
        assert batch_norm or torch.equal(out.signbit()[here], expected.signbit()[here])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_dice_of_extremes_is_torchs(batch_norm):
    """A row with an infinity or a NaN is NaN, and one whose squares overflow is what the reference makes of it."""
    x = torch.randn(8, 40)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e19, -1e20, 1e37)):
        x[row, 7 * row] = value
    stats = (torch.zeros(40), torch.ones(40)) if batch_norm else (None, None)
    out, _ = rk.norm_activation(x, None, None, torch.ones(1) * 0.3, *stats, activation="dice", batch_norm=batch_norm)
    norm = reference.BatchNorm(None, None, *stats, 1e-5) if batch_norm else None
    expected, _ = reference.norm_activation(x, norm, "dice", torch.ones(1) * 0.3)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert out[:3].isnan().all() and out[3:].isfinite().all()


def test_running_statistics_of_a_batch_whose_squares_overflow_are_torchs():
    x, norm = torch.randn(30, 4), nn.BatchNorm1d(4)
    x[3, 1], x[5, 2], x[7, 3] = 1e20, torch.inf, torch.nan
    expected = norm(x)
    out, stats = rk.norm_activation(x, activation="linear", batch_norm=True, training=True)
    torch.testing.assert_close(out, expected.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
    running = 0.1 * stats + 0.9 * torch.cat([torch.zeros(4), torch.ones(4)])
    torch.testing.assert_close(running, torch.cat([norm.running_mean, norm.running_var]), equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_nothing(training):
    case = norm_activation_case(9, 10, training=training)
    inputs = case.inputs(torch.bfloat16, requires_grad=True)
    grad_out = torch.randn(9, 10).bfloat16()
    expected, expected_grads = gradients(case.function, inputs, grad_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = gradients(case.function, inputs, grad_out)
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["dice", nn.ReLU, nn.PReLU, nn.Identity, nn.Tanh])
def test_mlp_is_its_modules(activation, affine, momentum):
    """Outputs, gradients and running statistics against the modules of ``mlp`` called one after the other."""
    ours = rk.MLP(7, dims=[9, 6], activation=activation)
    for i in (1, 5):
        ours.mlp[i] = nn.BatchNorm1d(ours.mlp[i].num_features, affine=affine, momentum=momentum)
    plain = copy.deepcopy(ours.double())
    for step in range(4):
        ours.train(step < 3), plain.train(step < 3)
        x = torch.randn(30, 7, dtype=torch.float64)
        ours.zero_grad(), plain.zero_grad()
        y, expected = ours(x), plain.mlp(x)
        assert relative_error(y, expected) < 1e-10
        y.square().sum().backward(), expected.square().sum().backward()
        floor = max(p.grad.norm().item() for p in plain.parameters())
        for p, q in zip(ours.parameters(), plain.parameters()):
            assert relative_error(p.grad, q.grad, 0.1 * floor) < 1e-10
    for a, b in zip(ours.buffers(), plain.buffers()):
        assert a.dtype == b.dtype and relative_error(a, b) < 1e-12


def test_mlp_calls_hooks_and_takes_more_dimensions():
    mlp, seen = rk.MLP(7, dims=[9]), []
    mlp.mlp[1].register_forward_hook(lambda *_: seen.append("norm"))
    mlp(torch.randn(5, 7))
    assert seen == ["norm"]
    dice = rk.Dice()
    x = torch.randn(3, 4, 5)
    assert torch.equal(dice(x), reference.dice(x, dice.alpha))
    with pytest.raises(ValueError, match="training needs more than one row, got 1"):
        rk.MLP(7, dims=[9], activation="dice")(torch.randn(1, 7))
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's own, which a small batch runs
        rk.MLP(7, dims=[9])(torch.randn(1, 7))
    assert rk.MLP(7, dims=[9]).eval()(torch.randn(0, 7)).shape == (0, 1)
    assert rk.MLP(7, dims=[9, 0, 3]).eval()(torch.randn(5, 7)).shape == (5, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "library, affine", [("deepctr_torch.layers.activation", True), ("fuxictr.pytorch.layers.activations", False)]
)
def test_dice_batch_norm_is_theirs(library, affine, training):
    module = pytest.importorskip(library, reason=f"{library} is not installed").Dice(10).train(training)
    norm = module.bn
    nn.init.normal_(module.alpha), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert (norm.weight is not None) == affine
    x, grad = torch.randn(20, 10, requires_grad=True), torch.randn(20, 10)
    running_mean, running_var = norm.running_mean.clone(), norm.running_var.clone()
    expected = module(x)
    out, stats = rk.norm_activation(
        x, norm.weight, norm.bias, module.alpha, running_mean, running_var,
        activation="dice_batch_norm", batch_norm=True, training=training, norm_eps=norm.eps,
    )  # fmt: skip
    assert relative_error(out, expected) < 1e-6
    wanted = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, wanted, grad) for y in (out, expected))):
        assert relative_error(a, b) < 1e-5
    if training:
        for running, batch, theirs in zip(
            (running_mean, running_var), stats.chunk(2), (norm.running_mean, norm.running_var)
        ):
            assert relative_error(running.lerp(batch, norm.momentum), theirs) < 1e-6


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=torch.randn(4)), r"x must have 2 dimensions, got 1 \(shape \[4\]\)"),
        (dict(x=torch.ones(4, 6).long()), "x must be float32, float64, float16 or bfloat16, got torch.int64"),
        (dict(activation="swish"), "unknown activation 'swish', expected one of linear, sigmoid"),
        (dict(), "needs an alpha"),
        (dict(activation="relu", alpha=torch.ones(1)), "has no alpha"),
        (dict(alpha=torch.ones(2)), r"alpha must be \[H\] = \[6\] or \[1\], got \[2\]"),
        (dict(activation="dice_batch_norm", alpha=torch.ones(6)), "dice_batch_norm needs batch_norm"),
        (dict(activation="relu", batch_norm=True), "give running_mean and running_var, or training"),
        (dict(activation="relu", weight=torch.ones(6)), "give both weight and bias, or neither"),
        (dict(activation="relu", weight=torch.ones(6), bias=torch.ones(6)), "weight and bias belong to batch_norm"),
        (dict(activation="relu", batch_norm=True, training=True, weight=torch.ones(5), bias=torch.ones(6)),
         r"weight must be \[H\] = \[6\], got \[5\]"),
        (dict(x=torch.randn(1, 6), activation="relu", batch_norm=True, training=True), "more than one row, got 1"),
        (dict(activation="relu", batch_norm=True, running_mean=torch.ones(6), running_var=torch.ones(6).int()),
         "running_var must be float32, float64, float16 or bfloat16, got torch.int32"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message):
    """From the CPU's checks and from those that the other devices share."""
    arguments = {"x": X} | arguments
    for device in ("cpu", "meta"):
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises((RuntimeError, ValueError), match=f"norm_activation: .*{message}"):
            rk.norm_activation(**on_device)


def test_export():
    """Training-mode statistics stay out: what is exported is eval."""
    mlp = rk.MLP(7, dims=[9, 6], activation="dice").eval()
    x = torch.randn(5, 7)
    exported = torch.export.export(mlp, (x,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    more = torch.randn(12, 7)
    assert torch.equal(exported(more), mlp(more))


@pytest.mark.parametrize("activation", ["dice", "relu"])
def test_compiled_mlp_trains_the_same(activation):
    torch._dynamo.reset()
    eager = rk.MLP(7, dims=[9, 6], activation=activation)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for n in (20, 31, 5):
        x = torch.randn(n, 7)
        eager(x).sum().backward(), run(x).sum().backward()
    # Eager, a small batch's relu layer is torch's own.
    for a, b in zip(eager.state_dict().values(), compiled.state_dict().values()):
        torch.testing.assert_close(a, b)
    for a, b in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("activation", ["dice", "relu", nn.PReLU, nn.Identity])
def test_an_empty_batch_in_training_is_torchs(activation, momentum):
    """No result, gradients of zeros, and of the statistics only the count of batches moves."""
    ours = rk.MLP(7, dims=[9, 6], activation=activation)
    for norm in (ours.mlp[1], ours.mlp[5]):
        norm.momentum = momentum
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    plain = copy.deepcopy(ours)
    x = torch.randn(0, 7, requires_grad=True)
    for y in (ours(x), plain.mlp(x)):
        assert y.shape == (0, 1)
        y.sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(p.grad, q.grad) and not p.grad.any()
    for a, b in zip(ours.buffers(), plain.buffers()):
        assert torch.equal(a, b)
    assert ours.mlp[1].num_batches_tracked == 1
