"""Our layers and models against the installed torch-rechub: state_dict, initial weights, outputs, gradients, buffers,
training curves; over random configurations."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import rankkernels as rk

basic = pytest.importorskip("torch_rechub.basic.layers", reason="torch-rechub is not installed")
features_ = pytest.importorskip("torch_rechub.basic.features")
initializers = pytest.importorskip("torch_rechub.basic.initializers")
ranking = pytest.importorskip("torch_rechub.models.ranking")
rechub_din = pytest.importorskip("torch_rechub.models.ranking.din")


class Library:
    """The classes of one of the two libraries under the same names."""

    def __init__(self, feature_module, layer_module, model_module, unit, initializer_module):
        self.SparseFeature = feature_module.SparseFeature
        self.SequenceFeature = feature_module.SequenceFeature
        self.DenseFeature = feature_module.DenseFeature
        self.EmbeddingLayer, self.MLP = layer_module.EmbeddingLayer, layer_module.MLP
        self.FM, self.LR = layer_module.FM, layer_module.LR
        self.DeepFM, self.DIN, self.WideDeep = model_module.DeepFM, model_module.DIN, model_module.WideDeep
        self.ActivationUnit = unit
        self.RandomNormal = initializer_module.RandomNormal


OURS = Library(rk, rk, rk, rk.ActivationUnit, rk)
THEIRS = Library(features_, basic, ranking, rechub_din.ActivationUnit, initializers)
ACTIVATIONS = ["sigmoid", "relu", "dice", "prelu", "softmax", "leakyrelu", "Dice", "RELU", nn.Tanh]
SEEDS = range(24)
B, L = 11, 6


def assert_same_weights(ours: nn.Module, theirs: nn.Module):
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(a, b, tolerance=2e-5, scale=None):
    """Equal up to ``tolerance`` of the tensors' size: sums in another order, and no more."""
    scale = max(b.abs().max().item() if b.numel() else 0.0, 1e-3) if scale is None else scale
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def compare(ours: nn.Module, theirs: nn.Module, *inputs, training: bool, tolerance=2e-5, vanishing=()):
    """Output, every gradient and every buffer after one pass, forward and backward.

    Gradients are compared on the scale of the model's largest: some are zero in exact arithmetic (of a bias before a
    BatchNorm or a softmax) and consist of the rounding of the others. The float64 runs see what this would hide.
    Those of the parameters ``vanishing``, too, but their terms are as large as the output's gradient, which is about 1.
    """
    ours.train(training), theirs.train(training)
    torch.manual_seed(7)
    y = ours(*inputs)
    torch.manual_seed(7)
    expected = theirs(*inputs)
    close(y, expected, tolerance)
    grad = torch.randn_like(expected)
    ours.zero_grad(), theirs.zero_grad()
    y.backward(grad), expected.backward(grad)
    grads, expected_grads = dict(ours.named_parameters()), dict(theirs.named_parameters())
    largest = max(p.grad.abs().max().item() for p in expected_grads.values() if p.grad is not None)
    for name, p in expected_grads.items():
        assert (grads[name].grad is None) == (p.grad is None), name
        if p.grad is not None:
            close(grads[name].grad, p.grad, tolerance, max(1.0, largest) if name in vanishing else largest)
    for a, b in zip(ours.buffers(), theirs.buffers()):
        close(a.double(), b.double(), tolerance)


def pair(build, seed: int) -> tuple[nn.Module, nn.Module]:
    """``build(library)`` for both libraries from one seed, checked for equal weights, with larger random embeddings
    (torch-rechub's of 1e-4 would hide errors) and random running statistics."""
    torch.manual_seed(seed)
    ours = build(OURS)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    theirs = build(THEIRS)
    assert torch.equal(state, torch.get_rng_state()), "both must draw the same random numbers"
    assert_same_weights(ours, theirs)
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            with torch.no_grad():
                module.weight.mul_(5e3)
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def random_features(rng: random.Random, prefix: str, dim: int, kinds: str, n: int):
    """Descriptions of features, as (class name, arguments): tables of their own, shared ones, pads or none."""
    specs = []
    for i in range(n):
        kind, name = rng.choice(kinds.split()), f"{prefix}{i}"
        if kind == "DenseFeature":
            specs.append((kind, {"name": name}))
            continue
        owners = [s for s in specs if s[0] != "DenseFeature" and s[1]["shared_with"] is None]
        owner = rng.choice(owners)[1] if owners and rng.random() < 0.4 else None
        arguments = {
            "name": name,
            "vocab_size": owner["vocab_size"] if owner else rng.choice([3, 9, 20]),
            "embed_dim": dim,
            "shared_with": owner["name"] if owner else None,
            "padding_idx": rng.choice([None, 0, 0, 2]),
        }
        if kind == "SequenceFeature":
            arguments["pooling"] = rng.choice(["mean", "sum"])
        specs.append((kind, arguments))
    return specs


def make(library: Library, specs):
    return [getattr(library, kind)(**arguments) for kind, arguments in specs]


def random_batch(rng: random.Random, specs):
    x = {}
    for kind, arguments in specs:
        if kind == "DenseFeature":
            x[arguments["name"]] = torch.randn(B)
        else:
            shape = (B, L) if kind == "SequenceFeature" else (B,)
            ids = torch.randint(0, arguments["vocab_size"], shape, dtype=rng.choice([torch.int32, torch.int64]))
            if kind == "SequenceFeature" and arguments["padding_idx"] is not None:
                ids[0] = arguments["padding_idx"]
                ids[1, 2:] = arguments["padding_idx"]
            x[arguments["name"]] = ids
    return x


@pytest.mark.parametrize("reduce_sum", [True, False])
def test_fm(reduce_sum):
    x = torch.randn(B, 7, 10)
    close(rk.FM(reduce_sum)(x), THEIRS.FM(reduce_sum)(x))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_lr(sigmoid):
    ours, theirs = pair(lambda library: library.LR(9, sigmoid), 0)
    compare(ours, theirs, torch.randn(B, 9), training=True)


# A float64 run is exact enough to see a wrong term of any size; the float32 run is what users have.
PRECISIONS = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 5e-5)], ids=["float64", "float32"]
)


@PRECISIONS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, training, dtype, tolerance):
    for arguments in ((9, True, [8, 5], 0.3), (9, False, [4]), (9,)):
        ours, theirs = pair(lambda library: library.MLP(*arguments, activation=activation), 1)
        ours.to(dtype), theirs.to(dtype)
        compare(ours, theirs, torch.randn(B, 9, dtype=dtype), training=training, tolerance=tolerance)


@PRECISIONS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dims", [None, [], [7], [12, 5], [9, 6, 3]])
def test_activation_unit(dims, activation, use_softmax, training, dtype, tolerance):
    ours, theirs = pair(lambda library: library.ActivationUnit(6, dims, activation, use_softmax), 2)
    ours.to(dtype), theirs.to(dtype)
    history, target = torch.randn(B, 40, 6, dtype=dtype), torch.randn(B, 6, dtype=dtype)
    # The score's bias moves every score alike, and so do its weights where the units' values vary little.
    vanishing = list(theirs.state_dict())[-2:] if use_softmax else ()
    compare(ours, theirs, history, target, training=training, tolerance=tolerance, vanishing=vanishing)
    ours.load_state_dict(theirs.state_dict())
    inputs = [t.clone().requires_grad_() for t in (history, target)]
    expected_inputs = [t.clone().requires_grad_() for t in (history, target)]
    grad = torch.randn(B, 6, dtype=dtype)
    ours(*inputs).backward(grad), theirs(*expected_inputs).backward(grad)
    for a, b in zip(inputs, expected_inputs):
        close(a.grad, b.grad, tolerance)


@pytest.mark.parametrize("seed", SEEDS)
def test_embedding_layer(seed):
    rng = random.Random(seed)
    specs = random_features(rng, "f", 4, "SparseFeature SequenceFeature DenseFeature", rng.randint(1, 7))
    ours, theirs = pair(lambda library: library.EmbeddingLayer(make(library, specs)), seed)
    x = random_batch(rng, specs)
    chosen = rng.sample(range(len(specs)), rng.randint(1, len(specs)))
    has_table = any(specs[i][0] != "DenseFeature" for i in chosen)
    for squeeze_dim in (True, False) if has_table else (True,):
        a = ours(x, [ours.features[i] for i in chosen], squeeze_dim)
        b = theirs(x, [theirs.features[i] for i in chosen], squeeze_dim)
        close(a, b)
        if a.requires_grad:
            grad = torch.randn_like(b)
            ours.zero_grad(), theirs.zero_grad()
            a.backward(grad), b.backward(grad)
            for p, q in zip(ours.parameters(), theirs.parameters()):
                assert (p.grad is None) == (q.grad is None)
                if q.grad is not None:
                    close(p.grad, q.grad)


def test_embedding_layer_concat_sequences():
    specs = [
        ("SequenceFeature", {"name": f"h{i}", "vocab_size": 9, "embed_dim": 4, "pooling": "concat", "padding_idx": 0})
        for i in range(2)
    ]
    ours, theirs = pair(lambda library: library.EmbeddingLayer(make(library, specs)), 0)
    x = {f"h{i}": torch.randint(0, 9, (B, L)) for i in range(2)}
    assert ours(x, ours.features).shape == (B, 2, L, 4)
    assert torch.equal(ours(x, ours.features), theirs(x, theirs.features))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_deepfm(seed, training):
    rng = random.Random(seed)
    fm = random_features(rng, "s", 4, "SparseFeature SequenceFeature", rng.randint(1, 5))
    dense = random_features(rng, "d", 4, "DenseFeature", rng.randint(0, 3))
    mlp_params = {"dims": rng.choice([[], [8], [8, 6]]), "activation": rng.choice(ACTIVATIONS), "dropout": 0.2}

    def build(library):
        features = make(library, fm)
        return library.DeepFM(features + make(library, dense), features, mlp_params)

    ours, theirs = pair(build, seed)
    compare(ours, theirs, random_batch(rng, fm + dense), training=training, tolerance=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_wide_deep(seed, training):
    rng = random.Random(seed)
    specs = random_features(rng, "f", 4, "SparseFeature SequenceFeature DenseFeature", rng.randint(1, 7))
    wide, deep = (sorted(rng.sample(range(len(specs)), rng.randint(1, len(specs)))) for _ in range(2))
    owners = [i for i, s in enumerate(specs) if s[1].get("shared_with", "") is None]
    deep = sorted({*deep, *owners})  # every table has its owner
    mlp_params = {"dims": rng.choice([[], [8], [8, 6]]), "activation": rng.choice(ACTIVATIONS), "dropout": 0.2}

    def build(library):
        features = make(library, specs)
        return library.WideDeep([features[i] for i in wide], [features[i] for i in deep], mlp_params)

    ours, theirs = pair(build, seed)
    compare(ours, theirs, random_batch(rng, specs), training=training, tolerance=1e-4)


def din_specs(rng: random.Random, dim=4):
    n = rng.randint(1, 3)
    user = random_features(rng, "u", dim, "SparseFeature SequenceFeature", rng.randint(1, 3))
    targets = [
        (
            "SparseFeature",
            {"name": f"t{i}", "vocab_size": 9 + i, "embed_dim": dim, "padding_idx": rng.choice([None, 0])},
        )
        for i in range(n)
    ]
    histories = [
        (
            "SequenceFeature",
            {
                "name": f"h{i}",
                "vocab_size": 9 + i,
                "embed_dim": dim,
                "pooling": "concat",
                "padding_idx": rng.choice([None, 0]),
                "shared_with": f"t{i}" if rng.random() < 0.6 else None,
            },
        )
        for i in range(n)
    ]
    return user, histories, targets


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_din(seed, training):
    rng = random.Random(seed)
    user, histories, targets = din_specs(rng)
    mlp_params = {"dims": rng.choice([[8], [8, 6]]), "dropout": rng.choice([0, 0.2])}
    attention = {
        "dims": rng.choice([[5], [7, 4]]),
        "activation": rng.choice(ACTIVATIONS),
        "use_softmax": rng.random() < 0.5,
    }

    def build(library):
        return library.DIN(make(library, user), make(library, histories), make(library, targets), mlp_params, attention)

    ours, theirs = pair(build, seed)
    compare(ours, theirs, random_batch(rng, user + histories + targets), training=training, tolerance=2e-4)


def test_their_feature_objects_work():
    features = [
        THEIRS.SparseFeature("a", 9, 4),
        THEIRS.SequenceFeature("b", 9, 4, padding_idx=0),
        THEIRS.DenseFeature("c"),
    ]
    ours = rk.DeepFM(features, features[:2], {"dims": [8]})
    x = {"a": torch.randint(0, 9, (B,)), "b": torch.randint(0, 9, (B, L)), "c": torch.randn(B)}
    theirs = THEIRS.DeepFM(features, features[:2], {"dims": [8]})
    assert ours.embedding.embed_dict["a"] is theirs.embedding.embed_dict["a"]  # cached on the feature object
    theirs.load_state_dict(ours.state_dict())
    compare(ours, theirs, x, training=True, tolerance=1e-4)


class OwnFeature(rk.SparseFeature):
    pass


def test_our_features_in_their_models():
    """torch-rechub goes by isinstance, and takes what is none of its own for dense."""
    ours = [rk.SparseFeature("a", 9, 4), OwnFeature("own", 9, 4), rk.SequenceFeature("b", 9, 4), rk.DenseFeature("c")]
    classes = [features_.SparseFeature, features_.SparseFeature, features_.SequenceFeature, features_.DenseFeature]
    loaded = pickle.loads(pickle.dumps(ours))
    for features in (ours, loaded, copy.deepcopy(ours), [copy.copy(f) for f in ours]):
        for feature, original, theirs in zip(features, ours, classes):
            assert [isinstance(feature, c) for c in dict.fromkeys(classes)] == [
                c is theirs for c in dict.fromkeys(classes)
            ]
            assert isinstance(feature, getattr(rk, theirs.__name__)) and type(feature) is type(original)
            assert list(vars(feature)) == list(vars(original)) and repr(feature) == repr(original)
    x = {"a": torch.randint(9, (B,)), "own": torch.randint(9, (B,)), "b": torch.randint(9, (B, L)), "c": torch.randn(B)}
    models = [ranking.WideDeep(f, f, {"dims": [4]}) for f in (ours, [c(*a) for c, a in zip(classes, ARGUMENTS)])]
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0].eval()(x), models[1].eval()(x))


ARGUMENTS = ("a", 9, 4), ("own", 9, 4), ("b", 9, 4), ("c",)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["DIN", "DeepFM", "WideDeep", "DCN"])
def test_accelerate(name, seed):
    """Our layers inside torch-rechub's models, the parameters being the very same objects."""
    rng = random.Random(seed)
    user, histories, targets = din_specs(rng)
    specs = user + histories + targets if name == "DIN" else user

    def build(library):
        features = make(library, user)
        if name == "DIN":
            return ranking.DIN(features, make(library, histories), make(library, targets), {"dims": [8]}, {"dims": [5]})
        if name == "DeepFM":
            return ranking.DeepFM(features, features, {"dims": [8]})
        if name == "WideDeep":
            return ranking.WideDeep(features, features, {"dims": [8]})
        return ranking.DCN(features, 2, {"dims": [8]})

    torch.manual_seed(seed)
    theirs = build(THEIRS)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = copy.deepcopy(theirs)
    before = [id(p) for p in ours.parameters()]
    assert rk.accelerate(ours) is ours and [id(p) for p in ours.parameters()] == before
    assert isinstance(ours.embedding, rk.EmbeddingLayer) and list(ours.state_dict()) == list(theirs.state_dict())
    compare(ours, theirs, random_batch(rng, specs), training=True, tolerance=2e-4)
    assert rk.accelerate(ours) is ours


@pytest.mark.parametrize("name", ["RandomNormal", "RandomUniform", "XavierNormal", "XavierUniform"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_initializers(name, padding_idx):
    torch.manual_seed(3)
    ours = getattr(rk, name)()(7, 5, padding_idx)
    torch.manual_seed(3)
    theirs = getattr(initializers, name)()(7, 5, padding_idx)
    assert torch.equal(ours.weight, theirs.weight) and ours.padding_idx == theirs.padding_idx


def test_pretrained_and_default_width():
    weight = torch.randn(7, 5)
    for freeze in (True, False):
        ours, theirs = (
            rk.Pretrained(weight.numpy(), freeze)(7, 5),
            initializers.Pretrained(weight.numpy(), freeze)(7, 5),
        )
        assert torch.equal(ours.weight, theirs.weight) and ours.weight.requires_grad == theirs.weight.requires_grad
    for vocab_size in (1, 2, 16, 999, 1000, 10**6, 1_048_576):
        assert rk.SparseFeature("x", vocab_size).embed_dim == THEIRS.SparseFeature("x", vocab_size).embed_dim


def learning_curve(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> list[float]:
    model.train()
    losses = []
    for x, y in batches:
        loss = nn.functional.binary_cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SGD, ADAM = (lambda p: torch.optim.SGD(p, 0.1)), (lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-5))


@pytest.mark.parametrize(
    "model, optimizer, dtype, tolerance",
    [
        ("DeepFM", SGD, torch.float32, 1e-5),
        ("DeepFM", ADAM, torch.float64, 1e-10),
        ("DIN", SGD, torch.float32, 1e-5),
        ("DIN", ADAM, torch.float32, 1e-4),
        ("DIN", ADAM, torch.float64, 1e-10),
    ],
    ids=["DeepFM-sgd", "DeepFM-adam-float64", "DIN-sgd", "DIN-adam", "DIN-adam-float64"],
)
def test_same_losses_for_fifty_steps(model, optimizer, dtype, tolerance):
    """Losses and not parameters: Adam makes full steps of the rounding of a gradient that is zero in exact arithmetic,
    like that of a bias before a BatchNorm. In float32 such a step now and then flips a ReLU, and either library's
    losses are then 1e-3 from those in float64."""
    sparse = [("SparseFeature", {"name": f"s{i}", "vocab_size": 50, "embed_dim": 16}) for i in range(6)]
    dense = [("DenseFeature", {"name": f"d{i}"}) for i in range(3)]
    target = [("SparseFeature", {"name": "t", "vocab_size": 80, "embed_dim": 16, "padding_idx": 0})]
    history = [
        ("SequenceFeature", {"name": "h", "vocab_size": 80, "embed_dim": 16, "pooling": "concat", "shared_with": "t",
                             "padding_idx": 0})
    ]  # fmt: skip

    def build(library):
        torch.manual_seed(0)
        if model == "DIN":
            return library.DIN(make(library, sparse), make(library, history), make(library, target),
                               {"dims": [64, 32]}, {"dims": [36]})  # fmt: skip
        features = make(library, sparse)
        return library.DeepFM(features + make(library, dense), features, {"dims": [64, 32]})

    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(50):
        x = {s["name"]: torch.randint(0, 50, (256,), generator=generator) for _, s in sparse}
        x |= {d["name"]: torch.randn(256, generator=generator) for _, d in dense}
        x |= {"t": torch.randint(1, 80, (256,), generator=generator),
              "h": torch.randint(0, 80, (256, 20), generator=generator)}  # fmt: skip
        y = ((x["s0"] + x["t"]) % 3 == 0).float()
        batches.append((x, y))
        if dtype is torch.float64:
            batches[-1] = x, y.double()
    ours, theirs = build(OURS).to(dtype), build(THEIRS).to(dtype)
    a = learning_curve(ours, optimizer(ours.parameters()), batches)
    b = learning_curve(theirs, optimizer(theirs.parameters()), batches)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=0)
