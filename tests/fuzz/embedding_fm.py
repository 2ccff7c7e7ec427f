"""embedding_fm with its backwards and updates, valid and with one argument wrong."""

from __future__ import annotations

import torch
from draw import Draw, check_close, check_unchanged, snapshot, tensors_of
from embedding import (
    OPTIMIZERS,
    as_dense,
    call,
    check_step,
    features,
    hyper_for,
    names_of,
    own_memory,
    reference_outs,
    states_for,
    touched_rows,
)
from embedding_wrong import (
    FORWARD,
    OF_TABLES,
    TABLE_RANK,
    UPDATE,
    WRONG_FLOATS,
    NotHere,
    elsewhere,
    mixed_concat,
    refuse,
    reshaped,
    retyped,
    wrong_rows,
)
from torch import Tensor


def arguments(draw: Draw, unknown: float = 0) -> dict:
    a = features(draw, concat=True, fm=True, unknown=unknown)
    F, w = len(a["indices"]), a["weights"][0]
    B = outs_of(a)[0].size(0)
    linear = draw.normal((1, F * w.size(1)), w.dtype) if draw.chance(0.7) else None
    dense = draw.strided(draw.normal((B, draw.randint(1, 5)), w.dtype), overlap=True) if draw.chance(0.4) else None
    return {**a, "linear_weight": linear, "dense": dense}


def outs_of(a: dict) -> list[Tensor]:
    return reference_outs(a, [w.double() for w in a["weights"]], [w.double() for w in a["per_sample_weights"]])


def fm_of(x: Tensor, F: int) -> Tensor:
    fields = x.view(x.size(0), F, -1) if x.numel() else x.new_zeros((x.size(0), F, 1))
    return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1, keepdim=True)


def valid(draw: Draw) -> None:
    a = arguments(draw, unknown=0.2)
    F, w = len(a["indices"]), a["weights"][0]
    before = snapshot(tensors_of(a))
    embeddings, fm, linear = call("embedding_fm", {**a, "names": names_of(a), "sparse": draw.chance(0.5)})
    x = torch.cat(outs_of(a), 1)
    wide = x if a["dense"] is None else torch.cat([x, a["dense"].double()], 1)
    check_close("embedding_fm, embeddings", embeddings, wide, w.dtype, 0.1 * x.norm().item())
    terms = x.view(x.size(0), F, -1).abs().sum(1).square().sum(1).norm().item() if x.numel() else 0.0
    x = embeddings[:, : x.size(1)].double()  # what the op itself has rounded
    check_close("embedding_fm, fm", fm, fm_of(x, F), w.dtype, 0.1 * terms)
    if a["linear_weight"] is not None:
        right, scale = x @ a["linear_weight"].double().t(), x.norm().item() * a["linear_weight"].double().norm().item()
        check_close("embedding_fm, linear", linear, right, w.dtype, 0.1 * scale)
    check_unchanged(before, "embedding_fm")
    draw.choice((sparse, update, lookups))(draw, a, embeddings[:, : x.size(1)])
    if a.get("updated") is None:
        check_unchanged(before, "a backward of embedding_fm")


def gradients(draw: Draw, a: dict, embeddings: Tensor) -> dict:
    """Those of the three results, of which some are not given."""
    B, dtype = embeddings.size(0), embeddings.dtype
    shapes = {"grad_embeddings": embeddings.shape, "grad_fm": (B, 1), "grad_linear": (B, 1)}
    grads = {k: draw.strided(draw.normal(s, dtype), overlap=True) for k, s in shapes.items()}
    for k in draw.sample(list(grads), draw.randint(0, 2)):
        grads[k] = None
    if a["linear_weight"] is None:
        grads["grad_linear"] = None
    linear = a["linear_weight"]
    return {**grads, "embeddings": embeddings, "linear_weight": linear, "dim": a["weights"][0].size(1)}


def reference_lookups(grads: dict, F: int) -> tuple[Tensor, Tensor | None]:
    """The gradient of the embeddings and of the linear weights."""
    x = grads["embeddings"].double().detach().requires_grad_()
    linear = None if grads["linear_weight"] is None else grads["linear_weight"].double().requires_grad_()
    total = (x * 0).sum() + (0 if linear is None else (linear * 0).sum())
    if grads["grad_embeddings"] is not None:
        total = total + (x * grads["grad_embeddings"].double()).sum()
    if grads["grad_fm"] is not None:
        total = total + (fm_of(x, F) * grads["grad_fm"].double()).sum()
    if grads["grad_linear"] is not None:
        total = total + ((x @ linear.t()) * grads["grad_linear"].double()).sum()
    found = torch.autograd.grad(total, [x] if linear is None else [x, linear])
    return found[0], None if linear is None else found[1]


def scale_of(grads: dict, F: int) -> float:
    """The norm of the terms of a lookup's gradient."""
    x = grads["embeddings"].double()
    scale = 0.0 if grads["grad_embeddings"] is None else grads["grad_embeddings"].double().norm().item()
    if grads["grad_fm"] is not None and x.numel():
        s = x.view(x.size(0), F, -1).abs().sum(1, keepdim=True).expand(-1, F, -1).flatten(1)
        scale += (grads["grad_fm"].double() * s).norm().item()
    if grads["grad_linear"] is not None:
        scale += (grads["grad_linear"].double() @ grads["linear_weight"].double()).norm().item()
    return 0.1 * scale


def lookups(draw: Draw, a: dict, embeddings: Tensor) -> None:
    grads, F = gradients(draw, a, embeddings), len(a["indices"])
    grad, grad_linear = call("embedding_fm_backward", grads)
    right, right_linear = reference_lookups(grads, F)
    check_close("embedding_fm_backward", grad, right, embeddings.dtype, scale_of(grads, F))
    if right_linear is not None:
        floor = 0.1 * embeddings.double().norm().item() + scale_of(grads, F)
        check_close("embedding_fm_backward, linear", grad_linear, right_linear, embeddings.dtype, floor)


def reference_tables(a: dict, grad: Tensor) -> list[Tensor]:
    weights = [w.double().detach().requires_grad_() for w in a["weights"]]
    out = torch.cat(reference_outs(a, weights, [w.double() for w in a["per_sample_weights"]]), 1)
    if not out.requires_grad:
        return [torch.zeros_like(w) for w in weights]
    found = torch.autograd.grad(out, weights, grad, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights)]


def sparse(draw: Draw, a: dict, embeddings: Tensor) -> None:
    grads, F = gradients(draw, a, embeddings), len(a["indices"])
    features = {k: v for k, v in a.items() if k not in ("linear_weight", "dense")}
    rows = [w.size(0) for w in a["weights"]]
    found_rows, values, _, _ = call(
        "embedding_fm_backward_sparse", {**grads, **features, "rows": rows, "unchanged": draw.chance(0.7)}
    )
    right = reference_tables(a, reference_lookups(grads, F)[0])
    for t, (found, expected) in enumerate(zip(as_dense(a, found_rows, values), right)):
        if t in a["tables"]:
            floor = max(scale_of(grads, F), 0.1 * expected.norm().item())
            check_close(f"embedding_fm_backward_sparse, table {t}", found, expected, embeddings.dtype, floor)


def update(draw: Draw, a: dict, embeddings: Tensor) -> None:
    grads, F, kind = gradients(draw, a, embeddings), len(a["indices"]), draw.choice(OPTIMIZERS)
    a["weights"] = [own_memory(draw, w) for w in a["weights"]]
    a["updated"] = True
    states = [states_for(draw, kind, w) for w in a["weights"]]
    hyper = [hyper_for(draw, kind) for _ in a["weights"]]
    right = reference_tables(a, reference_lookups(grads, F)[0])
    old = [(w.clone(), [s.clone() for s in each]) for w, each in zip(a["weights"], states)]
    features = {k: v for k, v in a.items() if k not in ("linear_weight", "dense", "updated")}
    step = {"states": sum(states, []), "optimizer": OPTIMIZERS.index(kind), "hyper": sum(hyper, []), "unchanged": False}
    call("embedding_fm_update", {**grads, **features, **step})
    given = [embeddings] * F
    for t, w in enumerate(a["weights"]):
        floor = max(1.0, scale_of(grads, F))
        rows = touched_rows(a, given, t)
        check_step("embedding_fm_update", kind, hyper[t], old[t], (w, states[t]), rows, right[t], floor)


def one(key: str, change):
    """The mutation of a list, on an argument that is a tensor."""

    def run(draw: Draw, a: dict) -> None:
        if a[key] is None:
            raise NotHere
        a[key] = [a[key]]
        change(draw, a, key)
        a[key] = a[key][0]

    return run


def ways_for(*keys: str) -> dict:
    found = {}
    for key in keys:
        found[f"shape of {key}"] = one(key, reshaped)
        found[f"dtype of {key}"] = one(key, lambda d, a, k: retyped(d, a, k, WRONG_FLOATS))
        found[f"place of {key}"] = one(key, elsewhere)
    return found


def wrong_dim(draw: Draw, a: dict) -> None:
    a["dim"] = draw.choice([d for d in (-1, 0, a["dim"] + 1, 2**62, -(2**63)) if d != a["dim"]])


def wrong_width(draw: Draw, a: dict) -> None:
    t = draw.randrange(len(a["weights"]))
    if len(set(a["tables"])) < 2 or t not in a["tables"]:
        raise NotHere
    w = a["weights"][t]
    a["weights"] = [*a["weights"]]
    a["weights"][t] = torch.cat([w, w.new_zeros((w.size(0), 1))], 1)


def flat(way):
    """Linear weights are taken in any shape of so many values."""

    def run(draw: Draw, a: dict) -> None:
        n = None if a["linear_weight"] is None else a["linear_weight"].numel()
        way(draw, a)
        if a["linear_weight"].numel() == n:
            raise NotHere

    return run


def not_rows(way):
    """There may be any number of dense columns, none among them."""

    def run(draw: Draw, a: dict) -> None:
        before = a["dense"]
        way(draw, a)
        if a["dense"].dim() == 2 and a["dense"].size(0) == before.size(0):
            raise NotHere

    return run


def invalid(draw: Draw) -> str:
    a = arguments(draw)
    op = draw.choice(("embedding_fm", "embedding_fm_backward", "embedding_fm_backward_sparse", "embedding_fm_update"))
    if op == "embedding_fm":
        a |= {"names": names_of(a)}
        more = {**ways_for("dense", "linear_weight"), "width": wrong_width}
        more["shape of linear_weight"] = flat(more["shape of linear_weight"])
        more["shape of dense"] = not_rows(more["shape of dense"])
        a["concat"] = True
        way = {**FORWARD, **OF_TABLES, **TABLE_RANK, **more, "concat": mixed_concat}
        return refuse_without(draw, op, a, way, "concat")
    embeddings = torch.cat(outs_of(a), 1).to(a["weights"][0].dtype)
    grads = gradients(draw, a, embeddings)
    del a["dense"]
    more = {**ways_for("grad_embeddings", "grad_fm", "embeddings", "linear_weight"), "dim": wrong_dim}
    more["shape of linear_weight"] = flat(more["shape of linear_weight"])
    if op == "embedding_fm_backward":
        more.pop("shape of embeddings")  # with nothing beside it any shape is one, and any device
        more.pop("place of embeddings")
        return refuse(draw, op, grads, more)
    a |= grads | {"unchanged": draw.chance(0.5)}
    if op == "embedding_fm_backward_sparse":
        a["rows"] = [w.size(0) for w in a["weights"]]
        return refuse(draw, op, a, {**FORWARD, **more, "rows": wrong_rows})
    kind = draw.choice(OPTIMIZERS)
    a["weights"] = [own_memory(draw, w) for w in a["weights"]]
    a["states"] = sum((states_for(draw, kind, w) for w in a["weights"]), [])
    a |= {"optimizer": OPTIMIZERS.index(kind), "hyper": sum((hyper_for(draw, kind) for _ in a["weights"]), [])}
    step = {k: v for k, v in UPDATE.items() if k != "grads of another dtype"}
    return refuse(draw, op, a, {**FORWARD, **OF_TABLES, **TABLE_RANK, **step, **more})


def refuse_without(draw: Draw, op: str, a: dict, ways: dict, key: str) -> str:
    """``a[key]`` is for the ways alone and no argument of the op."""

    def without(way):
        def run(draw: Draw, b: dict) -> None:
            b[key] = True
            try:
                way(draw, b)
            finally:
                del b[key]

        return run

    del a[key]
    return refuse(draw, op, a, {name: without(way) for name, way in ways.items()})
