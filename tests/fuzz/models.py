"""EmbeddingLayer, DeepFM and DIN, their features and batches: random ones against torch-rechub's, and wrong ones."""

from __future__ import annotations

import copy

import torch
from draw import Draw, Finding
from kernels import spoiled
from layers import ACTIVATIONS, KINKED, mlp_arguments, pair, precision, rows
from modules import ERRORS, Trial, check, check_wrong, refused_or_right
from torch import Tensor, nn
from torch_rechub.basic import layers as rechub
from torch_rechub.models import ranking

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops._features import UNKNOWN, Known

DEFAULT_ATTENTION = {"dims": [4], "activation": "dice", "use_softmax": False}


# ---- features and batches


def is_dense(feature) -> bool:
    return isinstance(feature, rk.DenseFeature)


def is_sequence(feature) -> bool:
    return isinstance(feature, rk.SequenceFeature)


def oov(draw: Draw, vocab: int, padding: int | None) -> str:
    """What becomes of unknown ids, where there is a row for them beside the padding's."""
    return draw.choice(("error", "error", "row", "hash")) if padding != vocab - 1 else "error"


def feature(draw: Draw, name: str, width: int, kinds: tuple, owners: list):
    """One feature; now and then on the table of another."""
    kind = draw.choice(kinds)
    if kind is rk.DenseFeature:
        return kind(name, embed_dim=draw.choice((1, 1, 4)))
    owners = [f for f in owners if not is_dense(f) and f.shared_with is None and f.embed_dim == width]
    owner = draw.choice(owners) if owners and draw.chance(0.3) else None
    vocab = owner.vocab_size if owner else max(draw.size(), 1)
    padding = draw.choice((None, 0, vocab - 1))
    more = {"oov": oov(draw, vocab, padding)}
    if kind is rk.SequenceFeature:
        more |= {"pooling": draw.choice(("mean", "sum")), "weights": draw.choice((None, None, f"weights of {name}"))}
    return kind(name, vocab, width, shared_with=owner.name if owner else None, padding_idx=padding, **more)


def features(draw: Draw, prefix: str, n: int, width: int | None, kinds: tuple, owners: list | None = None) -> list:
    """``width``: of all of them, or None for widths of their own."""
    found: list = []
    for i in range(n):
        w = max(draw.size(70), 1) if width is None else width
        found.append(feature(draw, f"{prefix}{i}", w, kinds, [*(owners or []), *found]))
    return found


def values(draw: Draw, f, B: int, L: int) -> Tensor:
    """Of one feature in a batch."""
    if is_dense(f):
        shape = (B,) if f.embed_dim == 1 and draw.chance(0.5) else (B, f.embed_dim)
        return draw.strided(draw.normal(shape, draw.choice((torch.float32, torch.float32, torch.float64))))
    ids = draw.ids(f.vocab_size, (B, L) if is_sequence(f) else (B,))
    if f.oov != "error":
        unknown = (-1, -7, f.vocab_size, f.vocab_size + 5, 2**31 - 1, -(2**31))
        unknown += (2**40, -(2**62)) if ids.dtype == torch.int64 else ()
        ids = torch.where(torch.rand(ids.shape, generator=draw.generator) < 0.3, draw.choice(unknown), ids)
    if is_sequence(f) and f.padding_idx is not None and ids.numel():
        ids = torch.where(torch.rand(ids.shape, generator=draw.generator) < 0.3, f.padding_idx, ids)
    return ids


def batch(draw: Draw, chosen: list, B: int) -> dict[str, Tensor]:
    x = {f.name: values(draw, f, B, draw.size(12)) for f in chosen}
    for f in chosen:
        if getattr(f, "weights", None) is not None:
            x[f.weights] = draw.strided(draw.normal(x[f.name].shape, draw.choice((torch.float32, torch.float64))))
    return x


# ---- what is right


class Embeddings(rechub.EmbeddingLayer):
    """torch-rechub's layer in any precision, for widths that differ too: feature by feature, dense ones last."""

    def one(self, x: dict, f) -> Tensor:
        if is_dense(f):
            v = x[f.name].float()
            return v if v.dim() > 1 else v.unsqueeze(1)
        ids = x[f.name].long()
        if f.oov != "error":
            hidden = -1 if f.padding_idx is None else f.padding_idx % f.vocab_size
            ids = Known(UNKNOWN.index(f.oov), f.vocab_size, hidden).rows_of(ids)
        found = self.embed_dict[f.shared_with or f.name](ids)
        if not is_sequence(f) or f.pooling == "concat":
            return found
        keep = (ids != (-1 if f.padding_idx is None else f.padding_idx)).to(found.dtype).unsqueeze(2)
        scaled = keep
        if f.weights is not None:
            if x[f.weights].shape != ids.shape or x[f.weights].is_complex():
                raise ValueError(f"{f.weights}: another shape than the ids'")
            scaled = keep * x[f.weights].unsqueeze(2).to(found.dtype)
        total = (found * scaled).sum(1)
        return total if f.pooling == "sum" else total / keep.sum(1).clamp(min=1)

    def forward(self, x: dict, features: list, squeeze_dim: bool = False) -> Tensor:
        tables = [self.one(x, f) for f in features if not is_dense(f)]
        if not squeeze_dim:
            return torch.stack(tables, 1)
        dense = [self.one(x, f) for f in features if is_dense(f)]
        dtype = tables[0].dtype if tables else next(self.parameters(), torch.empty(0)).dtype
        return torch.cat([*(t.flatten(1) for t in tables), *(v.to(dtype) for v in dense)], 1)


class Din(ranking.DIN):
    """torch-rechub's model for histories of any widths and lengths, any features, and with masks."""

    def forward(self, x: dict) -> Tensor:
        pooled = []
        for unit, history, target in zip(self.attention_layers, self.history_features, self.target_features):
            rows_, t = self.embedding.one(x, history), self.embedding.one(x, target)
            mask = x[history.name] != history.padding_idx if self.mask_padding else None
            valid, sample, _ = reference.valid_rows(rows_, None, mask, None)
            score = unit.attention(reference.attention_input(valid, t, sample)).squeeze(1)
            pooled.append(reference.attention_pool(score, valid, sample, t.size(0), unit.use_softmax))
        everything = [*pooled, *(self.embedding.one(x, f) for f in self.target_features)]
        if self.features:
            everything.append(self.embedding(x, self.features, squeeze_dim=True))
        return torch.sigmoid(self.mlp(torch.cat(everything, 1)).squeeze(1))


def built(draw: Draw, ours, theirs, arguments: list, dtype: torch.dtype, training: bool) -> tuple:
    """Both models, each with features of its own: a feature keeps its table."""
    right = theirs(*copy.deepcopy(arguments))
    made, right = pair(draw, ours(*arguments), right, dtype, training)
    for m in right.modules():
        if type(m) is rechub.EmbeddingLayer:
            m.__class__ = Embeddings
    return made, right


# ---- the families


def embedding_layer(draw: Draw) -> Trial:
    kinds = (rk.SparseFeature, rk.SequenceFeature, rk.DenseFeature)
    squeeze = draw.chance(0.7)
    width = None if squeeze and draw.chance(0.5) else max(draw.size(70), 1)
    chosen = features(draw, "f", draw.randint(1, 7), width, kinds)
    if not squeeze and all(map(is_dense, chosen)):
        chosen.append(rk.SparseFeature("more", 9, width))
    if draw.chance(0.2):
        for f in chosen:
            if is_sequence(f) and squeeze is False and all(map(is_sequence, chosen)):
                f.pooling, f.weights = "concat", None
    tables = [f for f in chosen if not is_dense(f)]
    dtype = draw.dtype() if tables else torch.float32
    ours, theirs = built(draw, rk.EmbeddingLayer, Embeddings, [chosen], dtype, draw.chance(0.5))
    asked = draw.sample(chosen, draw.randint(1, len(chosen))) if squeeze else tables
    if all(getattr(f, "pooling", "") == "concat" for f in asked):
        x = {f.name: values(draw, f, 7, 5) for f in asked}
    else:
        x = batch(draw, asked, draw.size(draw.choice((40, 300))))
    return Trial("EmbeddingLayer", ours, theirs, [x, asked, squeeze], dtype)


def deepfm(draw: Draw) -> Trial:
    dtype, training = precision(draw), draw.chance(0.5)
    width = max(draw.size(40), 1)
    fm = features(draw, "s", draw.randint(1, 5), width, (rk.SparseFeature, rk.SequenceFeature))
    deep = fm if draw.chance(0.5) else draw.sample(fm, draw.randint(0, len(fm)))
    if draw.chance(0.4):
        deep = [*deep, *features(draw, "w", draw.randint(1, 2), None, (rk.SparseFeature, rk.SequenceFeature), fm)]
    deep = [*deep, *features(draw, "d", draw.randint(0, 3), None, (rk.DenseFeature,))]
    arguments = mlp_arguments(draw)
    deep = deep or fm
    ours, theirs = built(draw, rk.DeepFM, ranking.DeepFM, [deep, fm, arguments], dtype, training)
    x = batch(draw, list(dict.fromkeys([*deep, *fm])), rows(draw, training))
    return Trial("DeepFM", ours, theirs, [x], dtype, arguments["activation"] not in KINKED)


def din(draw: Draw) -> Trial:
    dtype, training, n = precision(draw), draw.chance(0.5), draw.randint(1, 3)
    mask_padding = draw.chance(0.3)
    user = features(draw, "u", draw.randint(0, 3), None, (rk.SparseFeature, rk.SequenceFeature, rk.DenseFeature))
    targets, histories = [], []
    for i in range(n):
        width, vocab = max(draw.size(40), 1), max(draw.size(), 8)
        none = draw.choice((None, 0))
        targets.append(rk.SparseFeature(f"t{i}", vocab, width, padding_idx=none, oov=oov(draw, vocab, none)))
        padding, owner = 0 if mask_padding else draw.choice((None, 0)), f"t{i}" if draw.chance(0.6) else None
        more = {"oov": oov(draw, vocab, padding)}
        histories.append(rk.SequenceFeature(f"h{i}", vocab, width, "concat", owner, padding, **more))
    attention = {
        "dims": [max(draw.size(40), 1) for _ in range(draw.randint(0, 2))],
        "activation": draw.choice(ACTIVATIONS),
        "use_softmax": draw.chance(0.4),
    }
    arguments = mlp_arguments(draw)
    right = {"activation": "dice", **arguments}

    def theirs(features, histories, targets, mlp_params, attention_mlp_params):
        params = {k: v for k, v in right.items() if k != "activation"}
        model = Din(features, histories, targets, params, attention_mlp_params)
        model.mlp = rechub.MLP(model.all_dims, **right)
        model.mask_padding = mask_padding
        return model

    def ours(*arguments):
        return rk.DIN(*arguments, mask_padding=mask_padding)

    made, exact = built(draw, ours, theirs, [user, histories, targets, arguments, attention], dtype, training)
    B = rows(draw, training) % 300 + 8
    x = batch(draw, [*user, *targets], B)
    for h in histories:
        L = max(draw.size(20), 3)
        x[h.name] = values(draw, h, B, L)
        valid_ids = torch.randint(1, h.vocab_size, (B // 2, 3), generator=draw.generator)
        x[h.name][: B // 2, :3] = valid_ids.to(x[h.name].dtype)  # training takes statistics of the valid rows
    smooth = not {arguments["activation"], attention["activation"]} & set(KINKED)
    return Trial("DIN", made, exact, [x], dtype, smooth)


MODELS = {"embedding_layer": embedding_layer, "deepfm": deepfm, "din": din}


def valid(name: str):
    return lambda draw: check(draw, MODELS[name](draw))


def wrong_value(draw: Draw, value: Tensor):
    """What a batch may have of a feature by mistake."""
    kind = draw.choice(("spoiled", "spoiled", "id", "batch", "no tensor", "column"))
    if kind == "id" and not value.is_floating_point() and value.numel():
        ids = value.clone().contiguous()
        ids.view(-1)[draw.randrange(ids.numel())] = draw.choice((-1, -(2**31), 2**31 - 1, 10**6))
        return ids
    if kind == "batch" and value.size(0):
        return draw.choice((value[:-1], value[:1], value[:0]))
    if kind == "no tensor":
        return draw.choice((None, value.tolist(), value.numpy(), 3, "x"))
    if kind == "column":
        return draw.choice((value[..., None], value.flatten(), value.sum() if value.numel() else value[None]))
    return spoiled(draw, value)


def wrong(draw: Draw) -> None:
    """One feature of the batch is missing or is not what it should be."""
    trial = draw.choice(list(MODELS.values()))(draw)
    x = dict(trial.inputs[0])
    name = draw.choice(list(x))
    if draw.chance(0.1):
        del x[name]
    else:
        x[name] = wrong_value(draw, x[name])
    trial.inputs[0] = x
    trial.what += f", feature {name}"
    check_wrong(draw, trial)


def odd_feature(draw: Draw):
    """A feature with one argument that no table can have, or one that fits no model."""
    kind = draw.choice((rk.SparseFeature, rk.SequenceFeature, rk.DenseFeature))
    arguments = {"name": "odd", "embed_dim": 4}
    if kind is not rk.DenseFeature:
        arguments |= {"vocab_size": 9, "padding_idx": None, "shared_with": None}
    if kind is rk.SequenceFeature:
        arguments["pooling"] = "mean"
    odd = (-1, 0, 1.5, None, "x", "", "a.b", "keys", "concat", "max", [], 10**4, float("nan"))
    arguments[draw.choice(list(arguments))] = draw.choice(odd)
    return kind(**arguments)


def wrong_constructor(draw: Draw) -> None:
    """A model or a layer of which one feature or one argument is odd: refused clearly, or right."""
    a, b = rk.SparseFeature("a", 9, 4), rk.SequenceFeature("b", 9, 4, padding_idx=0)
    history, dense = rk.SequenceFeature("h", 9, 4, "concat", padding_idx=0), rk.DenseFeature("c")
    calls = {
        "EmbeddingLayer": (rk.EmbeddingLayer, [[a, b, dense]]),
        "DeepFM": (rk.DeepFM, [[a, b, dense], [a, b], {"dims": [4]}]),
        "DIN": (rk.DIN, [[b, dense], [history], [a], {"dims": [4]}, dict(DEFAULT_ATTENTION)]),
    }
    what = draw.choice(list(calls))
    make, arguments = calls[what]
    i = draw.randrange(len(arguments))
    odd = "an argument"
    if isinstance(arguments[i], dict):
        key = draw.choice([*arguments[i], "nothing"])
        arguments[i] = {**arguments[i], key: draw.choice((-1, None, "x", 1.5, [0], [-1], [[]]))}
    else:
        try:
            one = draw.choice((None, 3, a, dense, history, odd_feature(draw)))
        except ERRORS:
            return
        odd = repr(one)
        arguments[i] = draw.choice(([*arguments[i], one], [one, *arguments[i][1:]], [], [one]))
    module = refused_or_right(f"{what}, {odd}", lambda: make(*arguments))
    if module is not None and isinstance(module, nn.Module) and what != "EmbeddingLayer":
        used = {f.name: f for f in [*arguments[0], *arguments[1], *(arguments[2] if what == "DIN" else [])]}
        has_values = {n: is_dense(f) or (isinstance(f.vocab_size, int) and f.vocab_size > 0) for n, f in used.items()}
        x = {n: values(draw, f, 9, 4) if has_values[n] else None for n, f in used.items()}
        out = refused_or_right(f"{what}, {odd}", lambda: module(x))
        if out is not None and out.shape != (9,):
            raise Finding(f"{what}, {odd}: a result of shape {list(out.shape)}")
