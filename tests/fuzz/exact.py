"""Adam and AdamW with exact=True against torch's dense ones, on every row."""

from __future__ import annotations

import copy
import io

import torch
from draw import Draw, Finding
from embedding import features, grads_for, reference_grads
from optimizers import looked_up
from torch import Tensor, nn

import rankkernels as rk
from rankkernels.testing import relative_error

KINDS = {"Adam": (rk.optim.Adam, torch.optim.Adam), "AdamW": (rk.optim.AdamW, torch.optim.AdamW)}


def other_ids(draw: Draw, a: dict) -> dict:
    """The same lookups of other ids."""
    rows = [a["weights"][t].size(0) for t in a["tables"]]
    return {**a, "indices": [draw.ids(r, i.shape) for r, i in zip(rows, a["indices"])]}


def check_table(what: str, found: Tensor, right: Tensor) -> None:
    error = relative_error(found, right, 1e-3)
    if found.shape != right.shape or not error < 1e-8:
        raise Finding(f"{what}: relative error {error:.2e} of {list(right.shape)}")


def check_all(what: str, optimizer, weights: list[Tensor], dense, tables: list[Tensor]) -> None:
    """Reads everything: afterwards no row lags behind."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for t, (w, right) in enumerate(zip(weights, tables)):
        check_table(f"{what}, table {t}", w.detach(), right)
        theirs = dense.state.get(right)
        if not theirs:
            continue
        if state[t]["step"] != int(theirs["step"]):
            raise Finding(f"{what}: step {state[t]['step']} of table {t}, expected {int(theirs['step'])}")
        for name in ("exp_avg", "exp_avg_sq"):
            check_table(f"{what}, {name} of table {t}", state[t][name], theirs[name])


def restarted(draw: Draw, kind: str, optimizer, weights: list[Tensor]) -> tuple:
    """Copies of the tables, and an optimizer of them from the state_dict, perhaps by way of a file."""
    state = optimizer.state_dict()
    if draw.chance(0.5):
        file = io.BytesIO()
        torch.save((state, [w.detach() for w in weights]), file)
        file.seek(0)
        state, copies = torch.load(file)
    else:
        copies = [w.detach().clone() for w in weights]
    weights = [nn.Parameter(w) for w in copies]
    fresh = KINDS[kind][0](weights, lr=0.5, exact=True)
    fresh.load_state_dict(state)
    return fresh, weights


def step(draw: Draw, a: dict, optimizer, weights: list[Tensor], dense, tables: list[Tensor], fused: bool) -> None:
    """One of both; a table without a gradient takes none."""
    a = {**other_ids(draw, a), "weights": weights}
    grads = grads_for(draw, a)
    used = {a["tables"][f] for f, g in enumerate(grads) if g is not None}
    right = reference_grads({**a, "weights": tables}, grads)[0]
    for t, w in enumerate(tables):
        w.grad = right[t] if t in used else None
    for w in weights:
        w.grad = None
    outs = looked_up(a, weights, not fused, optimizer if fused else None)
    torch.autograd.backward(*zip(*[(o, g) for o, g in zip(outs, grads) if g is not None]))
    optimizer.step()
    dense.step()


def valid(draw: Draw) -> None:
    """In float64: what rounding does to Adam's quotients in float32 has no bound."""
    kind, fused = draw.choice(list(KINDS)), draw.chance(0.6)
    a = features(draw, False, overlap=False)
    a["weights"] = [w.double().contiguous() for w in a["weights"]]
    a["per_sample_weights"] = [w.double() for w in a["per_sample_weights"]]
    tables = [nn.Parameter(w.clone()) for w in a["weights"]]
    weights = [nn.Parameter(w.clone()) for w in a["weights"]]
    options = {"lr": draw.choice((1e-3, 0.05)), "betas": draw.choice(((0.9, 0.999), (0.8, 0.99), (0.0, 0.9))),
               "eps": draw.choice((1e-8, 1e-3))}  # fmt: skip
    if kind == "AdamW":
        options["weight_decay"] = draw.choice((0.0, 0.1))
    elif draw.chance(0.5):
        options["weight_decay"] = 0.0
    ours, theirs = KINDS[kind]
    optimizer, dense = ours(weights, exact=True, **options), theirs(tables, **options)
    for _ in range(draw.randint(1, 6)):
        step(draw, a, optimizer, weights, dense, tables, fused)
        what = f"exact {kind}, {'fused' if fused else 'stepped'}"
        if draw.chance(0.1):
            optimizer.flush()
        if draw.chance(0.15):
            check_all(what, optimizer, weights, dense, tables)
        if draw.chance(0.15):
            optimizer, weights = restarted(draw, kind, optimizer, weights)
        if draw.chance(0.2):
            for each in (optimizer, dense):
                each.param_groups[0]["lr"] = 0.01
    check_all(what, optimizer, weights, dense, tables)
