"""Exact Adam in Triton under the interpreter, against dense Adam's steps taken one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases import embedding_bag
from gpu.cases.base import BF16, DOUBLE, HALF, ROUNDED_ONCE, SINGLE, Interpreted
from torch import Tensor

from bench.gpu.cases import embedding_bag_exact_case
from rankkernels._triton.embedding_bag import embedding_bag as look_up
from rankkernels.ops._features import MODES, Features
from rankkernels.ops._idle_steps import new_history
from rankkernels.ops.embedding_bag import _looked_up

BASE = 3  # the step at which histories begin


def drawn(seed: int) -> dict:
    """A random config."""
    draw, config = random.Random(seed), embedding_bag.drawn(seed)
    return config | {
        "way": draw.choice(["look_up", "catch_up", "step"]), "steps": draw.choice([1, 9, 30]), "weighted": False,
        "modes": [draw.choice(["none", "sum", "mean"]) for _ in config["tables"]], "decays": draw.choice([0.0, 0.3]),
    }  # fmt: skip


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: as embedding_bag's, with the ``steps`` of a history, whose rates go up and down, to zero, too, and
    whose ``decays`` are the largest of its weight decays; ``apart``: each table has its own. ``unfrozen``: rows of
    padding, too, have gradients by lookups that do not leave them out. ``single``: one id, without a dimension, is
    looked up where there is no bag."""
    config = drawn(config["seed"]) if "seed" in config else config
    bags = embedding_bag.make(config | {"way": "dense"}, dtype)
    weights, features, n = bags["weights"], bags["features"], len(bags["weights"])
    if config.get("unfrozen"):
        features = features._replace(frozen_rows=[-1] * n)
    if config.get("single"):
        indices = [
            i.flatten()[0] if mode == MODES.index("none") else i for i, mode in zip(features.indices, features.modes)
        ]
        features = features._replace(indices=indices)
    if config.get("mixed"):
        weights[1] = weights[1].double()
    last_step, betas, eps = BASE + config["steps"], config.get("betas", (0.9, 0.999)), config.get("eps", 1e-4)
    states, last_steps, histories = [], [], []
    for t, w in enumerate(weights):
        last = torch.randint(-last_step, last_step + 1, w.shape[:1], dtype=torch.int32)
        last[last > 0] = last[last > 0].clamp(min=BASE)
        wide, stepped = DOUBLE if w.dtype == DOUBLE else SINGLE, (last > 0)[:, None]
        root = eps * 10 ** torch.empty(w.shape, dtype=wide).uniform_(-3, 3) * stepped  # far below eps to far above
        states += [(root * torch.randn(w.shape)).to(wide), root**2]
        last_steps.append(last)
        rates = [0.1 * (s % 3) / (1 + config.get("apart", 0) * t) for s in range(config["steps"])]
        histories.append([(lr, config.get("decays", 0.0) * (s % 2)) for s, lr in enumerate(rates)])
    grad_outs = [None if g is None else g.to(weights[t].dtype)
                 for g, t in zip(bags["grad_outs"], features.tables)]  # fmt: skip
    return {
        "weights": weights, "states": states, "last_steps": last_steps, "histories": histories, "betas": betas,
        "eps": eps, "features": features, "grad_outs": grad_outs, "concat": bags["concat"],
        "way": config["way"], "max_norm": 0.4 if config.get("clips") else 0.0, "tables": n,
        "own_history": config.get("own_history", False),
    }  # fmt: skip


def taken(module: ModuleType, histories, betas, eps, own_history) -> tuple[list[Tensor], list[float]]:
    """Histories of these steps, those of equal ones shared, and their clocks."""
    found: dict[tuple, tuple] = {}
    for steps in map(tuple, histories):
        if steps in found:
            continue
        history, decay = new_history(len(steps) + 2, *betas), 1.0
        for s, (lr, weight_decay) in enumerate(steps, BASE + 1):
            after = decay * (1 - lr * weight_decay)
            add = module.adam_history if own_history else torch.ops.rankkernels.adam_history.default
            add(history, BASE, s, *betas, lr, decay, after)
            decay = after
        found[steps] = history, [float(BASE + len(steps)), float(BASE), decay, eps]
    each = [found[tuple(steps)] for steps in histories]
    return [history for history, _ in each], [number for _, clock in each for number in clock]


def launch(
    module: ModuleType, weights, states, last_steps, histories, betas, eps, features, grad_outs, concat, way, max_norm,
    tables, own_history,
) -> Sequence[Tensor]:  # fmt: skip
    histories, clocks = taken(module, histories, betas, eps, own_history)
    if way == "look_up":
        outs = module.embedding_bag_exact(
            weights, states, last_steps, histories, clocks, features=features, concat=concat
        )
    weights, states, last_steps = ([t.clone() for t in each] for each in (weights, states, last_steps))
    lists = weights, states, last_steps, histories, clocks
    if way == "all":
        module.embedding_catch_up_all(*lists)
        return *weights, *states, *map(Tensor.double, last_steps)
    if way == "step":
        hyper = [v for step in clocks[::4] for v in hyper_of(step + 1, betas, eps, max_norm)]
        assert module.embedding_bag_exact_update(grad_outs, *lists, features=features, hyper=hyper) == []
        return *weights, *states, *map(Tensor.double, last_steps)
    module.embedding_catch_up(*lists, features=features)
    if way == "look_up":
        return *outs, *(ours.eq(parts).double() for ours, parts in zip(outs, look_up(weights, features, concat)))
    marked = [last.clone() for last in last_steps]
    module.embedding_mark_steps(marked, features, [100 + t for t in range(tables)])
    return *weights, *states, *map(Tensor.double, [*last_steps, *marked])


def hyper_of(step: float, betas, eps: float, max_norm: float) -> list[float]:
    return [0.2, *betas, eps, 0.3, step, 0.5, max_norm, 0.0]


def replay(w: Tensor, m: Tensor, v: Tensor, last: Tensor, steps, betas, eps: float) -> None:
    """Dense AdamW's steps without a gradient."""
    beta1, beta2 = betas
    for s, (lr, weight_decay) in enumerate(steps, BASE + 1):
        behind = (last.abs() < s)[:, None]
        stepped = behind & (last > 0)[:, None]
        w.copy_(w.where(~behind, (1 - lr * weight_decay) * w))
        m.copy_(m.where(~stepped, beta1 * m))
        v.copy_(v.where(~stepped, beta2 * v))
        step = lr * m / (1 - beta1**s) / ((v / (1 - beta2**s)).sqrt() + eps)
        w.copy_(w.where(~stepped, w - step))


def looked_up_rows(features: Features, t: int, R: int) -> Tensor:
    """Those of table t, [R] bool."""
    ids = [i.flatten().long() for i, table in zip(features.as_rows().indices, features.tables) if table == t]
    rows = torch.zeros(R, dtype=torch.bool)
    rows[torch.cat([i[(i >= 0) & (i < R)] for i in ids] or [rows.new_empty(0).long()])] = True
    return rows


def gradients_of(weights, features: Features, grad_outs) -> Sequence[Tensor]:
    leaves = [w.clone().requires_grad_() for w in weights]
    pairs = [(o, g) for o, g in zip(_looked_up(leaves, features, False), grad_outs) if g is not None]
    results, grads = zip(*((o, g) for o, g in pairs if o.requires_grad))
    return torch.autograd.grad(results, leaves, grads, allow_unused=True, materialize_grads=True)


def expected(
    weights, states, last_steps, histories, betas, eps, features, grad_outs, concat, way, max_norm, tables, own_history
) -> Sequence[Tensor]:
    known, current, marked = embedding_bag.without_unknown(weights, features), [], []
    before = list(zip(weights, states[::2], states[1::2], last_steps))
    for of_table, steps in zip(before, histories):
        row = [t.clone() for t in of_table]
        replay(*row, steps, betas, eps)
        last, step, decays = row[3].clone(), BASE + len(steps), any(lr * decay for lr, decay in steps)
        row[3] = torch.where(last > 0, step, torch.where((last > -step) & decays, -step, last))
        current.append(row)
    if way == "look_up":
        parts = _looked_up([w for w, *_ in current], known, False)
        outs = [torch.cat(parts, 1)] if concat else parts
        return *outs, *map(torch.ones_like, outs)
    grads = gradients_of(weights, known, grad_outs) if way == "step" else ()
    for t, row in enumerate(current):
        rows = slice(None)
        if way == "step":
            rows, step = embedding_bag.rows_looked_up(known, grad_outs, t), BASE + len(histories[t]) + 1
            embedding_bag.step("adamw", row[0], row[1:3], grads[t], rows, hyper_of(step, betas, eps, max_norm), [])
            row[3][rows] = step
        elif way == "catch_up":
            rows = looked_up_rows(features, t, len(row[0]))
        current[t] = [t.clone() for t in before[t]]
        for old, new in zip(current[t], row):
            old[rows] = new[rows]
        if way == "catch_up":
            marked.append(current[t][3].clone())
            marked[t][embedding_bag.rows_looked_up(known, features.indices, t)] = 100 + t
    moments = [moment for _, m, v, _ in current for moment in (m, v)]
    return *(w for w, *_ in current), *moments, *(last.double() for last in (*(row[3] for row in current), *marked))


def config(rows, dims, tables, modes, B, way, steps, **options) -> dict:
    options = {"L": 3, **options}
    return {"rows": rows, "dims": dims, "tables": tables, "modes": modes, "B": B, "way": way, way: True,
            "steps": steps, **options}  # fmt: skip


TWO = [7, 40], [24, 10], [0, 1, 0]
ALIKE = [7, 40, 3], [16, 16, 16], [0, 1, 2, 1]  # tables of one launch
HOT = [1, 2, 300], [16, 3, 130], [0, 1, 2, 0]

EXACT = Interpreted(
    module="embedding_catch_up",
    huge=[embedding_bag_exact_case([2**25], 100, 2**20)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        config(*TWO, ["none", "sum", "mean"], 9, "look_up", 20, decays=0.3, padding=1, deep=True),
        config(*TWO, ["sum", "mean", "none"], 9, "catch_up", 20, own_history=True, decays=0.3, padding=1),
        config(*TWO, ["sum", "mean", "none"], 33, "step", 20, decays=0.3, padding=1, left_out=True),
        config(*ALIKE, ["sum", "none", "mean", "sum"], 33, "step", 12, apart=1, clips=True),
        config(*ALIKE, ["sum", "none", "mean", "sum"], 9, "look_up", 12, apart=1, concat=True, narrow=True),
        config(
            *ALIKE,
            ["sum", "none", "mean", "sum"],
            9,
            "catch_up",
            12,
            apart=1,
            jagged=True,
            decays=0.1,
            padding=1,
            unfrozen=True,
        ),
        config(*HOT, ["sum", "none", "mean", "none"], 40, "step", 5, mixed=True, decays=0.3),
        config(*HOT, ["sum", "none", "mean", "none"], 40, "catch_up", 5, mixed=True, narrow=True),
        config(*HOT, ["sum", "none", "mean", "none"], 40, "look_up", 5, mixed=True, jagged=True, padding=0),
        config(*TWO, ["sum", "none", "mean"], 9, "catch_up", 9, padding=0, outside=True, gap=3, deep=True),
        config(*TWO, ["sum", "sum", "mean"], 9, "look_up", 9, padding=0, outside=True, gap=3),
        config(*TWO, ["sum", "none", "mean"], 9, "step", 9, padding=0, outside=True, gap=3),
        config(*TWO, ["sum", "none", "mean"], 9, "look_up", 9, known="hash", padding=1),
        config(*TWO, ["sum", "none", "mean"], 9, "catch_up", 9, known="row", decays=0.3),
        config(*ALIKE, ["sum"] * 4, 1, "all", 20, own_history=True, decays=0.3, apart=1),
        config([300, 20], [16, 130], [0, 1], ["sum"] * 2, 1, "all", 700, eps=1e-8),  # steps far apart
        config([70], [4], [0], ["none"], 9, "all", 9, own_history=True, betas=(0.0, 0.9)),
        config([70], [4], [0], ["none"], 9, "all", 9, own_history=True, betas=(0.0, 0.0)),
        config([5] * 30, [4] * 30, [*range(30)], ["sum", "none", "mean"] * 10, 3, "step", 5, apart=1),
        config([5] * 30, [4] * 30, [*range(30)], ["sum", "none", "mean"] * 10, 3, "look_up", 5, apart=1),
        config(*TWO, ["none", "sum", "none"], 9, "catch_up", 9, single=True),
        config(*TWO, ["none", "sum", "none"], 9, "look_up", 9, single=True),
        config(*TWO, ["sum", "mean", "sum"], 0, "catch_up", 5),
        config(*TWO, ["sum", "mean", "sum"], 3, "step", 5, L=0),
        *({"seed": seed, "slow": True} for seed in range(20)),
    ],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    # Rows are rounded once they have caught up, and again by what follows.
    tolerance={dtype: 2 * tolerance for dtype, tolerance in ROUNDED_ONCE.items()},
    mutations=[
        ("look_up: rows as they are", "idle = keep & is_idle(last, clock_ptr)", "idle = keep & (last > last)"),
        ("look_up: a mean of padding, too", "count += keep.to(tl.int32)", "count += (p < end).to(tl.int32)"),
        (
            "look_up: a mean's sum",
            "tl.where(is_mean[:, None], total / tl.maximum(count, 1)[:, None].to(ACC), total)",
            "total",
        ),
        (
            "catch_up: every lookup of a row",
            "mine &= key != tl.load(keys_ptr + p - 1, mask=mine & (p > 0), other=-1).to(tl.int64)",
            "mine &= key >= 0",
        ),
        (
            "catch_up: the row behind the last",
            "row < tl.load(behind_ptr + I_ROWS * n + t)",
            "row <= tl.load(behind_ptr + I_ROWS * n + t)",
        ),
        (
            "unfrozen: padding marked",
            "padding >= 0 and features.mode(f)",
            "padding < 0 and features.mode(f)",
        ),
        ("catch_up: moments as they were", "m * keep1", "m"),
        ("catch_up: the first moment's power", "v * keep2", "v * keep1"),
        ("catch_up: rows without a gradient as if they had one", "tl.where(last > 0, step, -step)", "step"),
        (
            "catch_up: the frozen row left out",
            "[-1] * len(features.frozen_rows) if all_rows else features.frozen_rows",
            "features.frozen_rows",
        ),
        (
            "catch_up: the frozen row marked",
            "keep &= row != tl.load(described_ptr + FROZEN * n + i)",
            "keep &= row >= 0",
        ),
        (
            "catch_up: marked by the first feature's step",
            "tl.load(steps_ptr + tl.load(described_ptr + NUMBER * n + i))",
            "tl.load(steps_ptr)",
        ),
        ("all: every table from the first key on", "sum(self.rows[s] for s in of_tile[:i])", "0"),
        ("step: as of the clock's", "tl.store(last_ptr, step + 1, mask=mine)", "tl.store(last_ptr, step, mask=mine)"),
        ("step: idle rows alone", "step + 1, mask=mine)", "step + 1, mask=idle)"),
        (
            "decays: only with a gradient",
            "(-last < step) & (number_at(clock_ptr, C_DECAY) != 1.0)",
            "last != last",
        ),
        ("decays: from the first step on", "of_all / decay, 1.0)", "of_all, 1.0)"),
        ("decays: a row that is older than the history", "(tl.maximum(t, base) - base) * WIDTH", "(t - base) * WIDTH"),
        ("apart: the first table's clock", "tl.load(behind_ptr + I_CLOCK * n + t) * CLOCK", "0 * t"),
        ("steps: the powers of those before", "(step - t) * WIDTH", "(t - base) * WIDTH"),
        (
            "steps: four terms",
            "tl.where(largest >= 8, TERMS, tl.where(largest >= 6, 8, tl.where(largest >= 4, 6, 4)))",
            "4 + 0 * largest",
        ),
        ("steps: terms the other way", "j = most - 1 - k", "j = k"),
        ("steps: without eps", "z = (gx - eps) * inverse", "z = gx * inverse"),
        ("own_history: the last step alone", "before + tl.where(there, term, 0.0)", "tl.where(there, term, 0.0)"),
        ("own_history: terms that are not doubled", "term *= tau if j else tau + tau", "term *= tau"),
        ("own_history: the new entry's centre", "tl.where(is_new, of_bits(centre), g)", "g"),
    ],
)
