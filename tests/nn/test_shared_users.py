"""Models on samples that share users, against the same models on a batch in which each sample has its own."""

import copy

import pytest
import torch
from torch import nn

from rankkernels import DIN, ActivationUnit, DeepFM
from rankkernels.nn.features import DenseFeature, SequenceFeature, SparseFeature

D = 6


def user_features():
    return [
        SparseFeature("user", 30, D),
        SequenceFeature("tags", 20, D, pooling="mean", padding_idx=0),
        DenseFeature("age"),
    ]


def sample_features():
    return [DenseFeature("position"), SparseFeature("item", 40, D), SparseFeature("shop", 9, D)]


def din(**options):
    history = [
        SequenceFeature("items", 40, D, pooling="concat", shared_with="item", padding_idx=0),
        SequenceFeature("shops", 9, D, pooling="concat", shared_with="shop", padding_idx=0),
    ]
    position, *targets = sample_features()
    features = [user_features()[0], position, *user_features()[1:]]
    attention = {"dims": [9, 5], "use_softmax": options.pop("use_softmax", False)}
    return DIN(features, history, targets, {"dims": [12]}, attention, user_features=["user", "tags", "age"], **options)


def deepfm(fm="both", deep="both", **mlp):
    user, tags, age = user_features()
    position, item, shop = sample_features()
    lists = {"both": [item, user, tags, shop], "user": [user, tags], "sample": [item, shop]}
    features = lists[deep] if deep != "both" else [item, user, position, age, tags, shop]
    users = [f for f in (user, tags, age) if f in features or f in lists[fm]]
    return DeepFM(features, lists[fm], {"dims": [12, 7], **mlp}, user_features=users)


def batch(U, B, dtype=torch.float64, L=8):
    index = torch.randint(U, (B,))
    of_users = {
        "user": torch.randint(30, (U,)), "tags": torch.randint(20, (U, 5)), "age": torch.rand(U, dtype=dtype),
        "items": torch.randint(40, (U, L)), "shops": torch.randint(9, (U, L)),
    }  # fmt: skip
    of_samples = {
        "item": torch.randint(40, (B,)), "shop": torch.randint(9, (B,)), "position": torch.rand(B, dtype=dtype)
    }  # fmt: skip
    return of_users | of_samples, {k: v[index] for k, v in of_users.items()} | of_samples, index


def outputs_and_gradients(model, x, **options):
    torch.manual_seed(3)
    out = model(x, **options)
    model.zero_grad()
    out.mul(torch.arange(1.0, len(out) + 1)).sum().backward()
    return [out.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def check_equal(model, U=5, B=40):
    """Outputs, gradients and running statistics, to a float64's rounding."""
    model = model.double()
    other = copy.deepcopy(model)
    x, expanded, index = batch(U, B)
    for training in (True, False):
        model.train(training)
        other.train(training)
        found = outputs_and_gradients(model, x, user_index=index.int() if training else index)
        expected = outputs_and_gradients(other, expanded)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(list(model.buffers()), list(other.buffers()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("U, B", [(5, 40), (30, 30), (1, 12)])
@pytest.mark.parametrize("options", [{}, {"mask_padding": True}, {"use_softmax": True}], ids=str)
def test_din(options, U, B):
    torch.manual_seed(1)
    check_equal(din(**options), U, B)


@pytest.mark.parametrize("fm, deep", [("both", "both"), ("user", "both"), ("both", "user"), ("sample", "both")])
@pytest.mark.parametrize("U, B", [(5, 40), (30, 30)])
def test_deepfm(fm, deep, U, B):
    torch.manual_seed(2)
    check_equal(deepfm(fm, deep), U, B)


@pytest.mark.parametrize("make", [din, deepfm])
@pytest.mark.parametrize("part", ["embedding", "mlp", "attention", "table", "linear"])
def test_where_a_module_is_called(make, part):
    """A hook, another module: each is still called, once."""
    torch.manual_seed(4)
    model, calls = make(), []
    if part == "attention":
        if make is deepfm:
            pytest.skip("has none")
        hooked = model.attention_layers[0].attention.mlp[0]
    else:
        hooked = {
            "embedding": model.embedding, "mlp": model.mlp.mlp[0], "table": model.embedding.embed_dict["item"],
            "linear": model.linear if make is deepfm else model.mlp,
        }[part]  # fmt: skip
    hooked.register_forward_hook(lambda *_: calls.append(1))
    check_equal(model)
    assert calls


def test_the_histories_are_looked_up_once_a_user(monkeypatch):
    from rankkernels import ops

    seen = []
    real = ops.din_attention
    monkeypatch.setattr(ops, "din_attention", lambda h, *a, **k: seen.append(h.shape) or real(h, *a, **k))
    x, _, index = batch(3, 50, torch.float32)
    din()(x, user_index=index)
    assert seen == [(3, 8, D)] * 2


@pytest.mark.parametrize("make", [din, pytest.param(deepfm, marks=pytest.mark.slow)])
def test_compiled(make):
    torch.manual_seed(5)
    model = make().double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for U, B in ((4, 20), (7, 9)):
        x, _, index = batch(U, B)
        expected = outputs_and_gradients(copy.deepcopy(model), x, user_index=index)
        torch.testing.assert_close(outputs_and_gradients(copy.deepcopy(model), x, user_index=index), expected)
        torch.testing.assert_close(compiled(x, user_index=index), expected[0])


def test_no_samples():
    x, _, index = batch(4, 0, torch.float32)
    for model in (din().eval(), deepfm().eval()):
        assert model(x, user_index=index).shape == (0,)


@pytest.mark.parametrize("make", [din, deepfm])
def test_what_does_not_fit(make):
    model, name = make(), make().__class__.__name__
    x, _, index = batch(4, 20, torch.float32)
    for change, key, message in (
        (x["user"][:3], "user", None),
        (x["item"][:3], "item", "feature 'item' must have a row for each sample, 20 as 'user_index' has"),
    ):
        message = message or "must have a row for each user, "
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            model(x | {key: change}, user_index=index)
    for bad in (index[None], index.float()):
        with pytest.raises(ValueError, match=rf"^{name}: user_index must be \[B\] of int32 or int64, got "):
            model(x, user_index=bad)
    with pytest.raises(IndexError, match="user_index.* is out of range"):
        model(x, user_index=torch.full((20,), 4))
    with pytest.raises(KeyError, match="'item' is missing"):
        model({k: v for k, v in x.items() if k != "item"}, user_index=index)


def test_bad_user_features():
    with pytest.raises(ValueError, match="^DeepFM: user feature 'no' is not among item, user"):
        DeepFM(user_features()[:1] + sample_features()[1:2], user_features()[:1], {"dims": [3]}, user_features=["no"])
    item = sample_features()[1]
    with pytest.raises(ValueError, match="^DIN: user feature 'item' is not among no features"):
        history = SequenceFeature("items", 40, D, pooling="concat", shared_with="item")
        DIN([], [history], [item], {}, {}, user_features=["item"])
    model = DeepFM([item], [item], {"dims": [3]})
    with pytest.raises(ValueError, match="^DeepFM: user_index needs user_features"):
        model({"item": torch.zeros(3).long()}, user_index=torch.zeros(3).long())


@pytest.mark.parametrize("activation", ["dice", nn.Tanh])
@pytest.mark.parametrize("form", ["lengths", "mask", "offsets"])
def test_activation_unit(activation, form):
    """Also where its modules are called: the op lacks tanh."""
    torch.manual_seed(6)
    unit = ActivationUnit(D, [7], activation=activation).double()
    counts, index = torch.tensor([3, 0, 5, 2]), torch.tensor([2, 0, 2, 3, 1, 2])
    history, target = torch.randn(4, 5, D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    valid = torch.arange(5) < counts[:, None]
    if form == "offsets":
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        found = unit(history[valid], target, offsets=offsets, history_index=index)
    else:
        found = unit(history, target, **{form: counts if form == "lengths" else valid}, history_index=index)
    expected = unit(history[index], target, lengths=counts[index])
    torch.testing.assert_close(found, expected)
