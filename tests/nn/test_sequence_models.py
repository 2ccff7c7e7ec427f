"""BST, DIEN and MultiHeadTargetAttention: against torch-rechub's and FuxiCTR's, with hooks on their parts, and jagged
or shared histories against padded ones."""

from __future__ import annotations

import copy

import pytest
import torch
from test_rechub_parity import OURS, THEIRS, compare, pair
from torch import nn

import rankkernels as rk
from rankkernels.nn.recurrent import AUGRU, run_gru

pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
dien = pytest.importorskip("torch_rechub.models.ranking.dien")
B, L, V, D = 9, 7, 12, 4
SEEDS = range(4)


def features(library, padded: bool):
    """The user's, histories, negatives and targets: two of each but the first."""
    padding_idx = 0 if padded else None
    sequence = lambda name, owner: library.SequenceFeature(name, V, D, "concat", owner, padding_idx)  # noqa: E731
    user = [library.SparseFeature("user", V, D), library.DenseFeature("age")]
    targets = [library.SparseFeature(name, V, D, padding_idx=padding_idx) for name in ("item", "shop")]
    histories, negatives = ([sequence(f"{kind}_{t.name}", t.name) for t in targets] for kind in ("past", "other"))
    return user, histories, negatives, targets


def batch(holes: bool = False) -> dict[str, torch.Tensor]:
    """Sample 0 has no history, the others a few positions less than L; with ``holes`` not the first ones."""
    lengths = torch.randint(1, L + 1, (B, 1))
    lengths[0], lengths[1] = 0, L
    valid = torch.arange(L) < lengths
    if holes:
        valid = valid.flip(1) & (torch.rand(B, L) < 0.8)
    x = {name: torch.randint(1, V, (B,)) for name in ("user", "item", "shop")} | {"age": torch.rand(B)}
    for name in ("item", "shop"):
        x |= {f"{kind}_{name}": torch.randint(1, V, (B, L)) * valid for kind in ("past", "other")}
    return x


@pytest.fixture
def both(float64):
    """``both(name, seed, padded, **settings)``: ours and torch-rechub's model of that name, in float64."""
    from torch_rechub.models import ranking

    def build(name, seed, padded=True, **settings):
        def of(library):
            user, histories, negatives, targets = features(library, padded)
            lists = [user, histories, negatives, targets] if name == "DIEN" else [user, histories, targets]
            return getattr(rk if library is OURS else ranking, name)(*lists, {"dims": [6]}, **settings)

        models = pair(of, seed)
        for model in models if name == "BST" else ():
            nn.init.normal_(model.pos_embedding.weight, generator=torch.Generator().manual_seed(seed))  # pair's are 5e3
        return models

    return build


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_bst(seed, training, both):
    settings = {"nhead": (2, 8, 1, 4)[seed], "num_layers": (1, 1, 2, 1)[seed], "dropout": 0.0 if training else 0.2}
    ours, theirs = both("BST", seed, padded=seed != 3, max_seq_len=L + 1 + seed, **settings)
    compare(ours, theirs, batch(holes=seed == 1), training=training, tolerance=1e-10)


def test_bst_in_training_drops_at_one_position(both):
    """The same expectation from fewer random numbers."""
    ours, theirs = both("BST", 0, nhead=2, dropout=0.4)
    x, logits = batch(), []
    for model in (ours, theirs):
        model.train().mlp.eval()
        logits.append(torch.stack([model(x).logit() for _ in range(100)]).mean(0))
    spread = torch.stack([ours(x).logit() for _ in range(100)]).std(0) / 10
    assert ((logits[0] - logits[1]).abs() < 6 * spread).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_dien(seed, training, both):
    ours, theirs = both("DIEN", seed, padded=seed != 3, alpha=0.5)
    x = batch(holes=seed == 1)

    class Loss(nn.Module):
        """Both of what DIEN returns."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            y, loss = self.model(x)
            return torch.cat([y, loss.view(1)])

    compare(Loss(ours), Loss(theirs), x, training=training, tolerance=1e-9)


def test_dien_without_any_history(both):
    ours, theirs = both("DIEN", 0)
    x = {name: ids * 0 if ids.dim() == 2 else ids for name, ids in batch().items()}
    for a, b in zip(ours.eval()(x), theirs.eval()(x)):
        torch.testing.assert_close(a, b, check_dtype=False)
    ours(x)[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_augru_is_torch_rechubs(float64):
    torch.manual_seed(0)
    ours = AUGRU(D)
    torch.manual_seed(0)
    theirs = dien.AUGRU(D)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, item, mask = torch.randn(B, L, D), torch.randn(B, D), torch.rand(B, L) < 0.6
    mask[0] = False
    for m in (None, mask):
        torch.testing.assert_close(ours(x, item, m), theirs(x, item, m))


def test_gru_over_lengths_is_torchs(float64):
    gru, x, lengths = nn.GRU(D, D, batch_first=True), torch.randn(B, L, D), torch.arange(B) % (L + 1)
    out = run_gru(gru, x, lengths)
    whole, _ = gru(x)
    torch.testing.assert_close(out, whole * (torch.arange(L) < lengths[:, None])[..., None])
    for other in (nn.GRU(D, D, bias=False, batch_first=True), copy.deepcopy(gru)):
        calls = []
        other.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        expected, _ = other(x)
        calls.clear()
        out = run_gru(other, x, lengths)
        torch.testing.assert_close(out, expected * (torch.arange(L) < lengths[:, None])[..., None])
        assert calls, "the module was not called"


PARTS = {
    "BST": ["transformer_layers", "transformer_layers.layers.0", "transformer_layers.layers.0.self_attn",
            "transformer_layers.layers.0.linear1", "transformer_layers.layers.0.activation", "pos_embedding"],
    "DIEN": ["interest_extractor_layers.0", "interest_evolving_layers.1", "interest_evolving_layers.0.augru_cell",
             "BCELoss", "embedding", "embedding.input_mask"],
}  # fmt: skip


@pytest.mark.parametrize("name, part", [(name, part) for name, parts in PARTS.items() for part in parts])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_whoever_may_see_a_call_sees_it(name, part, both):
    """A hook is called as often as in torch-rechub's model, accelerated, and with the same tensors."""
    _, theirs = both(name, 0, **({"nhead": 2} if name == "BST" else {}))
    ours, seen = rk.accelerate(copy.deepcopy(theirs)), []
    x = batch()
    for model in (theirs.eval(), ours.eval()):
        log = []

        def note(module, inputs, output, log=log):
            outputs = output if isinstance(output, tuple) else (output,)
            log.append([t.detach() for t in outputs if isinstance(t, torch.Tensor)])

        model.get_submodule(part).register_forward_hook(note)
        y = model(x)
        seen.append([y, log])
    assert seen[0][1]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("use_qkvo", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_target_attention_is_fuxictrs(use_qkvo, dropout, masked, float64):
    layers = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed")
    arguments = (6, 8, 2, dropout, True, use_qkvo)
    torch.manual_seed(1)
    ours = rk.MultiHeadTargetAttention(*arguments)
    torch.manual_seed(1)
    theirs = layers.MultiHeadTargetAttention(*arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    target, history = torch.randn(B, 6, requires_grad=True), torch.randn(B, L, 6, requires_grad=True)
    mask = (torch.rand(B, L) < 0.5).double() if masked else None
    if masked:
        mask[0] = 0
    for training in (True, False):
        found = []
        for model in (theirs, ours, rk.accelerate(copy.deepcopy(theirs))):
            model.train(training)
            torch.manual_seed(2)
            y = model(target, history, mask)
            wanted = [target, history, *model.parameters()]
            found.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(0))])
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(found[2], found[0])


def test_target_attention_of_jagged_and_shared_histories(float64):
    layer, target = rk.MultiHeadTargetAttention(6, 8, 2), torch.randn(B, 6)
    history, lengths, user = torch.randn(4, L, 6), torch.tensor([3, 0, L, 1]), torch.arange(B) % 4
    expected = torch.zeros(B, 6)
    for b in range(B):
        rows = history[user[b], : lengths[user[b]]]
        if len(rows):
            expected[b] = layer(target[b : b + 1], rows[None])
    torch.testing.assert_close(layer(target, history, lengths=lengths, history_index=user), expected)
    rows = torch.cat([h[:n] for h, n in zip(history, lengths)])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    torch.testing.assert_close(layer(target, rows, offsets=offsets, history_index=user), expected)
    of_samples = history[user], lengths[user]
    torch.testing.assert_close(layer(target, of_samples[0], lengths=of_samples[1]), expected)


@pytest.mark.parametrize("dropout, residual, training", [(0.0, True, True), (0.3, True, False), (0.3, False, True)])
def test_interacting_layer_is_torch_rechubs(dropout, residual, training, float64):
    basic = pytest.importorskip("torch_rechub.basic.layers")
    found, x = [], torch.randn(B, L, 6, requires_grad=True)
    for build in (basic.InteractingLayer, rk.InteractingLayer):
        torch.manual_seed(1)
        layer = build(6, 2, dropout, residual).train(training)
        torch.manual_seed(2)
        y = layer(x)
        wanted = [x, *layer.parameters()]
        found.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(1)), *layer.state_dict().values()])
    torch.testing.assert_close(found[1], found[0])
    calls = []
    layer.W_K.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(2)
    torch.testing.assert_close(layer(x), y)
    assert calls


@pytest.mark.parametrize("name", ["BST", "DIEN", "AutoInt"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_under_autocast(name):
    """bfloat16 where torch-rechub's has it, but for rounding."""
    rechub = pytest.importorskip("bench.harness.rechub_models")
    sizes = rechub.Sizes(B=B, L=L, V=V, D=8, dims=(6,), attention=(4,))
    torch.manual_seed(0)
    theirs = rechub.build(name, sizes).eval()
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    ours, x = rk.accelerate(copy.deepcopy(theirs)), rechub.batch(sizes)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = rechub.output(ours(x)), rechub.output(theirs(x))
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.02)


def test_target_attention_refuses_what_it_would_have_to_pad():
    layer = rk.MultiHeadTargetAttention(6, 6, 2, 0.1)
    target, history, lengths = torch.randn(2, 6), torch.randn(2, 3, 6), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="MultiHeadTargetAttention: lengths need all of its modules"):
        layer(target, history, lengths=lengths)
    assert layer.eval()(target, history, lengths=lengths).shape == (2, 6)
    layer.W_k.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lengths need all of its modules"):
        layer(target, history, lengths=lengths)


SPARSE, HISTORY = rk.SparseFeature("item", V, D), rk.SequenceFeature("past", V, D, "concat", "item")
NEGATIVE, WIDE = rk.SequenceFeature("other", V, D, "concat", "item"), rk.SparseFeature("shop", V, D + 1)
MEAN = rk.SequenceFeature("tags", V, D, "mean")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: rk.BST([], [], [SPARSE], {}), "BST: history_features must not be empty"),
        (lambda: rk.BST([HISTORY], [HISTORY], [SPARSE], {}, 2), "BST: feature 'past' has pooling='concat'"),
        (lambda: rk.BST([], [MEAN], [SPARSE], {}, 2), "BST: history feature 'tags' must be a sequence feature with"),
        (lambda: rk.BST([], [HISTORY], [WIDE], {}, 2), "BST: the widths of history_features and of target_features"),
        (lambda: rk.BST([], [HISTORY], [SPARSE], {}), "BST: the histories' width 4 must be a multiple of nhead = 8"),
        (lambda: rk.DIEN([], [HISTORY], [], [SPARSE], {}), "DIEN: neg_history_features must not be empty"),
        (
            lambda: rk.DIEN([], [HISTORY], [NEGATIVE, NEGATIVE], [SPARSE], {}),
            "DIEN: each history feature needs its negative and its target",
        ),
        (lambda: rk.DIEN([], [HISTORY], [NEGATIVE], [WIDE], {}), "DIEN: history feature 'past', its negative and its"),
        (lambda: rk.DIEN([], [HISTORY], [NEGATIVE], [HISTORY], {}), "DIEN: target feature 'past' must be a sparse"),
        (
            lambda: rk.MultiHeadTargetAttention(6, 7, 2),
            "MultiHeadTargetAttention: the width 7 must be a multiple of num_heads = 2",
        ),
        (lambda: rk.InteractingLayer(7, 2), "InteractingLayer: embed_dim = 7 must be a multiple of num_heads = 2"),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(message)


def test_more_positions_than_bst_has():
    model = rk.BST([], [HISTORY], [SPARSE], {}, 2, max_seq_len=4)
    x = {"item": torch.randint(V, (2,)), "past": torch.randint(V, (2, 4))}
    with pytest.raises(ValueError, match="BST: the positions, with the target's, must be 4 at most, got 5"):
        model(x)


def test_their_library_is_the_one_compared_with():
    assert THEIRS.DeepFM.__module__.startswith("torch_rechub.")
