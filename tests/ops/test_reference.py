"""The reference itself: against torch's functions, and against DeepCTR-Torch and FuxiCTR where they are installed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from process import run_pytest
from torch import nn

from rankkernels import din_attention, embedding_bag, fm_interaction, reference
from rankkernels.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
B, L, D = 7, 9, 5


def test_fm_is_the_sum_over_pairs():
    x = torch.randn(B, 6, D, dtype=torch.float64)
    pairs = sum(x[:, f] * x[:, g] for f in range(6) for g in range(f))
    torch.testing.assert_close(reference.fm_interaction(x, reduce_sum=False), pairs)
    torch.testing.assert_close(reference.fm_interaction(x), pairs.sum(1, keepdim=True))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs(training, affine):
    module = nn.BatchNorm1d(D, affine=affine, eps=1e-3).double().train(training)
    nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    norm = reference.BatchNorm(
        module.weight, module.bias, module.running_mean.clone(), module.running_var.clone(), module.eps
    )
    x = torch.randn(20, D, dtype=torch.float64)
    y, stats = reference.batch_norm(x, norm, training)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    torch.testing.assert_close(y, module(x))
    if training:
        torch.testing.assert_close(mean * 0.9 + stats.mean * 0.1, module.running_mean)
        torch.testing.assert_close(var * 0.9 + stats.unbiased_var * 0.1, module.running_var)
    else:
        assert stats is None


def test_batch_norm_needs_two_rows():
    norm = reference.BatchNorm(None, None, None, None, 1e-5)
    with pytest.raises(ValueError, match="more than one valid row to take statistics of, got 1"):
        reference.batch_norm(torch.randn(1, D), norm, training=True)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("seed", range(4))
def test_embedding_bag_is_torchs(seed, mode, padding_idx):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(11, D, dtype=torch.float64, generator=generator, requires_grad=True)
    counts = torch.randint(0, 5, (B,), generator=generator)
    indices = torch.randint(0, 11, (int(counts.sum()),), generator=generator)
    offsets = counts.cumsum(0) - counts
    psw = torch.randn(len(indices), dtype=torch.float64, generator=generator) if mode == "sum" and seed % 2 else None
    expected = F.embedding_bag(indices, weight, offsets, mode=mode, padding_idx=padding_idx, per_sample_weights=psw)
    grad_out = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, weight, grad_out)
    for function in (reference.embedding_bag, embedding_bag):
        out = function(weight, indices, offsets, mode=mode, padding_idx=padding_idx, per_sample_weights=psw)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, weight, grad_out)[0], expected_grad)


@pytest.mark.parametrize("shape", [(), (4,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("width", [3, 0])
def test_embedding_takes_indices_of_any_shape(shape, width):
    weight, ids = torch.randn(5, width), torch.randint(5, shape)
    assert torch.equal(reference.embedding(weight, ids), F.embedding(ids, weight))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_a_jagged_history(dtype):
    """Samples without rows, and offsets that promise more rows than there are, where torch.repeat_interleave, told the
    number of rows, writes beyond its result."""
    offsets = torch.tensor([0, 0, 2, 2, 2, 5, 5], dtype=dtype)
    _, sample, position = reference.valid_rows(torch.ones(5, 2), offsets=offsets)
    assert sample.tolist() == [1, 1, 4, 4, 4] and position.tolist() == [0, 1, 0, 1, 2]
    _, sample, _ = reference.valid_rows(torch.ones(3, 2), offsets=torch.tensor([0, 10_000_000], dtype=dtype))
    assert sample.tolist() == [0, 0, 0]


@pytest.mark.parametrize("use_softmax", [True, False])
def test_forms_agree(use_softmax):
    history, target = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)
    params = [torch.randn(s, dtype=torch.float64) for s in ((6, 4 * D), (6,), (1,), (1, 6), (1,))]
    lengths = torch.tensor([0, 1, L, 3, 5, 0, 2], dtype=torch.int32)
    mask = torch.arange(L) < lengths[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    nan_padded = history.masked_fill(~mask[..., None], torch.nan)

    def run(history, **form):
        return din_attention(history, target, params, use_softmax=use_softmax, **form)[0]

    alone = torch.cat(
        [
            din_attention(h[None, :n], t[None], params, use_softmax=use_softmax)[0]
            for h, t, n in zip(history, target, lengths)
        ]
    )
    for out in (run(nan_padded, lengths=lengths), run(nan_padded, mask=mask), run(history[mask], offsets=offsets)):
        torch.testing.assert_close(out, alone)
        assert (out[[0, 5]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_softmax", [True, False])
def test_empty_histories_have_zero_output_and_gradient(dtype, use_softmax):
    history = torch.randn(B, L, D, dtype=dtype, requires_grad=True)
    target = torch.randn(B, D, dtype=dtype, requires_grad=True)
    params = [torch.randn(s, requires_grad=True) for s in ((6, 4 * D), (6,), (1,), (1, 6), (1,))]
    mask = torch.zeros(B, L, dtype=torch.bool)
    out, _ = din_attention(history, target, params, mask=mask, use_softmax=use_softmax)
    assert out.dtype == dtype and (out == 0).all()
    for grad in torch.autograd.grad(out.float().sum(), [history, target, *params]):
        assert (grad == 0).all()


def test_scores_of_a_thousand_do_not_overflow_the_softmax():
    history, target = torch.randn(B, L, D), torch.randn(B, D)
    params = [1e3 * torch.randn(1, 4 * D), torch.zeros(1)]
    assert din_attention(history, target, params, use_softmax=True, activation="linear")[0].isfinite().all()


ACTIVATIONS = {"relu": "relu", "sigmoid": "sigmoid", "prelu": "prelu", "dice": "dice_batch_norm"}


def train_dice(module):
    """Dice's weights start at zero and one: make them count."""
    for name, p in module.named_parameters():
        if "alpha" in name or ".bn" in name or "activation" in name or p.dim() == 1:
            nn.init.normal_(p, std=0.5)
    for name, b in module.named_buffers():
        if "running_mean" in name:
            nn.init.normal_(b)
        elif "running_var" in name:
            nn.init.uniform_(b, 0.5, 2)


def compare_with(layer, norms, running_before, out, batch_stats, expected, *inputs):
    """Result, all gradients, and in training the running statistics that ``batch_stats`` lead to."""
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(expected)
    inputs = [*inputs, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out)):
        torch.testing.assert_close(a, b)
    if layer.training and norms:
        stats = iter(batch_stats.split([n.num_features for n in norms for _ in range(2)]))
        for norm, (mean, var) in zip(norms, running_before):
            m = norm.momentum
            torch.testing.assert_close(mean * (1 - m) + next(stats) * m, norm.running_mean)
            torch.testing.assert_close(var * (1 - m) + next(stats) * m, norm.running_var)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_deepctr_torch(seed, training):
    """AttentionSequencePoolingLayer with key lengths. Its normalizations see padded rows too: compared in training only
    where there are none."""
    sequence = pytest.importorskip("deepctr_torch.layers.sequence", reason="DeepCTR-Torch is not installed")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, L, D = rng.choice([3, 7, 20]), rng.choice([5, 9, 50]), rng.choice([1, 4, 10, 64])
    widths, activation = rng.choice([(6,), (8, 4), (5, 4, 3)]), rng.choice(list(ACTIVATIONS))
    use_softmax = rng.random() < 0.5
    layer = sequence.AttentionSequencePoolingLayer(
        widths, activation, weight_normalization=use_softmax, embedding_dim=D
    )
    layer.double().train(training)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    train_dice(layer)
    full = training and activation == "dice"
    lengths = torch.full((B,), L) if full else torch.randint(1, L + 1, (B,))
    history = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    dnn, dense = layer.local_att.dnn, layer.local_att.dense
    params, norms = [], []
    for linear, act in zip(dnn.linears, dnn.activation_layers):
        params += [linear.weight, linear.bias]
        if activation == "prelu":
            params.append(act.weight)
        elif activation == "dice":
            params += [act.alpha.flatten(), act.bn.weight, act.bn.bias]
            norms.append(act.bn)
    params += [dense.weight, dense.bias]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    out, stats = din_attention(
        history, target, params, [t for pair in before for t in pair], lengths=lengths,
        activation=ACTIVATIONS[activation], use_softmax=use_softmax, training=training and bool(norms),
        dice_eps=1e-8,
    )  # fmt: skip
    expected = layer(target[:, None], history, lengths[:, None]).squeeze(1)
    compare_with(layer, norms, before, out, stats, expected, history, target)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_fuxictr(seed, training):
    """DIN_Attention with a mask. Its normalizations see padded rows too: compared in training only where there are
    none."""
    attention = pytest.importorskip(
        "fuxictr.pytorch.layers.attentions.target_attention", reason="FuxiCTR is not installed"
    )
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, L, D = rng.choice([3, 7, 20]), rng.choice([5, 9, 50]), rng.choice([1, 4, 10, 64])
    widths, activation = rng.choice([[6], [8, 4], [5, 4, 3]]), rng.choice(list(ACTIVATIONS))
    use_softmax, batch_norm = rng.random() < 0.5, rng.random() < 0.5
    name = {"dice": "Dice", "prelu": "PReLU", "relu": "ReLU", "sigmoid": "Sigmoid"}[activation]
    layer = attention.DIN_Attention(D, widths, name, batch_norm=batch_norm, use_softmax=use_softmax)
    layer.double().train(training)
    train_dice(layer)
    mask = torch.rand(B, L) < 0.6
    mask[:, 0] = True
    if training and (batch_norm or activation == "dice"):
        mask[:] = True
    history = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    params, norms = [], []
    for module in layer.attention_layer.mlp:
        if isinstance(module, nn.Linear):
            params += [module.weight, module.bias]
        elif isinstance(module, nn.BatchNorm1d):
            params += [module.weight, module.bias]
            norms.append(module)
        elif isinstance(module, nn.PReLU):
            params.append(module.weight)
        elif hasattr(module, "bn"):
            params += [module.alpha, torch.ones_like(module.alpha), torch.zeros_like(module.alpha)]
            norms.append(module.bn)
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    out, stats = din_attention(
        history, target, params, [t for pair in before for t in pair], mask=mask, activation=ACTIVATIONS[activation],
        batch_norm=batch_norm, use_softmax=use_softmax, training=training and bool(norms), norm_eps=1e-5, dice_eps=1e-9,
    )  # fmt: skip
    expected = layer(target, history, mask)
    compare_with(layer, norms, before, out, stats, expected, history, target)


@pytest.mark.parametrize("training", [False, True])
def test_dice_is_that_of_all_three_libraries(training):
    x = torch.randn(20, D)
    deepctr = pytest.importorskip("deepctr_torch.layers.activation", reason="DeepCTR-Torch is not installed").Dice(D)
    fuxictr = pytest.importorskip("fuxictr.pytorch.layers.activations", reason="FuxiCTR is not installed").Dice(D)
    rechub = pytest.importorskip("torch_rechub.basic.activation", reason="torch-rechub is not installed").Dice()
    for module in (deepctr, fuxictr):
        train_dice(module.train(training))
        norm = reference.BatchNorm(
            module.bn.weight,
            module.bn.bias,
            module.bn.running_mean.clone(),
            module.bn.running_var.clone(),
            module.bn.eps,
        )
        out, _ = reference.dice_batch_norm(x, module.alpha, norm, training)
        assert relative_error(out, module(x)) < 1e-6
    assert relative_error(reference.dice(x, rechub.alpha, rechub.epsilon), rechub(x)) < 1e-6


def test_fm_is_that_of_deepctr_torch_and_fuxictr():
    x = torch.randn(B, 6, D)
    interaction = pytest.importorskip("deepctr_torch.layers.interaction", reason="DeepCTR-Torch is not installed")
    assert relative_error(fm_interaction(x), interaction.FM()(x)) < 1e-5
    interactions = pytest.importorskip("fuxictr.pytorch.layers.interactions", reason="FuxiCTR is not installed")
    product_sum = interactions.InnerProductInteraction(6, output="product_sum")
    assert relative_error(fm_interaction(x), product_sum(x)) < 1e-5


DIN = dict(
    history=torch.randn(3, 4, D),
    target=torch.randn(3, D),
    params=[torch.randn(6, 4 * D), torch.randn(6), torch.randn(1), torch.randn(1, 6), torch.randn(1)],
)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(history=torch.randn(4, D)), r"history must be \[B, L, D\]"),
        (dict(target=torch.randn(3, D + 1)), f"history and target must have one width D, got {D} and {D + 1}"),
        (dict(target=torch.randn(2, D)), "one batch size B, got 3 and 2"),
        (dict(target=torch.randn(3, D).double()), "must have one dtype, got torch.float32 and torch.float64"),
        (dict(lengths=torch.ones(3).int(), mask=torch.ones(3, 4) > 0), "give one of lengths, mask and offsets"),
        (dict(lengths=torch.ones(2, dtype=torch.int64)), r"lengths must be \[B\] = \[3\], got shape \[2\]"),
        (dict(lengths=torch.ones(3)), "lengths must be int32 or int64"),
        (dict(lengths=torch.tensor([1, 5, 2])), r"lengths\[1\] = 5 is outside 0 .. 4"),
        (dict(lengths=torch.tensor([1, 2, -1])), r"lengths\[2\] = -1 is outside 0 .. 4"),
        (dict(mask=torch.ones(3, 5) > 0), r"mask must be \[B, L\] = \[3, 4\], got shape \[3, 5\]"),
        (dict(mask=torch.ones(3, 4)), "mask must be bool"),
        (dict(history=torch.randn(6, D), offsets=torch.tensor([0, 2, 6])), r"offsets must be \[B \+ 1\] = \[4\]"),
        (dict(history=torch.randn(6, D), offsets=torch.tensor([0, 2, 4, 5])), "from 0 to N = 6, got 0 .. 5"),
        (dict(history=torch.randn(6, D), offsets=torch.tensor([0, 4, 2, 6])), "offsets decrease from 4 to 2"),
        (dict(activation="gelu"), "unknown activation 'gelu', expected one of linear, sigmoid"),
        (dict(params=DIN["params"][:-1]), "params must be 3 tensors a hidden layer and 2 of the output layer, got 4"),
        (dict(params=[torch.randn(6, 3 * D), *DIN["params"][1:]]), rf"hidden layer 0 must be \[H, {4 * D}\]"),
        (dict(params=[*DIN["params"][:2], torch.randn(5), *DIN["params"][3:]]),
         r"vectors of 6 values, its slope may have one, got \[5\]"),
        (dict(params=[*DIN["params"][:3], torch.randn(1, 5), torch.randn(1)]), r"output layer must be \[1, 6\]"),
        (dict(activation="dice_batch_norm", params=[*DIN["params"][:2], *[torch.randn(6)] * 3, *DIN["params"][3:]]),
         "running_stats must hold 2 tensors for each of 1 norms, got 0"),
    ],
)  # fmt: skip
def test_din_attention_bad_input(change, message):
    with pytest.raises((RuntimeError, ValueError), match=f"^din_attention: .*{message}"):
        din_attention(**{**DIN, **change})


def test_din_attention_training_of_one_row():
    params = [*DIN["params"][:2], torch.randn(6), torch.randn(6), *DIN["params"][2:]]
    lengths = torch.tensor([0, 1, 0])
    with pytest.raises((RuntimeError, ValueError), match="more than one valid row.*got 1"):
        din_attention(DIN["history"], DIN["target"], params, lengths=lengths, batch_norm=True, training=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(indices=torch.tensor([[0, 9]])), r"indices\[0, 1\] = 9 is out of range for a table with 9 rows"),
        (dict(indices=torch.tensor([[0, -1]])), r"indices\[0, 1\] = -1 is out of range for a table with 9 rows"),
        (dict(indices=torch.rand(2, 2)), "indices must be int32 or int64, got torch.float32"),
        (dict(indices=torch.tensor([1, 2])), r"indices must be \[B, L\], or \[N\] beside offsets"),
        (dict(indices=torch.tensor([[1, 2]]), mode="median"), "unknown mode 'median', expected one of"),
        (dict(indices=torch.tensor([[1, 2]]), per_sample_weights=torch.rand(2, 2)), "per_sample_weights of indices"),
        (dict(indices=torch.tensor([[1, 2]]), mode="max", per_sample_weights=torch.rand(1, 2)), "mode sum or mean"),
        (dict(indices=torch.tensor([[1, 2]]), weight=torch.rand(9)), r"weights\[0\] must be \[R, D\]"),
        (
            dict(indices=torch.tensor([[1, 2]]), weight=torch.ones(9, 2).long()),
            "must be float32, float64, float16 or bfloat16",
        ),
    ],
)
def test_embedding_bag_bad_input(arguments, message):
    with pytest.raises((RuntimeError, ValueError, IndexError), match=f"^embedding_bag: .*{message}"):
        embedding_bag(**{"weight": torch.rand(9, 2), **arguments})


def test_it_takes_and_refuses_what_the_kernels_do():
    """The same texts and values, where the reference is all there is."""
    bad, odd = (Path(__file__).parent / file for file in ("test_bad_ops.py", "test_odd_ops.py"))
    run_pytest(bad, "-m", "pytest", odd, RANKKERNELS_REFERENCE="1")


@pytest.mark.parametrize(
    "kind, make",
    [
        ("sgd", lambda p: torch.optim.SGD([p], lr=0.3, weight_decay=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad([p], lr=0.3, weight_decay=0.1, eps=1e-3)),
        ("adam", lambda p: torch.optim.SparseAdam([p], lr=0.3, betas=(0.7, 0.8), eps=1e-3)),
        ("adamw", lambda p: torch.optim.AdamW([p], lr=0.3, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.1)),
    ],
)
def test_optimizer_steps_are_those_of_torch(kind, make):
    w = torch.randn(5, 3, dtype=torch.float64)
    p, state = w.clone().requires_grad_(), [torch.zeros_like(w)] * {"sgd": 0, "adagrad": 1}.get(kind, 2)
    theirs = make(p)
    (group,) = theirs.param_groups
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    for step in range(1, 4):
        grad = torch.randn(5, 3, dtype=torch.float64)
        p.grad = grad.to_sparse(1) if kind == "adam" else grad.clone()
        theirs.step()
        w, state = reference.optimizer_step(
            kind, w, 8 * grad, state, lr=0.3, beta1=beta1, beta2=beta2, eps=group.get("eps", 0.0),
            weight_decay=group.get("weight_decay", 0.0), step=step, grad_factor=1 / 8,
        )  # fmt: skip
        torch.testing.assert_close(w, p.detach())


def test_rows_are_clipped_to_their_norm():
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e30, 4e30]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(reference.clip_rows(grad, 1.0), expected)
    assert torch.equal(reference.clip_rows(grad, 0.0), grad)
