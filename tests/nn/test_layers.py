"""Layers and models beyond parity: padding, odd modules, odd batches, bad input, compile and export."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
B, L, D = 6, 8, 4


def din(mask_padding=False, features=True, **attention):
    torch.manual_seed(0)
    user = [rk.SparseFeature("user", 11, D), rk.DenseFeature("age")] if features else []
    target = [rk.SparseFeature("item", 20, D, padding_idx=0), rk.SparseFeature("shop", 7, D, padding_idx=0)]
    history = [
        rk.SequenceFeature("items", 20, D, pooling="concat", shared_with="item", padding_idx=0),
        rk.SequenceFeature("shops", 7, D, pooling="concat", shared_with="shop", padding_idx=0),
    ]
    return rk.DIN(user, history, target, {"dims": [8]}, {"dims": [5], **attention}, mask_padding)


def deepfm():
    torch.manual_seed(0)
    sparse = [rk.SparseFeature(f"c{i}", 9 + i, D) for i in range(3)]
    pooled = rk.SequenceFeature("tags", 5, D, padding_idx=0)
    wide = rk.SparseFeature("wide", 9, 10)
    return rk.DeepFM([*sparse, pooled, wide, rk.DenseFeature("price")], [*sparse, pooled], {"dims": [8]})


def deepfm_of_one_width():
    torch.manual_seed(0)
    sparse = [rk.SparseFeature(f"c{i}", 9 + i, D) for i in range(3)]
    return rk.DeepFM([*sparse, rk.DenseFeature("price"), rk.DenseFeature("age")], sparse, {"dims": [8]})


def batch(n=B):
    return {
        "user": torch.randint(0, 11, (n,)),
        "age": torch.randn(n),
        "item": torch.randint(1, 20, (n,)),
        "shop": torch.randint(1, 7, (n,)),
        "items": torch.randint(1, 20, (n, L)),
        "shops": torch.randint(1, 7, (n, L)),
        **{f"c{i}": torch.randint(0, 9 + i, (n,)) for i in range(3)},
        "tags": torch.randint(0, 5, (n, 3)),
        "wide": torch.randint(0, 9, (n,)),
        "price": torch.randn(n),
    }


MODELS = pytest.mark.parametrize("build", [din, deepfm])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ["dice", nn.Tanh], ids=["fused", "composed"])
def test_forms_of_a_history_agree(activation, use_softmax, training):
    unit = rk.ActivationUnit(D, [5], activation, use_softmax).double()
    lengths = torch.tensor([3, 0, L, 1, 5, 0])
    mask = torch.arange(L) < lengths[:, None]
    history, target = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    nested = torch.nested.nested_tensor_from_jagged(history[mask], offsets)
    results = []
    for arguments in (
        dict(history=history, lengths=lengths),
        dict(history=history, lengths=lengths.int()),
        dict(history=history, mask=mask),
        dict(history=history[mask], offsets=offsets),
        dict(history=nested),
    ):
        layer = copy.deepcopy(unit).train(training)
        out = layer(target=target, **arguments)
        out.square().sum().backward()
        results.append((out, *(p.grad for p in layer.parameters()), *layer.buffers()))
    assert (results[0][0][[1, 5]] == 0).all()
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_mask_padding_is_the_model_on_the_histories_cut_short():
    """Padded or not, each sample on its own and cut to its valid items gives the same probability."""
    model = din(mask_padding=True, use_softmax=True).eval()
    x = batch()
    counts = [8, 3, 1, 5, 2, 7]
    for i, n in enumerate(counts):
        x["items"][i, n:] = x["shops"][i, n:] = 0
    together = model(x)
    for i, n in enumerate(counts):
        alone = {k: v[i : i + 1, :n] if k in ("items", "shops") else v[i : i + 1] for k, v in x.items()}
        torch.testing.assert_close(model(alone), together[i : i + 1])
    assert not torch.allclose(din(mask_padding=False, use_softmax=True).eval()(x), together, rtol=0, atol=1e-9)


def test_a_user_without_history():
    model = din(mask_padding=True)
    x = batch()
    x["items"][2] = x["shops"][2] = 0
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x).isfinite().all()


@MODELS
def test_empty_and_single_batches(build):
    model = build().eval()
    for n in (0, 1):
        assert model(batch(n)).shape == (n,)
    with pytest.raises((ValueError, RuntimeError), match="more than"):
        build().train()(batch(1))


def test_dense_features_of_din_reach_the_mlp():
    model, x = din().eval(), batch()
    assert model.mlp.mlp[0].in_features == 2 * D + 2 * D + D + 1
    y = model(x)
    assert not torch.equal(y, model({**x, "age": x["age"] + 100}))
    assert din(features=False).eval()(x).shape == (B,)


def test_activation_of_din_can_be_chosen():
    target = [rk.SparseFeature("item", 20, D)]
    history = [rk.SequenceFeature("clicks", 20, D, pooling="concat")]
    model = rk.DIN([], history, target, {"dims": [8], "activation": "relu"}, {})
    assert isinstance(model.mlp.mlp[2], nn.ReLU)


def test_features_in_both_parts_are_looked_up_once(monkeypatch):
    calls = []
    real = rk.nn.embedding.run_op
    monkeypatch.setattr(rk.nn.embedding, "run_op", lambda *a, **k: calls.append(a[-1]) or real(*a, **k))
    deepfm()(batch())
    assert calls == ["c0\nc1\nc2\ntags\nwide"]


def replace_norm(unit):
    unit.attention.mlp[1] = nn.Identity()


def freeze_norm(unit):
    unit.attention.mlp[5].eval()


def wrap_linear(unit):
    nn.utils.parametrizations.weight_norm(unit.attention.mlp[0])


def slope(unit):
    unit.attention.mlp[2] = nn.LeakyReLU(0.3)


def drop(unit):
    unit.attention.mlp[3].p = 0.5


@pytest.mark.parametrize("change", [replace_norm, freeze_norm, wrap_linear, slope, drop])
def test_a_changed_attention_mlp_is_still_what_runs(change):
    """Whatever was done to its modules, the unit computes what they say."""
    unit = rk.ActivationUnit(D, [5, 4], "dice")
    change(unit)
    history, target = torch.randn(B, L, D), torch.randn(B, D)
    reference = copy.deepcopy(unit)
    torch.manual_seed(1)
    out = unit(history, target)
    torch.manual_seed(1)
    t = target[:, None].expand(B, L, D)
    score = reference.attention(torch.cat([t, history, t - history, t * history], -1).flatten(0, 1)).view(B, L, 1)
    torch.testing.assert_close(out, (score * history).sum(1))
    for a, b in zip(unit.buffers(), reference.buffers()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("accelerated", [False, True])
def test_dropout_in_the_attention_mlp(accelerated, monkeypatch):
    """The fused op drops: governed by torch.manual_seed, other units each time, none in eval, the mean as without."""
    if accelerated:
        rechub = pytest.importorskip("torch_rechub.models.ranking.din", reason="torch-rechub is not installed")
        unit = rk.accelerate(rechub.ActivationUnit(D, [64], "relu"))
        unit.attention.mlp[3].p = 0.4
    else:
        unit = rk.ActivationUnit(D, [64], "relu", dropout=0.4)
    calls = []
    real = rk.ops.din_attention
    monkeypatch.setattr(rk.ops, "din_attention", lambda *a, **k: calls.append(k["dropout"]) or real(*a, **k))
    plain = copy.deepcopy(unit)
    plain.attention.mlp[3].p = 0.0
    history, target = torch.randn(B, L, D), torch.randn(B, D)

    def step(seed):
        torch.manual_seed(seed)
        unit.zero_grad()
        out = unit(history, target)
        out.sum().backward()
        return out.detach(), unit.attention.mlp[0].weight.grad.clone()

    first, again, other = step(1), step(1), step(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    with torch.no_grad():
        mean = sum(unit(history, target) for _ in range(300)) / 300
        assert relative_error(mean, plain(history, target)) < 0.1
    assert set(calls) == {0.4, 0.0}
    plain.load_state_dict(unit.state_dict())
    assert torch.equal(unit.eval()(history, target), plain.eval()(history, target)) and calls[-2:] == [0.0, 0.0]


def test_dropout_compiles():
    torch._dynamo.reset()
    unit = rk.ActivationUnit(D, [5], "dice", dropout=0.3)
    compiled = torch.compile(unit, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (B, B + 3):
        history, target = torch.randn(n, L, D, requires_grad=True), torch.randn(n, D)
        results = []
        for function in (unit, compiled):
            torch.manual_seed(5)
            out = function(history, target)
            results.append((out, *torch.autograd.grad(out.sum(), [history, *unit.parameters()])))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_cumulative_running_statistics():
    """BatchNorm1d(momentum=None) averages over all batches."""
    unit = rk.ActivationUnit(D, [5], "relu")
    unit.attention.mlp[1].momentum = None
    reference = copy.deepcopy(unit)
    for _ in range(3):
        history, target = torch.randn(B, L, D), torch.randn(B, D)
        unit(history, target)
        t = target[:, None].expand(B, L, D)
        reference.attention(torch.cat([t, history, t - history, t * history], -1).flatten(0, 1))
    for a, b in zip(unit.buffers(), reference.buffers()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("table", ["sparse", "max_norm", "module"])
def test_tables_that_are_no_plain_embedding(table):
    layer = rk.EmbeddingLayer(
        [rk.SparseFeature("a", 9, D), rk.SequenceFeature("b", 9, D, shared_with="a", padding_idx=0, pooling="mean")]
    )
    plain = layer.embed_dict["a"]
    changed = nn.Embedding(9, D, sparse=table == "sparse", max_norm=0.5 if table == "max_norm" else None)
    changed.weight = plain.weight
    layer.embed_dict["a"] = nn.Sequential(changed) if table == "module" else changed
    nn.init.normal_(plain.weight)
    x = {"a": torch.tensor([1, 2]), "b": torch.tensor([[3, 0], [0, 0]])}
    out = layer(x, layer.features)
    assert torch.equal(out[:, 0], plain.weight[x["a"]]) and torch.equal(out[0, 1], plain.weight[3])
    assert (out[1, 1] == 0).all()
    out.sum().backward()
    assert plain.weight.grad.is_sparse == (table == "sparse")


@MODELS
def test_pickle_deepcopy_and_state_dict(build):
    model, x = build().eval(), batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = build().eval()
    other.load_state_dict(model.state_dict())
    for m in (torch.load(buffer, weights_only=False), copy.deepcopy(model), other):
        assert torch.equal(m(x), model(x))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    """Dense features stay float32, as in torch-rechub, so the model without them; everything else is half."""
    model, x = din(features=False).eval(), batch()
    exact = copy.deepcopy(model).to(dtype).double()(x)
    y = model.to(dtype)(x)
    assert y.dtype == dtype and relative_error(y, exact) < tolerance


@MODELS
@pytest.mark.parametrize("training", [True, False])
def test_compile(build, training):
    torch._dynamo.reset()
    model = build().train(training)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (B, B + 3):
        x = batch(n)
        expected, y = model(x), compiled(x)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        expected.backward(grad), y.backward(grad)
    for p, q in zip(compiled_model.parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    for a, b in zip(compiled_model.buffers(), model.buffers()):
        torch.testing.assert_close(a, b)


@MODELS
def test_export(build):
    model, x = build().eval(), batch()
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({k: {0: n} for k in x},))
    for size in (B, 17):
        other = batch(size)
        torch.testing.assert_close(program.module()(other), model(other))


def error(build, *arguments, **keywords):
    with pytest.raises((ValueError, KeyError, IndexError, RuntimeError)) as info:
        build(*arguments, **keywords)
    return str(info.value)


def test_bad_batches_name_the_feature():
    model, x = deepfm(), batch()
    missing = {k: v for k, v in x.items() if k != "c1"}
    assert "feature 'c1' is missing from the batch" in error(model, missing)
    assert "c2[4] = 11 is out of range for a table with 11 rows" in error(
        model, {**x, "c2": torch.tensor([0, 1, 2, 3, 11, 99])}
    )
    assert "c0[0] = -1 is out of range" in error(model, {**x, "c0": -torch.ones(B, dtype=torch.int64)})
    assert "tags[5, 2] = 5 is out of range" in error(model, {**x, "tags": torch.tensor([[0, 1, 2]] * 5 + [[0, 1, 5]])})
    assert "sequence feature 'tags' must be [B, L] ids, got shape [6]" in error(model, {**x, "tags": x["c0"]})


@pytest.mark.parametrize(
    "build, sparse, sequence, dense", [(deepfm, "c1", "tags", "price"), (din, "item", "items", "age")]
)
def test_odd_columns_name_the_feature(build, sparse, sequence, dense):
    model, x = build(), batch()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for names in ([sparse], [n for n in x if x[n].dim() == 1 and n != dense]):
                message = error(model, {**x, **{n: x[n][:, None] for n in names}})
                assert "must be [B] ids, got shape [6, 1]" in message and any(
                    f"feature {n!r}" in message for n in names
                )
            for name in (sparse, sequence, dense):
                for odd, kind in (
                    (x[name].tolist(), "list"),
                    (x[name].numpy(), "ndarray"),
                    (x[name] * 1j, "complex64"),
                ):
                    with pytest.raises(
                        TypeError, match=f"feature '{name}' must be a tensor of real numbers, got .*{kind}"
                    ):
                        model({**x, name: odd})
                message = error(model, {**x, name: x[name][:4]})
                assert f"'{name}'" in message and "one batch size B" in message and "[4" in message
                assert f"feature '{name}' is missing" in error(model, {k: v for k, v in x.items() if k != name})
            assert f"dense feature '{dense}' must be [B] or [B, n]" in error(model, {**x, dense: torch.rand(())})
            torch.manual_seed(0)
            assert torch.equal(model.eval()({**x, sparse: x[sparse].float()}), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [deepfm, din, lambda: deepfm_of_one_width()], ids=["deepfm", "din", "one width"])
def test_dense_features_beside_tables_of_any_dtype(build, dtype):
    model, x = build(), batch()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    expected = model.eval()(x)
    model.to(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x)
            assert y.dtype == dtype and relative_error(y, expected) < {torch.float64: 1e-5}.get(dtype, 0.03)
    model.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    dense = [f for f in model.embedding.features if isinstance(f, rk.DenseFeature)]
    assert model.embedding(x, dense, squeeze_dim=True).dtype == dtype


def test_mask_padding_needs_a_padding_idx():
    history = rk.SequenceFeature("hist", 9, D, pooling="concat", shared_with="item")
    message = error(rk.DIN, [], [history], [rk.SparseFeature("item", 9, D)], {"dims": [3]}, {}, mask_padding=True)
    assert "mask_padding needs the padding_idx of history feature 'hist'" in message


def test_a_fused_table_that_gets_a_hook_is_refused():
    """It would be looked up with a gradient that no optimizer takes."""
    model, x = deepfm(), batch()
    rk.optim.fuse(model, rk.optim.SGD(model.embedding.parameters(), lr=0.1))
    model.embedding.embed_dict["c1"].register_forward_hook(lambda *_: None)
    assert "the table of feature 'c1' is trained by a fused optimizer" in error(model, x)
    with torch.no_grad():
        assert model.eval()(x).shape == (B,)


def test_bad_models_name_the_feature():
    a, b = rk.SparseFeature("a", 9, 4), rk.SparseFeature("b", 9, 8)
    dense, sequence = rk.DenseFeature("d"), rk.SequenceFeature("s", 9, 4, pooling="concat")
    mlp = {"dims": [8]}
    assert "deep_features must not be empty" in error(rk.DeepFM, [], [a], mlp)
    assert "fm_features must not be empty" in error(rk.DeepFM, [a], [], mlp)
    assert "'d' is a dense feature" in error(rk.DeepFM, [a], [a, dense], mlp)
    assert "'a' has 4 and 'b' has 8" in error(rk.DeepFM, [a], [a, b], mlp)
    assert "feature 's' has pooling='concat'" in error(rk.DeepFM, [a, sequence], [a], mlp)
    assert "history_features must not be empty" in error(rk.DIN, [a], [], [a], mlp, {})
    assert "1 history_features, 0" not in error(rk.DIN, [a], [sequence], [], mlp, {})
    assert "each history feature needs its target" in error(rk.DIN, [], [sequence, sequence], [a], mlp, {})
    assert "history feature 's' and its target 'b'" in error(rk.DIN, [], [sequence], [b], mlp, {})
    assert "history feature 'a' must be a sequence" in error(rk.DIN, [], [a], [a], mlp, {})
    assert "target feature 'd' must be a sparse" in error(rk.DIN, [], [sequence], [dense], mlp, {})
    assert "unknown activation 'swish', expected one of sigmoid, relu" in error(
        rk.DIN, [], [sequence], [a], mlp, {"activation": "swish"}
    )
    assert "unknown activation 3" in error(rk.MLP, 3, dims=[2], activation=3)
    assert "feature 's' has pooling 'max'" in error(rk.EmbeddingLayer, [rk.SequenceFeature("s", 9, 4, pooling="max")])
    assert "feature 'x' shares the table of 'y'" in error(
        rk.EmbeddingLayer, [a, rk.SparseFeature("x", 9, 4, shared_with="y")]
    )
    assert "feature 'a': padding_idx 9 is no row" in error(
        rk.EmbeddingLayer, [rk.SparseFeature("a", 9, 4, padding_idx=9)]
    )
    assert "feature 'items' cannot own a table" in error(rk.EmbeddingLayer, [rk.SparseFeature("items", 9, 4)])
    assert "must be [vocab_size, embed_dim] = [3, 2], got [2, 3]" in error(rk.Pretrained(torch.ones(2, 3)), 3, 2)


@pytest.mark.parametrize("odd", [None, 3, "a"])
def test_what_is_no_feature_is_refused(odd):
    a, sequence = rk.SparseFeature("a", 9, 4), rk.SequenceFeature("s", 9, 4, pooling="concat")
    layer, message = rk.EmbeddingLayer([a]), f"SequenceFeature or DenseFeature objects, got {odd!r}"
    for call in (
        lambda: rk.EmbeddingLayer([a, odd]),
        lambda: layer({"a": torch.tensor([1])}, [a, odd]),
        lambda: rk.DeepFM([a], [a, odd], {}),
        lambda: rk.DeepFM([odd], [a], {}),
        lambda: rk.DIN([odd], [sequence], [a], {}, {}),
        lambda: rk.DIN([], [sequence, odd], [a, a], {}, {}),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_name_that_is_no_key_is_refused():
    with pytest.raises(TypeError, match="a feature's name is a key of the batch, got .'c'."):
        rk.EmbeddingLayer([rk.SparseFeature("a", 9, 4), rk.DenseFeature(["c"])])


@pytest.mark.parametrize("activation", ["relu", "softmax"], ids=["fused", "module_by_module"])
def test_an_activation_unit_refuses_what_does_not_fit_on_either_path(activation):
    unit, history, target = rk.ActivationUnit(3, [4], activation).eval(), torch.randn(4, 5, 3), torch.randn(4, 3)
    rows = history.flatten(0, 1)
    for call, message in (
        (lambda: unit(history, torch.randn(5, 3)), "history and target must have one batch size B, got 4 and 5"),
        (lambda: unit(history[:0], target), "one batch size B, got 0 and 4"),
        (lambda: unit(history, torch.randn(4, 1, 3)), r"target must be \[B, D\], got shape \[4, 1, 3\]"),
        (lambda: unit(history[0], target), r"history must be \[B, L, D\], got shape \[5, 3\]"),
        (lambda: unit(history, target, lengths=torch.tensor([5, 5, 6, 5])), "lengths.2. = 6 is outside 0 .. 5"),
        (lambda: unit(history, target, lengths=torch.tensor([5, 5, 5])), r"lengths must be \[B\] = \[4\]"),
        (lambda: unit(history, target, mask=torch.ones(4, 4, dtype=torch.bool)), r"mask must be \[B, L\] = \[4, 5\]"),
        (lambda: unit(history, target, mask=torch.ones(4, 5)), "mask must be bool"),
        (lambda: unit(rows, target, offsets=torch.tensor([0, 5, 9, 7, 20])), "offsets decrease from 9 to 7 at 3"),
        (lambda: unit(rows, target, offsets=torch.tensor([0, 5, 9, 9, 21])), "offsets must run from 0 to N = 20"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


@pytest.mark.parametrize("layer", [rk.MLP, rk.ActivationUnit])
def test_dims_must_be_a_list(layer):
    with pytest.raises(TypeError):
        layer(4, dims=0)


def test_bad_lookups_name_the_features():
    a, b = rk.SparseFeature("a", 9, 4), rk.SparseFeature("b", 9, 8)
    layer, x = (
        rk.EmbeddingLayer([a, b, rk.DenseFeature("d")]),
        {"a": torch.ones(2).long(), "b": torch.ones(2).long(), "d": torch.ones(2)},
    )
    assert layer(x, [a, b], squeeze_dim=True).shape == (2, 12)
    assert "features 'a' and 'b' have embeddings of shape [4] and [8]" in error(layer, x, [a, b])
    assert "features must not be empty" in error(layer, x, [], True)
    assert "must have a sparse or a sequence feature" in error(layer, x, [layer.features[2]])


def test_activation_unit_bad_input():
    unit = rk.ActivationUnit(D)
    assert "target must be [B, 4], got [6, 5]" in error(unit, torch.randn(B, L, 5), torch.randn(B, 5))
    assert "one batch size" in error(unit, torch.randn(B, L, D), torch.randn(B + 1, D))


def test_training_in_float16_storage_keeps_float32_sums():
    """A float16 accumulator would stop counting quarters at 512."""
    for n, dtype in ((4096, torch.bfloat16), (512, torch.float16)):
        x = torch.full((1, n, 1), 0.25, dtype=dtype)
        assert relative_error(rk.fm_interaction(x), torch.tensor(n * (n - 1) / 32)) < 1e-2


@pytest.mark.parametrize("activation", ["dice", "relu"])
@pytest.mark.parametrize(
    "history, samples, rows",
    [
        ((0, 5, 4), 0, {}),
        ((3, 0, 4), 3, {}),
        ((3, 5, 4), 3, {"lengths": torch.zeros(3, dtype=torch.long)}),
        ((3, 5, 4), 3, {"mask": torch.zeros(3, 5, dtype=torch.bool)}),
        ((0, 4), 3, {"offsets": torch.zeros(4, dtype=torch.long)}),
    ],
    ids=["no samples", "no positions", "lengths", "mask", "offsets"],
)
def test_activation_unit_without_rows_keeps_its_statistics(history, samples, rows, activation):
    unit = rk.ActivationUnit(4, [6], activation)
    norm = unit.attention.mlp[1]
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    before = norm.running_mean.clone(), norm.running_var.clone()
    out = unit(torch.randn(history), torch.randn(samples, 4), **rows)
    out.sum().backward()
    assert out.shape == (samples, 4) and not out.any()
    assert all(map(torch.equal, (norm.running_mean, norm.running_var), before)) and norm.num_batches_tracked == 1
    assert not any(p.grad.any() for p in unit.parameters())
