"""The embedding op under the CPU shim, beside its TEST_CASES, and in Triton under the interpreter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, DOUBLE, HALF, SINGLE, Interpreted
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._features import MODES, UNKNOWN, Features
from rankkernels.ops.embedding_bag import _looked_up
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, ROUNDING, settings, state_shapes
from rankkernels.testing import embedding_bag_case

CASES = [
    # One row of a warp's width and more, packed and not; groups of every number of lanes.
    *(embedding_bag_case([7], [d], [0], ["mean"], B=9, L=5, weighted=True) for d in (1, 2, 4, 12, 16, 40, 136, 300)),
    embedding_bag_case([7], [24], [0], ["none"], B=70, L=1),
    embedding_bag_case([13], [72], [0, 0], ["max", "sum"], B=9, L=6, padding_idx=2),
    # Hot rows, whose runs cross many tiles and groups of a warp.
    embedding_bag_case([3], [16], [0], ["sum"], B=40, L=40, jagged=True),
    embedding_bag_case([1], [10], [0], ["mean"], B=30, L=30, weighted=True),
    # Tables of several widths in one tile, and more features and tables than go with one launch.
    embedding_bag_case([2, 3, 2], [8, 10, 48], [0, 1, 2, 1], ["sum", "mean", "none", "max"], B=6, L=3),
    embedding_bag_case([5] * 130, [4] * 130, list(range(130)), ["sum", "none"] * 65, B=3, L=2, padding_idx=1),
]


def drawn(seed: int) -> dict:
    """A random config: anything from one row and column to more than a tile."""
    draw = random.Random(seed)
    T = draw.randint(1, 4)
    rows = [draw.choice([1, 2, 5, 40, 300]) for _ in range(T)]
    tables = [draw.randrange(T) for _ in range(draw.randint(1, 5))]
    return {
        "rows": rows, "dims": [draw.randint(1, 200) for _ in range(T)], "tables": tables,
        "modes": [draw.choice(MODES) for _ in tables], "B": draw.choice([0, 1, 3, 33, 70]), "L": draw.randint(0, 9),
        "padding": draw.choice([None, 0]), "weighted": draw.random() < 0.5, "jagged": draw.random() < 0.5,
        "narrow": draw.random() < 0.5, "left_out": draw.random() < 0.3,
        "way": draw.choice(["dense", "sparse", *OPTIMIZERS]), "clips": draw.random() < 0.5,
    }  # fmt: skip


def indices_of(config: dict, mode: str, rows: int) -> tuple[Tensor, Tensor | None]:
    """Ids and offsets of a feature; some bags are empty."""
    B, L, offsets = config["B"], config["L"], None
    outside = 3 if config.get("outside") or config.get("known") else 0
    shape: tuple[int, ...] = (B, 2) if mode == "none" and config.get("deep") else (B,) if mode == "none" else (B, L)
    if mode != "none" and config.get("jagged"):
        counts = torch.randint(0, L + 1, (B,))
        offsets, shape = counts.cumsum(0) - counts, (int(counts.sum()),)
    dtype = torch.int32 if config.get("narrow") else torch.int64
    if config.get("given"):
        return torch.randperm(rows)[:B], None
    return torch.randint(-outside, rows + outside, shape).to(dtype), offsets


def make(config: dict, dtype: torch.dtype) -> dict:
    config = drawn(config["seed"]) if "seed" in config else config
    rows, dims, tables, modes = (config[name] for name in ("rows", "dims", "tables", "modes"))
    padding, empty = config.get("padding"), torch.empty(0, dtype=dtype)
    weights = [torch.randn(r, d + config.get("gap", 0)).to(dtype)[:, :d] for r, d in zip(rows, dims)]
    if config.get("ties"):
        weights = [w.round() for w in weights]
    ids, offsets = zip(*(indices_of(config, mode, rows[t]) for t, mode in zip(tables, modes)))
    factors = [
        torch.randn(i.shape).to(dtype) if config.get("weighted") and mode in ("sum", "mean") else empty
        for i, mode in zip(ids, modes)
    ]
    kind = UNKNOWN.index(config["known"]) if "known" in config else 0
    missing = -1 if padding is None else padding
    known = [v for t in tables for v in (kind, rows[t], missing)] if kind else []
    none = torch.empty(0, dtype=torch.int64)
    features = Features(
        list(ids),
        [none if o is None else o for o in offsets] if config.get("jagged") else [],
        factors if config.get("weighted") else [],
        list(tables),
        [MODES.index(m) for m in modes],
        [missing] * len(tables),
        [missing] * len(rows),
        known,
    )
    shapes = [(*(i.shape if m == "none" else (config["B"],)), dims[t]) for i, m, t in zip(ids, modes, tables)]
    if config.get("concat"):  # the gradients of its parts are columns of one matrix
        grad_outs = list(
            torch.randn(config["B"], sum(s[-1] for s in shapes)).to(dtype).split([s[-1] for s in shapes], 1)
        )
    else:
        grad_outs = [torch.randn(s).to(dtype) for s in shapes]
    if config.get("left_out") and len(grad_outs) > 1:
        grad_outs[0] = None
    return {
        "weights": weights, "features": features, "grad_outs": grad_outs, "concat": bool(config.get("concat")),
        "given": bool(config.get("given")), **update_of(config, weights, dtype),
    }  # fmt: skip


def update_of(config: dict, weights: list[Tensor], dtype: torch.dtype) -> dict:
    """The optimizer's part of the arguments; ``live``: count, lr, scale and skip of each table, on the device."""
    way, n = config.get("way", "dense"), len(weights)
    if way not in OPTIMIZERS:
        return {"way": way, "states": [], "hyper": [], "live": []}
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    states = [torch.rand(s).to(wide) for w in weights for s in state_shapes(way, w.shape)]
    if way == "rowwise_rmsprop":
        states[1::2] = [torch.randint(3, s.shape).to(wide) for s in states[1::2]]  # the steps that touched them last
    own = {"ftrl": [config.get("lr_power", -0.5), 0.1, 0.05, 0.02], "rowwise_rmsprop": [2.0, 0.4]}.get(way, [])
    common = [0.9, 0.8, 1e-3, 0.01, 3.0, 0.5, 0.4 if config.get("clips") else 0.0]
    keys = [float(1 + t << 32 | 0x89ABCDEF) if config.get("rounds") and t != 1 else 0.0 for t in range(n)]
    hyper = [v for t in range(n) for v in (0.25 / (1 + t), *common, keys[t], *own)]  # each table at its own rate
    live = [torch.tensor([v]) for t in range(n) for v in (2.0, 0.25 / (1 + t), 2.0, float(config.get("skips", 0)))]
    return {"way": way, "states": states, "hyper": hyper, "live": live if config.get("live") else []}


def forward(module: ModuleType, weights, features, concat, **_) -> Sequence[Tensor]:
    return module.embedding_bag(weights, features, concat)


def of_tables(values: Sequence, t: int, n: int) -> Sequence:
    each = len(values) // n
    return values[each * t : each * t + each]


def launch(
    module: ModuleType, weights, features, grad_outs, concat, given, way, states, hyper, live
) -> Sequence[Tensor]:
    outs, rows = forward(module, weights, features, concat), [w.size(0) for w in weights]
    if way == "dense":
        grads, factor_grads = module.embedding_bag_backward(grad_outs, weights, rows, features)
        return *outs, *(g for g in grads if g.numel()), *factor_grads
    if way == "sparse":
        grad_rows, values, factor_grads = module.embedding_bag_backward_sparse(grad_outs, weights, rows, features)
        return *outs, *(r.double() for r in grad_rows), *(v for v in values if v.numel()), *factor_grads
    given_to = module, features, grad_outs, given, way, hyper
    stepped, states_now, live_now, factor_grads = stepped_by(*given_to, weights, states, live)
    right = rounded(*given_to, weights, (states, live), stepped) if hyper[ROUNDING] else []
    return *outs, *stepped, *states_now, *live_now, *factor_grads, *right


def stepped_by(module, features, grad_outs, given, way, hyper, weights, states, live) -> tuple[list[Tensor], ...]:
    """Tables, states, ``live`` and the gradients of the factors after a step, whose gradients become the tables'
    dtype."""
    stepped, states, live = ([t.clone() for t in tensors] for tensors in (weights, states, live))
    n, number = len(weights), OPTIMIZERS.index(way)
    every = [s for t in range(n) for s in (*of_tables(states, t, n), *of_tables(live, t, n))]
    dtypes = [weights[t].dtype for t in features.tables]
    grad_outs = [None if g is None else g.to(dtype) for g, dtype in zip(grad_outs, dtypes)]
    features = features._replace(per_sample_weights=[w.to(d) for w, d in zip(features.per_sample_weights, dtypes)])
    if given:
        (ids,), (values,) = features.indices, grad_outs
        module.sparse_update(stepped[0], every, ids, values, number, hyper)
        return stepped, states, live, []
    return stepped, states, live, module.embedding_bag_update(grad_outs, stepped, every, features, number, hyper)


def rounded(module, features, grad_outs, given, way, hyper, weights, states_and_live, stepped) -> list[Tensor]:
    """1 where a table is what the reference makes of the step of the same table in float32, else 0."""
    single = [w.float() if w.element_size() == 2 else w for w in weights]
    single, *_ = stepped_by(module, features, grad_outs, given, way, hyper, single, *states_and_live)
    found = []
    for t, (wide, before) in enumerate(zip(single, weights)):
        rows, key = rows_looked_up(features, grad_outs, t), int(of_tables(hyper, t, len(weights))[ROUNDING])
        right = before.clone()
        right[rows] = wide[rows].to(right.dtype)
        if key and right.element_size() == 2:
            bits = reference.rounding_bits(key, 3, rows, wide.size(1))
            right[rows] = reference.round_stochastically(wide[rows], right.dtype, bits)
        found.append((stepped[t] == right).double())
    return found


def without_unknown(weights, features: Features) -> Features:
    """Ids outside a table, which contribute nothing, as padding."""
    features = features.as_rows()
    ids = [
        i.where((i >= 0) & (i < weights[t].size(0)), p)
        for i, t, p in zip(features.indices, features.tables, features.padding_idx)
    ]
    return features._replace(indices=ids)


def expected(weights, features, grad_outs, concat, given, way, states, hyper, live) -> Sequence[Tensor]:
    features, n = without_unknown(weights, features), len(weights)
    leaves = [*(w.requires_grad_() for w in weights), *(w.requires_grad_() for w in features.per_sample_weights)]
    parts = _looked_up(weights, features, False)
    outs = [torch.cat(parts, 1)] if concat else parts
    used, pairs = features.tables_of(grad_outs), [(o, g) for o, g in zip(parts, grad_outs) if g is not None]
    results, of_results = zip(*((o, g) for o, g in pairs if o.requires_grad))
    grads = torch.autograd.grad(results, leaves, of_results, allow_unused=True, materialize_grads=True)
    grads, factor_grads = grads[:n], [g.detach() for g in grads[n:]]
    if way == "dense":
        return *outs, *(g for t, g in enumerate(grads) if t in used and g.numel()), *factor_grads
    rows = [rows_looked_up(features, grad_outs, t) for t in range(n)]
    if way == "sparse":
        values = [g[r] for t, (g, r) in enumerate(zip(grads, rows)) if t in used]
        return *outs, *(r.double() for r in rows), *(v for v in values if v.numel()), *factor_grads
    weights, states, live = ([t.detach().clone() for t in tensors] for tensors in (weights, states, live))
    for t in used:
        step(way, weights[t], of_tables(states, t, n), grads[t], rows[t], of_tables(hyper, t, n), of_tables(live, t, n))
    right = [torch.ones_like(w) for w in weights] if hyper[ROUNDING] else []
    return *outs, *weights, *states, *live, *factor_grads, *right


def rows_looked_up(features: Features, grad_outs, t: int) -> Tensor:
    """The distinct rows of table t that get a gradient."""
    ids = [torch.empty(0, dtype=torch.int64)]
    for f, grad in enumerate(grad_outs):
        if features.tables[f] == t and grad is not None:
            padding = features.padding_idx[f] if features.mode(f) != "none" else -1
            i = features.indices[f].flatten().long()
            ids.append(i[(i != padding) & (i != features.frozen_rows[t])])
    return torch.cat(ids).unique()


def step(way, weight, states, grad, rows, hyper, live) -> None:
    """The reference's step, in place."""
    now = settings(way, hyper)
    if len(live):
        count, lr, scale, skip = live
        if skip:
            return
        now |= {"lr": float(lr), "step": float(count.add_(1)), "grad_factor": 1 / float(scale)}
    weight[rows], stepped = reference.optimizer_step(way, weight[rows], grad[rows], [s[rows] for s in states], **now)
    for old, new in zip(states, stepped):
        old[rows] = new


def config(rows, dims, tables, modes, B, L=3, **options) -> dict:
    return {"rows": rows, "dims": dims, "tables": tables, "modes": modes, "B": B, "L": L, **options}


ONE = [9], [16], [0]
TWO = [7, 40], [24, 10], [0, 1, 0]
ALIKE = [7, 40, 3], [16, 16, 16], [0, 1, 2, 1]  # tables of one launch
HOT = [1, 2, 300], [16, 3, 130], [0, 1, 2, 0]

BAG = Interpreted(
    module="embedding_bag",
    huge=[embedding_bag_case([2**25], [100], [0, 0], ["max", "mean"], B=2**20, L=3, weighted=True)],
    make=make,
    launch=launch,
    expected=expected,
    forward=forward,
    configs=[
        config(*TWO, ["none", "sum", "mean"], 9, deep=True),
        config(*TWO, ["sum", "mean", "none"], 9, concat=True, narrow=True, padding=1),
        config(*TWO, ["mean", "sum", "max"], 19, jagged=True, weighted=True, padding=2, L=5, ties=True),
        config(*HOT, ["sum", "none", "mean", "max"], 40, L=4),  # runs that cross many tiles
        config(*TWO, ["sum", "max", "mean"], 9, padding=0, outside=True, gap=3, left_out=True),
        config(*TWO, ["sum", "mean", "max"], 33, way="sparse", weighted=True, narrow=True),
        config(*HOT, ["sum", "none", "mean", "max"], 40, L=4, way="sparse", padding=0),
        config(*TWO, ["sum", "none", "mean"], 9, known="hash", padding=1, L=20),
        config(*TWO, ["sum", "none", "max"], 9, known="row"),
        config(*ONE, ["sum"], 40, way="sgd", clips=True),
        config(*ALIKE, ["sum", "none", "mean", "sum"], 33, way="adagrad", concat=True),
        config(*HOT, ["sum", "none", "mean", "none"], 40, way="rowwise_adagrad", clips=True),
        config(*HOT, ["sum", "none", "mean", "none"], 40, way="adam", padding=0, live=True),
        config(*ALIKE, ["sum", "none", "mean", "max"], 9, way="sparse"),
        config(*TWO, ["sum", "mean", "sum"], 33, way="adamw", live=True, left_out=True, weighted=True),
        config(*TWO, ["sum", "none", "max"], 33, way="ftrl", gap=1),
        config(*ONE, ["sum"], 33, way="ftrl", lr_power=-0.3),
        config(*TWO, ["sum", "none", "mean"], 33, way="rowwise_adam", live=True),
        config(*TWO, ["sum", "none", "mean"], 33, way="rowwise_rmsprop"),
        config(*ONE, ["sum"], 33, way="adam", live=True, skips=1),
        config(*ONE, ["none"], 7, way="rowwise_adagrad", given=True, clips=True),
        config(*ONE, ["sum"], 40, way="sgd", rounds=True),
        config(*HOT, ["sum", "none", "mean", "none"], 40, way="adam", rounds=True, live=True),
        config([70], [4], [0], ["none"], 66, way="adagrad", given=True, rounds=True),
        config([9], [2], [0], ["sum"], 9, way="ftrl", rounds=True),
        config([70], [130], [0], ["none"], 66, way="adamw", given=True, live=True),
        config([5] * 45, [4] * 45, [*range(45)], ["sum", "none", "mean"] * 15, 3),  # more than a launch brings along
        config(*TWO, ["sum", "mean", "sum"], 0),
        config(*TWO, ["sum", "mean", "max"], 3, L=0, way="sparse"),
        *({"seed": seed, "slow": True} for seed in range(40)),
    ],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    mutations=[
        ("padding: looked up", "& (row < rows) & (row != padding)", "& (row < rows)"),
        ("outside: the row behind the last", "(row < rows) & (row != padding)", "(row <= rows) & (row != padding)"),
        ("a block of the feature before", "tl.sum(((first <= index)", "tl.sum(((first < index)"),
        (
            "forward: a mean of padding, too",
            "count += keep.to(tl.int32)\n    total",
            "count += (p < end).to(tl.int32)\n    total",
        ),
        (
            "forward: a maximum with zero",
            'tl.where(mode == MODE_MAX, float("-inf"), total)',
            "tl.where(mode == MODE_MAX, 0.0, total)",
        ),
        ("forward: an empty maximum", "tl.where((count > 0)[:, None], total, 0.0)", "total"),
        ("forward: rows side by side", "b.to(tl.int64) * out_stride", "b.to(tl.int64) * D"),
        ("weighted: by the first factor", "factors_ptr + p,", "factors_ptr + 0 * p,"),
        (
            "jagged: the last bag without an end",
            "tl.minimum(tl.maximum(last, first), count), count)",
            "tl.minimum(tl.maximum(last, first), count), first)",
        ),
        ("known: padding hit by a hash", "row += ((hidden >= 0) & (row >= hidden)).to(tl.int64)", "row += 0"),
        (
            "known: a hash for the last row",
            "tl.where(unknown == 1, size - 1, row)",
            "tl.where(unknown == 3, size - 1, row)",
        ),
        ("numbers: one too few", "mask=k < n)", "mask=k < n - 1)"),
        (
            "sources: of the frozen row",
            "tl.where(keep & (row != frozen), key + row, skipped)",
            "tl.where(keep, key + row, skipped)",
        ),
        ("sources: of the first table", "key + row, skipped", "row, skipped"),
        ("sources: a mean's factor left out", "scale /= tl.maximum(count, 1).to(ACC)", "scale /= 1.0"),
        (
            "sources: a maximum's by bag",
            "tl.where(by_lookup != 0, p, b[:, None])",
            "tl.where(by_lookup != 1, p, b[:, None])",
        ),
        ("ties: the last maximum", "(x > largest) | ((x != x)", "(x >= largest) | ((x != x)"),
        (
            "ties: all before the maximum",
            "tl.where(first == p[:, None], grad, 0.0)",
            "tl.where(first >= p[:, None], grad, 0.0)",
        ),
        (
            "weighted: a factor's gradient without the mean",
            "tl.sum(grad * x, 1) / count.to(ACC)",
            "tl.sum(grad * x, 1)",
        ),
        ("reduce: runs end with their tile", "whole = starts & (after != key)", "whole = starts"),
        ("reduce: pieces begin with their run", "mine &= starts | (p % TILE == 0)", "mine &= starts"),
        ("reduce: one carry a tile", "2 * (p // TILE) + starts.to(tl.int64)", "2 * (p // TILE)"),
        ("reduce: the first lookup again and again", "tl.load(order_ptr + p + k,", "tl.load(order_ptr + p,"),
        ("weighted: factors in the order of keys", "tl.load(scales_ptr + i,", "tl.load(scales_ptr + p,"),
        ("reduce: a table too early", "(middle < n) & (first <= keys)", "(middle < n) & (first < keys)"),
        ("join: the first tile alone", "same = (key_there == key) | (part == 0)", "same = part == 0"),
        ("join: runs that began before", "if goes_on & (began_before == 0):", "if goes_on:"),
        (
            "sparse: a row later",
            "tl.load(ranks_ptr + position, mask=done, other=0) - 1",
            "tl.load(ranks_ptr + position, mask=done, other=0)",
        ),
        (
            "adagrad: every table at the first one's rate",
            "T_SETTINGS * n + t, mask=done, other=0) * SETTINGS",
            "T_SETTINGS * n + t, mask=done, other=0) * 0",
        ),
        ("clips: what is short", "norm <= max_norm, 1.0", "norm >= max_norm, 1.0"),
        ("clips: nothing", "1.0, max_norm / norm)", "1.0, 1.0)"),
        (
            "skips: never",
            "done &= tl.load(settings_ptr + SKIPS) == 0.0",
            "done &= tl.load(settings_ptr + SKIPS) >= 0.0",
        ),
        ("rounds: to the nearest", "inside & (key != 0)[:, None]", "inside & (key == 0)[:, None]"),
        ("rounds: rows alike", "zeros + low, zeros + high", "zeros, zeros + high"),
        ("rounds: steps alike", "zeros + of_step", "zeros"),
        ("rounds: eight columns alike", "bits = tl.interleave(bits, words >> 16)", "bits = tl.interleave(bits, bits)"),
        (
            "rounds: words out of order",
            "tl.interleave(w0, w2), tl.interleave(w1, w3)",
            "tl.interleave(w0, w1), tl.interleave(w2, w3)",
        ),
        ("skips: counted", "mask=skips == 0)", "mask=count > 0)"),
        ("live: adamw's size for adam", "lr * root / correction if ROOT", "lr / correction if ROOT"),
        (
            "live: the gradients' scale left out",
            "tl.where(o == GRAD_FACTOR, 1.0 / scale,",
            "tl.where(o == GRAD_FACTOR, scale,",
        ),
        ("adam: without decay", "if KIND <= ADAM:", "if KIND < ADAM:"),
        ("rowwise_adam: without decay", "elif KIND == ADAMW or KIND == ROWWISE_ADAM:", "elif KIND == ADAMW:"),
        ("adam: the first moment", "* (g - m)", "* (g + m)"),
        ("adam: the second moment", "v += rate * (g * g - v)", "v += rate * (g - v)"),
        ("rowwise_adam: a sum for a mean", "(tl.sum(g * g, 1) / D)[:, None] - v", "tl.sum(g * g, 1)[:, None] - v"),
        (
            "rowwise_adagrad: a sum for a mean",
            "mean = (tl.sum(g * g, 1) / D)[:, None]",
            "mean = tl.sum(g * g, 1)[:, None]",
        ),
        (
            "adagrad: the state lost",
            "tl.store(state_ptr, s, mask=inside",
            "tl.store(state_ptr, s - g * g, mask=inside",
        ),
        ("rowwise_rmsprop: a decay from the first step on", "tl.where(last == 0.0, 1.0, count - last)", "count - last"),
        ("rowwise_rmsprop: a decay without end", "tl.minimum(decay, setting(settings_ptr, OWN1, ACC))", "decay"),
        ("ftrl: without its sign", "tl.where(z > 0, z - l1, z + l1)", "z - l1"),
        ("ftrl: never zero", "tl.where(tl.maximum(z, -z) <= l1, 0.0, w)", "w"),
        ("lr_power: always a root", "return tl.where(power == 0.5, tl.sqrt(x), other)", "return tl.sqrt(x)"),
    ],
)
