"""A frozen model's scores are the model's, from one user's candidates and from a batch, in every form of its tables."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels import serve
from rankkernels.ops._rank_plan import Plan, Table, dequantize, quantize
from rankkernels.ops.rank import definition
from tests.serve.models import R, batch, deepfm, din, randomized, request

MODELS = {
    "deepfm": deepfm,
    "deepfm-dice-D16": lambda: deepfm(activation="dice", D=16, dims=(33,)),
    "deepfm-prelu": lambda: deepfm(activation="prelu", D=1),
    "deepfm-sigmoid": lambda: deepfm(activation="sigmoid", D=17, dims=(64, 48, 7)),
    "deepfm-leakyrelu": lambda: deepfm(activation="leakyrelu", dims=(300,)),
    "deepfm-no-hidden": lambda: deepfm(dims=()),
    "din": din,
    "din-D16-36": lambda: din(D=16, attention=(36,)),
    "din-two-layers": lambda: din(D=5, attention=(13, 6)),
    "din-softmax": lambda: din(use_softmax=True, activation="prelu"),
    "din-relu": lambda: din(activation="relu", attention=(8, 4, 3)),
    "din-no-hidden": lambda: din(attention=()),
    "din-masked": lambda: din(mask_padding=True),
    "din-masked-softmax": lambda: din(mask_padding=True, use_softmax=True, activation="sigmoid"),
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def reference(frozen, user, candidates):
    """The op's definition of correct."""
    inputs = [candidates[n] if n in candidates else user[n] for n in frozen.inputs]
    sides = [int(n not in candidates) for n in frozen.inputs]
    C = len(next(iter(candidates.values())))
    return definition(inputs, sides, frozen.tables, frozen.weights, frozen.plan, frozen.names, C)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_models(name):
    model = MODELS[name]()
    frozen = serve.freeze(model)
    for C, L in ((1, 1), (5, 6), (37, 9), (100, 3)):
        user, candidates = request(model, C, L)
        with torch.no_grad():
            expected = model(batch(user, candidates))
        assert C < 5 or expected.std() > 1e-3
        close(frozen.rank(user, candidates), expected)
        close(frozen(batch(user, candidates)), expected)
        close(reference(frozen, user, candidates), expected)
    assert reference(frozen, *request(model, 0)).shape == frozen.rank(*request(model, 0)).shape == (0,)


def test_masked_histories_without_an_item():
    for use_softmax in (False, True):
        model = din(mask_padding=True, use_softmax=use_softmax)
        user, candidates = request(model, 5)
        user |= {"items": torch.zeros(1, 6, dtype=torch.int64), "shops": torch.zeros(1, 0, dtype=torch.int64)}
        frozen = serve.freeze(model)
        with torch.no_grad():
            close(frozen.rank(user, candidates), model(batch(user, candidates)))
        close(reference(frozen, user, candidates), frozen.rank(user, candidates))


@pytest.mark.parametrize("make", [deepfm, din])
def test_any_feature_may_be_the_users_or_the_candidates(make):
    model = make()
    user, candidates = request(model, 7)
    frozen, x = serve.freeze(model), batch(user, candidates)
    expected = frozen(x)
    moved = dict(user)
    for name in [n for n, v in user.items() if v.dim() == 1 or name_is_pooled(n)]:
        candidates[name] = x[name].contiguous()
        del moved[name]
        close(frozen.rank(moved, candidates), expected)
    first = {n: v[:1] for n, v in candidates.items() if n not in ("item", "tags")}
    same = {n: v[:1].expand(7, *v.shape[1:]) for n, v in candidates.items() if n in first}
    items = {n: candidates[n] for n in ("item", "tags") if n in candidates}
    close(frozen.rank({**moved, **first}, items), frozen(batch(moved, {**items, **same})))


def name_is_pooled(name: str) -> bool:
    return name == "liked"


@pytest.mark.parametrize("bits", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("make", [lambda: deepfm(D=16), lambda: deepfm(D=9), lambda: din(D=16), din])
def test_tables_of_fewer_bits(make, bits):
    """The kernels read what was stored, and the model with such tables gives the same."""
    model = make()
    frozen = serve.freeze(model, tables=bits)
    user, candidates = request(model, 37)
    close(frozen.rank(user, candidates), reference(frozen, user, candidates))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                table = Table({"bfloat16": 16, "int8": 8, "int4": 4}[bits], module.embedding_dim)
                module.weight.copy_(dequantize(quantize(module.weight, table.bits), table))
        expected = model(batch(user, candidates))
    close(frozen.rank(user, candidates), expected)
    close(frozen(batch(user, candidates)), expected)
    assert frozen.nbytes() < serve.freeze(model).nbytes()


@pytest.mark.parametrize("D", [1, 2, 7, 16, 33])
def test_errors_of_codes_are_bounded(D):
    weight = torch.randn(50, D) * torch.logspace(-6, 6, 50)[:, None]
    weight[7], weight[8] = 0.0, -3.25
    spread = weight.amax(1) - weight.amin(1)
    for bits in (8, 4):
        error = (dequantize(quantize(weight, bits), Table(bits, D)) - weight).abs().amax(1)
        assert (error <= spread / (2**bits - 1) / 2 + 1e-6 * weight.abs().amax(1)).all()
    assert ((quantize(weight, 16).float() - weight).abs() <= 2**-8 * weight.abs()).all()


@pytest.mark.parametrize("make", [lambda: deepfm(D=16), lambda: din(D=16, attention=(36,))])
def test_area_under_the_curve_stays(make):
    torch.manual_seed(1)
    model = make()
    x = batch(*[{}, {n: v for part in (request(model, 4000)) for n, v in part.items()}])
    x = {n: v if len(v) == 4000 else torch.cat([v] * 4000) for n, v in x.items()}
    for name, v in x.items():
        if not v.is_floating_point():
            x[name] = torch.randint_like(v, R)
    scores = serve.freeze(model)(x)
    labels = torch.rand(4000) < scores

    def auc(scores):
        ranks = scores.double().argsort().argsort().double()
        positives = int(labels.sum())
        return (ranks[labels].sum() - positives * (positives - 1) / 2) / (positives * (4000 - positives))

    for bits in ("bfloat16", "int8"):
        assert abs(auc(serve.freeze(model, bits)(x)) - auc(scores)) < 1e-3


@pytest.mark.parametrize("oov", ["row", "hash"])
def test_unknown_ids_get_the_models_row(oov):
    model = deepfm(oov=oov)
    user, candidates = request(model, 9)
    candidates["item"] = torch.tensor([0, R - 1, R, R + 5, -1, 10**12, -(10**12), 3, 2**62])
    with torch.no_grad():
        expected = model(batch(user, candidates))
    frozen = serve.freeze(model)
    close(frozen.rank(user, candidates), expected)
    close(reference(frozen, user, candidates), expected)


def test_of_torch_rechub():
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic import features
    from torch_rechub.models.ranking import DIN, DeepFM

    names = "SparseFeature", "SequenceFeature", "DenseFeature"
    lib = SimpleNamespace(DIN=DIN, DeepFM=DeepFM, **{n: getattr(features, n) for n in names})
    item, age = lib.SparseFeature("item", R, 8), lib.SparseFeature("age", R, 8)
    items = lib.SequenceFeature("items", R, 8, pooling="concat", shared_with="item")
    unit = {"dims": [7], "activation": "dice"}
    models = [
        randomized(DeepFM([item, age], [item, age], {"dims": [9], "activation": "dice"})),
        randomized(DIN([age], [items], [item], {"dims": [9]}, unit)),
    ]
    for model in models:
        user, candidates = request(model, 11)
        with torch.no_grad():
            expected = model(batch(user, candidates))
        close(serve.freeze(model).rank(user, candidates), expected)
        close(serve.freeze(rk.accelerate(model)).rank(user, candidates), expected)


def randomized_deepctr(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.4)
    return randomized(model)


@pytest.mark.parametrize(
    "options", [{}, {"dnn_use_bn": True, "dnn_activation": "prelu"}, {"dnn_activation": "sigmoid"}]
)
def test_of_deepctr_torch(options):
    inputs = pytest.importorskip("deepctr_torch.inputs")
    from deepctr_torch.models import DIN, DeepFM

    sparse, sequence, numbers = inputs.SparseFeat, inputs.VarLenSparseFeat, inputs.DenseFeat
    user, item, shop = (sparse(name, R, 6) for name in ("user", "item", "shop"))
    liked = sequence(sparse("liked", R, 6, embedding_name="item"), 4, combiner="mean")
    columns = [user, item, shop, numbers("price"), liked, numbers("profile", 2)]
    histories = [
        sequence(sparse(f"hist_{name}", R, 6, embedding_name=name), 5, length_name="length")
        for name in ("item", "shop")
    ]
    attention = {"att_weight_normalization": bool(options), "att_hidden_size": (7, 4)}
    models = [
        DeepFM(columns, columns, dnn_hidden_units=(9, 5), **options),
        DeepFM(columns[:4], columns[:4], dnn_hidden_units=(), task="regression"),
        DIN([*columns[:4], *histories], ["item", "shop"], dnn_hidden_units=(9, 5), **attention, **options),
    ]
    C, of_user = 13, {"user", "liked", "profile", "hist_item", "hist_shop", "length"}
    for model in map(randomized_deepctr, models):
        for length in (3, 5, 0):
            given = {}
            for name, (begin, end) in model.feature_index.items():
                n = 1 if name in of_user else C
                wide = name in ("liked", "hist_item", "hist_shop")
                ids = torch.randint(0, R, (n, end - begin) if wide else (n,))
                given[name] = torch.randn(n, end - begin).squeeze(1) if name in ("price", "profile") else ids
                if name == "length":
                    given[name] = torch.tensor([length])
            X = [v.reshape(len(v), -1).expand(C, -1).float() for v in given.values()]
            with torch.no_grad():
                expected = model(torch.cat(X, 1)).squeeze(1)
            user_part = {n: v for n, v in given.items() if n in of_user}
            candidates = {n: v for n, v in given.items() if n not in of_user}
            for frozen in (serve.freeze(model), serve.freeze(rk.accelerate(model))):
                close(frozen.rank(user_part, candidates), expected)
                close(frozen(batch(user_part, candidates)), expected)
                close(reference(frozen, user_part, candidates), expected)
            rk.restore(model)


def test_what_is_not_served_is_named():
    model = deepfm()
    model.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(serve.NotServed, match="mlp has a hook"):
        serve.freeze(model)
    with pytest.raises(serve.NotServed, match=r"mlp has the activation Softmax"):
        serve.freeze(deepfm(activation="softmax"))
    with pytest.raises(serve.NotServed, match="Linear is not served"):
        serve.freeze(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tables must be one of"):
        serve.freeze(model, tables="int2")
    weighted = rk.SequenceFeature("tags", R, 4, pooling="sum", weights="factors")
    with pytest.raises(serve.NotServed, match="'tags' has per-sample weights"):
        serve.freeze(rk.DeepFM([weighted], [weighted], {"dims": [3]}))


def test_requests_that_are_wrong_say_so():
    model = din()
    frozen = serve.freeze(model)
    user, candidates = request(model, 5)
    cases = [
        (IndexError, r"rank: item\[3\] = 40 is out of range for a table with 40 rows", {}, {"item": [0, 1, 2, R, 4]}),
        (IndexError, r"rank: age\[0\] = -1 is out of range", {"age": [-1]}, {}),
        (IndexError, r"rank: items\[0, 1\] = 99 is out of range", {"items": [[1, 99]]}, {}),
        (IndexError, r"rank: items\[1\] = 99 is out of range", {"items": [1, 99]}, {}),
        (ValueError, r"rank: shop must be ids \[C\] of the candidates, C = 5, got shape \[4\]", {}, {"shop": [0] * 4}),
        (ValueError, r"rank: items is a history, which must be the user's", {}, {"items": [[1]] * 5}),
        (ValueError, r"rank: age must be ids of the user, got shape \[2\]", {"age": [1, 2]}, {}),
        (ValueError, "rank: hour must be numbers, got 'noon'", {"hour": "noon"}, {}),
    ]
    for error, text, of_user, of_candidates in cases:
        given = [
            base | {n: v if isinstance(v, str) else torch.tensor(v) for n, v in more.items()}
            for base, more in ((user, of_user), (candidates, of_candidates))
        ]
        with pytest.raises(error, match=text):
            frozen.rank(*given)
        if error is IndexError:
            with pytest.raises(RuntimeError, match=text):
                reference(frozen, *given)
    with pytest.raises(KeyError, match="feature 'age' is missing"):
        frozen.rank({n: v for n, v in user.items() if n != "age"}, candidates)
    with pytest.raises(KeyError, match="candidates must have one"):
        frozen.rank({**user, "item": 1, "shop": 2}, {})
    with pytest.raises(ValueError, match="k must not be negative"):
        frozen.rank(user, candidates, k=-1)
    with pytest.raises(IndexError, match=r"rank: items\[2, 1\] = 40"):
        x = batch(user, candidates)
        frozen(x | {"items": torch.where(torch.arange(30).view(5, 6) == 13, R, 1)})


def test_values_as_they_come():
    model = din()
    frozen = serve.freeze(model)
    user, candidates = request(model, 6)
    expected = frozen.rank(user, candidates)
    plain = {n: v.tolist() if v.dim() == 2 else int(v) for n, v in user.items()}
    assert torch.equal(frozen.rank(plain, candidates), expected)
    assert torch.equal(frozen.rank({n: v.squeeze(0) for n, v in user.items()}, candidates), expected)
    narrow = {n: v.int() for n, v in candidates.items()}
    assert torch.equal(frozen.rank(user, narrow), expected)
    strided = {n: torch.stack([v, v], 1)[:, 0] for n, v in candidates.items()}
    assert torch.equal(frozen.rank(user, strided), expected)


def test_the_best():
    model = deepfm()
    frozen = serve.freeze(model)
    user, candidates = request(model, 50)
    scores = frozen.rank(user, candidates)
    values, indices = frozen.rank(user, candidates, k=7)
    assert torch.equal(values, scores.sort(descending=True).values[:7]) and torch.equal(scores[indices], values)
    assert len(frozen.rank(user, candidates, k=99).values) == 50
    none = {n: v[:0] for n, v in candidates.items()}
    assert frozen.rank(user, none).shape == (0,) and frozen.rank(user, none, k=3).indices.shape == (0,)


def test_training_goes_on_without_it():
    model = deepfm()
    frozen = serve.freeze(model)
    user, candidates = request(model, 5)
    before = frozen.rank(user, candidates)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(frozen.rank(user, candidates), before)


def test_saved_and_loaded_without_the_model(tmp_path):
    for make in (deepfm, din):
        model = make()
        user, candidates = request(model, 5)
        for bits in ("float32", "int4"):
            frozen = serve.freeze(model, bits)
            expected = frozen.rank(user, candidates)
            frozen.save(tmp_path / "model.pt")
            torch.save((user, candidates, expected), tmp_path / "request.pt")
            for copy in (pickle.loads(pickle.dumps(frozen)), serve.load(tmp_path / "model.pt", mmap=True)):
                assert torch.equal(copy.rank(user, candidates), expected)
                assert torch.equal(copy(batch(user, candidates)), frozen(batch(user, candidates)))
    program = (
        "import sys, torch; from rankkernels import serve; folder = sys.argv[1]\n"
        "user, candidates, expected = torch.load(folder + '/request.pt')\n"
        "assert torch.equal(serve.load(folder + '/model.pt').rank(user, candidates), expected)\n"
        "assert 'torch_rechub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    torch.save({"format": 0}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="is no frozen model of format"):
        serve.load(tmp_path / "old.pt")


@pytest.mark.parametrize("make", [deepfm, din])
def test_the_ops_are_torchs(make):
    frozen = serve.freeze(make(), tables="int8")
    user, candidates = request(make(), 3)
    inputs = [candidates.get(n, user.get(n)) for n in frozen.inputs]
    sides = [int(n not in candidates) for n in frozen.inputs]
    of_rank = inputs, sides, frozen.tables, frozen.weights, frozen.plan, frozen.names, 3
    of_rows = frozen.tables[0], 8, frozen.tables[0].size(1) - 8, torch.randint(0, R, (3, 4)), "item"
    for op, arguments in (("rank", of_rank), ("frozen_rows", of_rows)):
        overload = getattr(torch.ops.rankkernels, op).default
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_plans_are_read_as_they_are_written():
    for make in (deepfm, din):
        frozen = serve.freeze(make())
        assert torch.equal(Plan.decode(frozen.plan).encode(), frozen.plan)
        user, candidates = request(make(), 3)
        with pytest.raises(ValueError, match="plan ends early"):
            broken = serve.FrozenModel(frozen.inputs, frozen.tables, frozen.weights, frozen.plan)
            broken.plan = frozen.plan[:-1]
            broken.rank(user, candidates)
        with pytest.raises(ValueError, match="plan reads|where -1"):
            broken.plan, broken.weights = frozen.plan, frozen.weights[:50]
            broken.rank(user, candidates)
