"""Embedding lookups: embedding_bag and its backwards and updates, valid and with one argument wrong."""

from __future__ import annotations

import torch
from draw import Draw, Finding, check_close, check_unchanged, snapshot, tensors_of
from torch import Tensor

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops._features import MODES, NO_UNKNOWN, Features, Known
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, settings, state_shapes
from rankkernels.testing import TOLERANCE, relative_error

ops = torch.ops.rankkernels
NUMBERS = ("tables", "modes", "padding_idx", "frozen_rows", "known")
FEATURES = ("indices", "offsets", "per_sample_weights", *NUMBERS)


def table(draw: Draw, rows: int, width: int, dtype: torch.dtype, overlap: bool) -> Tensor:
    return draw.strided(draw.normal((rows, width), dtype), overlap)


def features(draw: Draw, concat: bool, overlap: bool = True, fm: bool = False, unknown: float = 0) -> dict:
    """``weights`` and the features of the schema, for ``fm`` of one width and dtype."""
    T, F = draw.randint(1, 4), draw.randint(1, 5)
    dtypes = [draw.dtype()] * T if fm or concat or draw.chance(0.6) else [draw.dtype() for _ in range(T)]
    widths = [draw.width()] * T if fm or draw.chance(0.3) else [draw.width() for _ in range(T)]
    rows = [max(draw.size(), 1) for _ in range(T)]
    weights = [table(draw, r, d, t, overlap) for r, d, t in zip(rows, widths, dtypes)]
    a = {k: [] for k in FEATURES}
    B = draw.size(draw.choice((30, 300, 1200)))
    bags = [B if concat or draw.chance(0.5) else draw.size() for _ in range(F)]
    for f in range(F):
        t = f if f < T and draw.chance(0.7) else draw.randrange(T)
        mode = draw.choice(MODES)
        jagged = mode != "none" and draw.chance(0.4)
        offsets = factors = torch.empty(0, dtype=dtypes[0])
        if mode == "none":
            free = [(), (bags[f], 3), (2, draw.size(20), 2), (draw.size(20), 0)]
            shape = (bags[f],) if concat or draw.chance(0.7) else draw.choice(free)
        elif jagged:
            counts = torch.randint(0, draw.choice((1, 3, 40)), (bags[f],), generator=draw.generator)
            shape = (int(counts.sum()),)
            offsets = (counts.cumsum(0) - counts).to(draw.choice((torch.int64, torch.int32)))
        else:
            shape = (bags[f], draw.size(12))
        ids = draw.ids(rows[t], shape)
        if mode in ("sum", "mean") and draw.chance(0.3):
            factors = draw.strided(draw.normal(ids.shape, dtypes[t]))
        known = Known(draw.choice((0, 1, 2)), draw.randint(1, rows[t]), -1) if draw.chance(unknown) else NO_UNKNOWN
        if known.unknown and ids.numel():
            if known.size > 1 and draw.chance(0.5):
                known = known._replace(padding_idx=draw.randrange(known.size))
            away = torch.rand(ids.shape, generator=draw.generator) < 0.3
            ids = torch.where(away, draw.choice((-1, known.size, 2**31 - 1, -(2**31))), ids.clone()).to(ids.dtype)
        a["known"] += known
        a["indices"].append(ids)
        a["offsets"].append(offsets)
        a["per_sample_weights"].append(factors)
        a["tables"].append(t)
        a["modes"].append(MODES.index(mode))
        a["padding_idx"].append(draw.randrange(rows[t]) if draw.chance(0.3) else -1)
    for key in ("offsets", "per_sample_weights"):
        if all(t.shape == (0,) for t in a[key]) and draw.chance(0.8):
            if key != "offsets" or not any(ids.dim() == 1 and m for ids, m in zip(a["indices"], a["modes"])):
                a[key] = []
    if not any(a["known"][:: len(Known._fields)]):
        a["known"] = []
    a["frozen_rows"] = [draw.randrange(r) if draw.chance(0.3) else -1 for r in rows]
    return {"weights": weights, **a}


def names_of(a: dict) -> str:
    return "\n".join(f"feature_{f}" for f in range(len(a["indices"])))


def rows_of(a: dict) -> list[Tensor]:
    """The rows that the ids look up."""
    return Features(**{key: a[key] for key in FEATURES}).as_rows().indices


def call(op: str, arguments: dict):
    return getattr(ops, op).default(**arguments)


def reference_outs(a: dict, weights: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """The lookups in float64, differentiable in ``weights`` and ``factors``."""
    outs = []
    frozen = []
    for w, row in zip(weights, a["frozen_rows"]):
        keep = torch.ones(w.size(0), 1, dtype=w.dtype)
        if row >= 0:
            keep[row] = 0
        frozen.append(w * keep + (w * (1 - keep)).detach())
    for f, ids in enumerate(rows_of(a)):
        w, mode, ids = frozen[a["tables"][f]], MODES[a["modes"][f]], ids.long()
        if mode == "none":
            outs.append(w[ids])
            continue
        offsets = a["offsets"][f].long() if ids.dim() == 1 else None
        psw = factors[f] if factors and factors[f].shape == ids.shape and ids.numel() else None
        padding = a["padding_idx"][f]
        outs.append(reference.embedding_bag(w, ids, offsets, mode, psw, None if padding < 0 else padding))
    return outs


def grads_for(draw: Draw, a: dict) -> list[Tensor | None]:
    """A gradient for each feature's result, or None; at least one is given."""
    grads = []
    for f, ids in enumerate(a["indices"]):
        w = a["weights"][a["tables"][f]]
        pooled = a["modes"][f] != 0
        bags = a["offsets"][f] if pooled and ids.dim() == 1 else ids
        shape = (*(bags.shape[:1] if pooled else ids.shape), w.size(1))
        grads.append(draw.strided(draw.normal(shape, w.dtype), overlap=True))
    given = draw.randrange(len(grads))
    return [None if f != given and draw.chance(0.15) else g for f, g in enumerate(grads)]


def reference_grads(a: dict, grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Of the tables, and of the per-sample weights."""
    weights = [w.detach().double().requires_grad_() for w in a["weights"]]
    factors = [w.detach().double().requires_grad_() for w in a["per_sample_weights"]]
    outs = reference_outs(a, weights, factors)
    pairs = [(o, g.double()) for o, g in zip(outs, grads) if g is not None and o.requires_grad]
    inputs = weights + factors
    found = [None] * len(inputs)
    if pairs:
        outs, grad_outs = zip(*pairs)
        found = torch.autograd.grad(outs, inputs, grad_outs, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]
    return found[: len(weights)], found[len(weights) :]


def size_of_terms(a: dict, grads: list[Tensor | None]) -> list[float]:
    """For each table the norm of what its gradient sums, were nothing to cancel."""
    sizes = [0.0] * len(a["weights"])
    for f, g in enumerate(grads):
        if g is not None and g.numel():
            sizes[a["tables"][f]] += g.double().norm().item()
    return sizes


def valid(draw: Draw) -> None:
    concat = draw.chance(0.3)
    a = features(draw, concat, unknown=0.2)
    before = snapshot(tensors_of(a))
    forward = {**a, "names": names_of(a), "concat": concat, "sparse": draw.chance(0.5)}
    outs = call("embedding_bag", forward)
    doubles = [w.double() for w in a["weights"]]
    expected = reference_outs(a, doubles, [w.double() for w in a["per_sample_weights"]])
    if concat:
        outs = list(outs[0].split([e.size(-1) for e in expected], 1))
    for f, (out, right) in enumerate(zip(outs, expected)):
        w = a["weights"][a["tables"][f]]
        check_close(f"embedding_bag, feature {f}", out, right, w.dtype, 0.1 * w.double().norm().item())
    grads = grads_for(draw, a)
    check_unchanged(before, "embedding_bag")
    draw.choice((dense, sparse, autograd, update))(draw, a, grads)
    check_unchanged(before, "a backward of embedding_bag")


def backward_arguments(a: dict, grads) -> dict:
    needs = any(MODES[m] == "max" for m in a["modes"]) or any(w.numel() for w in a["per_sample_weights"])
    rows = [w.size(0) for w in a["weights"]]
    return {**a, "grad_outs": grads, "weights": a["weights"] if needs else [], "rows": rows}


def compare_grads(op: str, a: dict, grads, found: list[Tensor | None], found_psw: list[Tensor]) -> None:
    expected, expected_psw = reference_grads(a, grads)
    floors = size_of_terms(a, grads)
    used = {a["tables"][f] for f, g in enumerate(grads) if g is not None}
    for t, right in enumerate(expected):
        if t in used:
            check_close(f"{op}, table {t}", found[t], right, a["weights"][t].dtype, 0.1 * floors[t])
    for f, right in enumerate(expected_psw):
        w = a["weights"][a["tables"][f]]
        floor = 0 if grads[f] is None else 0.1 * grads[f].double().norm().item()
        if grads[f] is not None or right.numel():
            check_close(f"{op}, factors {f}", found_psw[f], right, found_psw[f].dtype if not right.numel() else w.dtype,
                        floor)  # fmt: skip


def dense(draw: Draw, a: dict, grads) -> None:
    found, psw = call("embedding_bag_backward", backward_arguments(a, grads))
    compare_grads("embedding_bag_backward", a, grads, found, psw)


def as_dense(a: dict, rows, values) -> list[Tensor]:
    found = []
    for t, w in enumerate(a["weights"]):
        if values[t].numel() and not bool((rows[t].diff() > 0).all()):
            raise Finding(f"embedding_bag_backward_sparse: the rows of table {t} do not ascend")
        zeros = torch.zeros(w.shape, dtype=w.dtype)
        # Of a table without a gradient the op knows neither width nor dtype.
        found.append(zeros.index_copy(0, rows[t], values[t]) if values[t].numel() else zeros)
    return found


def sparse(draw: Draw, a: dict, grads) -> None:
    rows, values, psw = call("embedding_bag_backward_sparse", backward_arguments(a, grads))
    compare_grads("embedding_bag_backward_sparse", a, grads, as_dense(a, rows, values), psw)


def autograd(draw: Draw, a: dict, grads) -> None:
    """Through the public function and autograd."""
    weights = [w.detach().requires_grad_() for w in a["weights"]]
    factors = [w.detach().requires_grad_() for w in a["per_sample_weights"]]

    def given(values):
        return [None if t.shape == (0,) and a["indices"][f].shape != (0,) else t for f, t in enumerate(values)] or None

    is_sparse = draw.chance(0.5)
    outs = rk.table_batched_embedding_bag(
        weights, rows_of(a), modes=[MODES[m] for m in a["modes"]], tables=a["tables"], offsets=given(a["offsets"]),
        per_sample_weights=given(factors), padding_idx=[None if p < 0 else p for p in a["padding_idx"]],
        frozen_rows=[None if r < 0 else r for r in a["frozen_rows"]], sparse=is_sparse,
    )  # fmt: skip
    pairs = [(o, g) for o, g in zip(outs, grads) if g is not None]
    outs, grad_outs = zip(*pairs)
    found = torch.autograd.grad(outs, weights + factors, grad_outs, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(found, weights + factors)]
    compare_grads("the gradient of embedding_bag", a, grads, found[: len(weights)], found[len(weights) :])


# ---- updates


def own_memory(draw: Draw, w: Tensor) -> Tensor:
    """A table that a step may write to: rows of elements side by side that do not overlap."""
    if draw.chance(0.5):
        return w.contiguous().clone()
    wide = w.new_zeros((w.size(0), w.size(1) + 5))
    wide[:, : w.size(1)] = w
    return wide[:, : w.size(1)]


def states_for(draw: Draw, kind: str, w: Tensor) -> list[Tensor]:
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    states = [draw.normal(shape, dtype).abs() for shape in state_shapes(kind, w.shape)]
    if RULES[kind].elementwise == 2 and draw.chance(0.5):  # side by side, as rankkernels.optim makes them
        both = torch.stack(states, 1)
        states = [both[:, 0], both[:, 1]]
    return states


OWN = {"lr_power": (-0.5, -0.5, -0.3), "beta": (1.0, 0.1), "l1": (0.0, 0.3), "l2": (0.0, 0.1), "ar_alpha": (0.0, 1.5),
       "min_shrinkage": (0.0, 0.1)}  # fmt: skip


def hyper_for(draw: Draw, kind: str) -> list[float]:
    max_norm = draw.choice((0.0, 0.0, 0.5))
    return [
        0.1,
        0.8,
        0.9,
        1e-2,
        draw.choice((0.0, 0.01)),
        float(draw.randint(1, 50)),
        draw.choice((1.0, 0.5)),
        max_norm,
        draw.choice((0.0, float(3 << 32 | 7))),
        *(draw.choice(OWN[name]) for name in RULES[kind].settings),
    ]


def touched_rows(a: dict, grads, t: int) -> Tensor:
    ids = [torch.empty(0, dtype=torch.int64)]
    for f, g in enumerate(grads):
        if g is None or a["tables"][f] != t:
            continue
        i = rows_of(a)[f].flatten().long()
        padding = a["padding_idx"][f] if a["modes"][f] else -1
        ids.append(i[(i != padding) & (i != a["frozen_rows"][t])])
    return torch.cat(ids).unique()


def check_step(op: str, kind: str, hyper, old: tuple, new: tuple, rows: Tensor, grad: Tensor, floor: float) -> None:
    """``old`` and ``new``: a table and its states before and after a step on ``rows``."""
    (w, states), (w_new, states_new) = old, new
    right, right_states = w.double(), [s.double() for s in states]
    state = [s[rows] for s in right_states]
    stepped, stepped_states = reference.optimizer_step(
        kind, right[rows], grad.double()[rows], state, **settings(kind, hyper)
    )
    right[rows] = stepped
    check_close(f"{op}, {kind}", w_new, right, w.dtype, floor)
    if w.size(1) == 0:
        return  # row-wise Adagrad's mean of no values
    for s, new_rows, s_new in zip(right_states, stepped_states, states_new):
        s[rows] = new_rows
        error = relative_error(s_new, s, floor)  # as the gradient's, which is rounded before the step
        if not error < TOLERANCE[w.dtype]:
            raise Finding(f"{op}, {kind}, state: relative error {error:.2e} in {w.dtype} {list(w.shape)}")


def update(draw: Draw, a: dict, grads) -> None:
    kind = draw.choice(OPTIMIZERS)
    a["weights"] = [own_memory(draw, w) for w in a["weights"]]
    states = [states_for(draw, kind, w) for w in a["weights"]]
    hyper = [hyper_for(draw, kind) for _ in a["weights"]]
    expected, expected_psw = reference_grads(a, grads)
    old = [(w.clone(), [s.clone() for s in each]) for w, each in zip(a["weights"], states)]
    arguments = {**a, "grad_outs": grads, "states": sum(states, []), "optimizer": OPTIMIZERS.index(kind)}
    call("embedding_bag_update", {**arguments, "hyper": sum(hyper, [])})
    floors = size_of_terms(a, grads)
    for t, w in enumerate(a["weights"]):
        rows = touched_rows(a, grads, t)
        floor = max(1.0, 0.1 * floors[t])
        check_step("embedding_bag_update", kind, hyper[t], old[t], (w, states[t]), rows, expected[t], floor)


def sparse_update(draw: Draw) -> None:
    kind, dtype = draw.choice(OPTIMIZERS), draw.dtype()
    w = own_memory(draw, draw.normal((max(draw.size(), 1), draw.width()), dtype))
    states, hyper = states_for(draw, kind, w), hyper_for(draw, kind)
    rows = torch.nonzero(torch.rand(w.size(0), generator=draw.generator) < draw.choice((0.1, 0.5, 1)))[:, 0]
    values = draw.strided(draw.normal((rows.numel(), w.size(1)), dtype), overlap=True)
    old = w.clone(), [s.clone() for s in states]
    ops.sparse_update.default(w, states, rows, values, OPTIMIZERS.index(kind), hyper)
    grad = torch.zeros(w.shape, dtype=torch.float64).index_copy(0, rows, values.double())
    check_step("sparse_update", kind, hyper, old, (w, states), rows, grad, 1.0)
