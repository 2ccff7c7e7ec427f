"""Calls of the embedding schemas with one argument wrong."""

from __future__ import annotations

import torch
from draw import Draw, refused
from embedding import (
    OPTIMIZERS,
    backward_arguments,
    call,
    features,
    grads_for,
    hyper_for,
    names_of,
    own_memory,
    states_for,
)

WRONG_FLOATS = (torch.complex64, torch.int64, torch.bool, torch.float8_e5m2)
WRONG_INTS = (torch.float32, torch.bool, torch.int16, torch.complex64, torch.uint8)


class NotHere(Exception):
    """The mutation has nothing to change in this call."""


def another(draw: Draw, n: int) -> int:
    if n == 0:
        raise NotHere
    return draw.randrange(n)


def longer_or_shorter(draw: Draw, a: dict, key: str) -> None:
    if not a[key]:
        raise NotHere
    a[key] = a[key][:-1] if draw.chance(0.5) and len(a[key]) > 1 else [*a[key], a[key][-1]]


def retyped(draw: Draw, a: dict, key: str, dtypes) -> None:
    i = another(draw, len(a[key]))
    if a[key][i] is None or a[key][i].shape == (0,):
        raise NotHere
    t = a[key][i].contiguous()
    dtype = draw.choice([d for d in dtypes if d != t.dtype])
    a[key] = [*a[key]]
    a[key][i] = t.abs().to(dtype) if dtype.is_floating_point or t.is_floating_point() else t.to(dtype)


def elsewhere(draw: Draw, a: dict, key: str) -> None:
    """On another device or in another layout."""
    i = another(draw, len(a[key]))
    t = a[key][i]
    if t is None or t.shape == (0,) or t.dim() == 0:
        raise NotHere
    a[key] = [*a[key]]
    a[key][i] = t.to("meta") if draw.chance(0.5) else t.contiguous().to_sparse()


def reshaped(draw: Draw, a: dict, key: str) -> None:
    """One row or column more or less, a dimension more or less, transposed."""
    i = another(draw, len(a[key]))
    t = a[key][i]
    if t is None or t.shape == (0,) or t.dim() == 0:
        raise NotHere
    ways = [t[None], t.flatten()[:0].reshape(0, 3), torch.cat([t, t[:1]]), t[:-1], t.new_zeros(())]
    if t.dim() == 2:
        ways += [t.t(), t.flatten(), torch.cat([t, t[:, :1]], 1), t[:, :-1], t[:, :1]]
    other = draw.choice([w for w in ways if w.shape != t.shape] or [t[None]])
    a[key] = [*a[key]]
    a[key][i] = other.clone()


def pooled(a: dict) -> list[int]:
    return [f for f, m in enumerate(a["modes"]) if m]


def number(draw: Draw, a: dict, key: str) -> None:
    """A table, a mode, a padding index or a frozen row that there is not."""
    i = another(draw, len(a[key]))
    T = len(a["frozen_rows"])
    if key == "tables":
        values = [-1, T, 2**40, -(2**63)]
    elif key == "modes":
        values = [-1, 4, 2**33, 2**63 - 1]
    else:
        sizes = [w.size(0) for w in a["weights"]] or a["rows"]
        rows = sizes[i if key == "frozen_rows" else a["tables"][i]]
        values = [-2, rows, 2**40, -(2**63)]
    a[key] = [*a[key]]
    a[key][i] = draw.choice(values)


def id_outside(draw: Draw, a: dict) -> None:
    f = another(draw, len(a["indices"]))
    ids = a["indices"][f]
    bags = a["offsets"][f] if a["offsets"] and a["modes"][f] and ids.dim() == 1 else ids
    if (
        ids.numel() == 0
        or (bags is not ids and bags.numel() == 0)
        or (a.get("grad_outs") and a["grad_outs"][f] is None)
    ):
        raise NotHere
    sizes = [w.size(0) for w in a["weights"]] or a["rows"]
    values = [-1, sizes[a["tables"][f]], 2**31 - 1, *([2**40, -(2**63)] if ids.dtype == torch.int64 else [])]
    ids = ids.clone()
    place, value = draw.randrange(ids.numel()), draw.choice(values)
    ids.put_(torch.tensor([place]), torch.tensor([value], dtype=ids.dtype))
    a["indices"] = [*a["indices"]]
    a["indices"][f] = ids


def ids_of_another_shape(draw: Draw, a: dict) -> None:
    fs = pooled(a)
    f = fs[another(draw, len(fs))]
    ids = a["indices"][f]
    a["indices"] = [*a["indices"]]
    if ids.dim() == 1:
        a["indices"][f] = draw.choice((ids[None, None], ids.new_zeros(())))
    else:
        a["indices"][f] = draw.choice((ids[None], ids.new_zeros(()), ids[..., None]))


def wrong_offsets(draw: Draw, a: dict) -> None:
    fs = [f for f in pooled(a) if a["indices"][f].dim() == 1 and a["offsets"][f].numel()]
    fs = [f for f in fs if not a.get("grad_outs") or a["grad_outs"][f] is not None]
    f = fs[another(draw, len(fs))]
    offsets, N = a["offsets"][f].clone(), a["indices"][f].numel()
    way = draw.choice(("start", "beyond", "decreasing", "shape", "type", "none", "layout"))
    if way == "start":
        offsets[0] = draw.choice((1, -1))
    elif way == "beyond":
        offsets[-1] = N + 1
        if offsets.numel() == 1:
            raise NotHere
    elif way == "decreasing":
        if offsets.numel() < 2:
            raise NotHere
        i = draw.randrange(1, offsets.numel())
        offsets[i] = draw.choice((-1, offsets[i - 1].item() - 1, -(2**31)))
    elif way == "shape":
        offsets = draw.choice((offsets[None], offsets[:, None], offsets.new_zeros(())))
    elif way == "type":
        offsets = offsets.to(draw.choice(WRONG_INTS))
    elif way == "layout":
        offsets = offsets.to_sparse()
    elif N:
        a["offsets"] = []
        return
    else:
        raise NotHere
    a["offsets"] = [*a["offsets"]]
    a["offsets"][f] = offsets


def wrong_factors(draw: Draw, a: dict) -> None:
    f = another(draw, len(a["indices"]))
    ids, w = a["indices"][f], (a["weights"] or a["grad_outs"])[a["tables"][f] if a["weights"] else f]
    if w is None or ids.numel() == 0 or a.get("grad_outs") and a["grad_outs"][f] is None:
        raise NotHere
    good = torch.ones(ids.shape, dtype=w.dtype)
    if MODES_WITH_FACTORS[a["modes"][f]]:
        ways = [good[None], torch.cat([good.reshape(-1), good.reshape(-1)[:1]])]
        ways += [good.to(torch.float64 if w.dtype != torch.float64 else torch.float32), good.to(torch.complex64)]
        good = draw.choice(ways)
    empty = torch.empty(0, dtype=w.dtype)
    a["per_sample_weights"] = [*a["per_sample_weights"]] or [empty for _ in a["indices"]]
    a["per_sample_weights"][f] = good


MODES_WITH_FACTORS = (False, True, True, False)


def empty_lists(draw: Draw, a: dict) -> None:
    a[draw.choice([k for k in ("weights", "indices") if a[k]])] = []


def mixed_concat(draw: Draw, a: dict) -> None:
    if not a.get("concat") or len(a["indices"]) < 2:
        raise NotHere
    f = draw.randrange(1, len(a["indices"]))
    ids = a["indices"][f]
    a["indices"] = [*a["indices"]]
    if a["modes"][f] == 0:
        a["indices"][f] = draw.choice((torch.cat([ids, ids[:1]]) if ids.numel() else ids[None], ids[:, None]))
    elif ids.dim() == 2:
        a["indices"][f] = ids[:-1] if ids.size(0) else ids.new_zeros((1, ids.size(1)))
    else:
        raise NotHere


FORWARD = {
    "lengths": lambda d, a: longer_or_shorter(d, a, d.choice(("indices", "offsets", "per_sample_weights", "tables",
                                                              "modes", "padding_idx", "frozen_rows"))),
    "table number": lambda d, a: number(d, a, "tables"),
    "mode number": lambda d, a: number(d, a, "modes"),
    "padding": lambda d, a: number(d, a, "padding_idx"),
    "frozen row": lambda d, a: number(d, a, "frozen_rows"),
    "id": id_outside,
    "shape of ids": ids_of_another_shape,
    "dtype of ids": lambda d, a: retyped(d, a, "indices", WRONG_INTS),
    "place of ids": lambda d, a: elsewhere(d, a, "indices"),
    "offsets": wrong_offsets,
    "factors": wrong_factors,
}  # fmt: skip
OF_TABLES = {
    "dtype of a table": lambda d, a: retyped(d, a, "weights", WRONG_FLOATS),
    "place of a table": lambda d, a: elsewhere(d, a, "weights"),
    "empty lists": empty_lists,
}
TABLE_RANK = {"rank of a table": lambda d, a: rank_of_table(d, a)}


def rank_of_table(draw: Draw, a: dict) -> None:
    t = another(draw, len(a["weights"]))
    w = a["weights"][t]
    a["weights"] = [*a["weights"]]
    a["weights"][t] = draw.choice((w[None], w.flatten(), w.new_zeros(())))


def wrong_rows(draw: Draw, a: dict) -> None:
    """Another number of rows than the tables given have, or one that an id does not fit in."""
    t = another(draw, len(a["rows"]))
    a["rows"] = [*a["rows"]]
    a["rows"][t] = draw.choice((-1, -(2**63), 2**62, 2**63 - 1))


def no_grads(draw: Draw, a: dict) -> None:
    a["grad_outs"] = [None] * len(a["grad_outs"])


def reshaped_grad(draw: Draw, a: dict) -> None:
    """A gradient of another width is one of another table, unless something else tells the table's."""
    before = list(a["grad_outs"])
    reshaped(draw, a, "grad_outs")
    f = next(i for i, (g, old) in enumerate(zip(a["grad_outs"], before)) if g is not old)
    if a["grad_outs"][f].shape[:-1] == before[f].shape[:-1] and not a["weights"]:
        raise NotHere


def resized_table(draw: Draw, a: dict) -> None:
    """Of a table that no gradient is for, nothing but ``rows`` tells what is right."""
    before = a["weights"]
    reshaped(draw, a, "weights")
    t = next(t for t, (w, old) in enumerate(zip(a["weights"], before)) if w is not old)
    used = any(table == t and g is not None for table, g in zip(a["tables"], a["grad_outs"]))
    if not used and a["weights"][t].dim() == 2 and a["weights"][t].size(0) == before[t].size(0):
        raise NotHere


BACKWARD = {
    "lengths of grads": lambda d, a: longer_or_shorter(d, a, d.choice(("grad_outs", "rows"))),
    "shape of a grad": lambda d, a: reshaped_grad(d, a),
    "dtype of a grad": lambda d, a: retyped(d, a, "grad_outs", WRONG_FLOATS),
    "place of a grad": lambda d, a: elsewhere(d, a, "grad_outs"),
    "rows": wrong_rows,
    "no grads": no_grads,
    "size of a table": resized_table,
    "number of tables": lambda d, a: longer_or_shorter(d, a, "weights"),
}


def grad_of_another_dtype(draw: Draw, a: dict) -> None:
    retyped(draw, a, "grad_outs", [torch.float16, torch.float64])


def expanded_table(draw: Draw, a: dict) -> None:
    """A table of which two rows are one memory, or whose elements do not lie side by side."""
    t = another(draw, len(a["weights"]))
    w = a["weights"][t]
    if w.size(0) < 2 or w.size(1) < 2:
        raise NotHere
    a["weights"] = [*a["weights"]]
    overlapping = w.contiguous().as_strided(w.shape, (1, 1))
    a["weights"][t] = draw.choice((w[:1].expand_as(w), w.t().contiguous().t(), overlapping))


def wrong_state(draw: Draw, a: dict) -> None:
    if not a["states"]:
        raise NotHere
    way = draw.choice(("length", "shape", "dtype", "place", "expanded"))
    if way == "length":
        longer_or_shorter(draw, a, "states")
    elif way == "shape":
        reshaped(draw, a, "states")
    elif way == "dtype":
        retyped(draw, a, "states", [torch.float16, torch.complex64, torch.int64])
    elif way == "place":
        elsewhere(draw, a, "states")
    else:
        i = draw.randrange(len(a["states"]))
        s = a["states"][i]
        if s.size(0) < 2 or s.numel() < 2:
            raise NotHere
        a["states"] = [*a["states"]]
        a["states"][i] = s[:1].expand_as(s)


def wrong_optimizer(draw: Draw, a: dict) -> None:
    if draw.chance(0.5):
        a["optimizer"] = draw.choice((-1, len(OPTIMIZERS), 2**40))
    else:
        a["hyper"] = draw.choice((a["hyper"][:-1], [*a["hyper"], 0.0], []))


UPDATE = {"grads of another dtype": grad_of_another_dtype, "rows of one memory": expanded_table, "state": wrong_state,
          "optimizer": wrong_optimizer}  # fmt: skip


def mutated(draw: Draw, a: dict, ways: dict) -> str:
    """Makes one argument wrong -> what was done."""
    names = list(ways)
    draw.shuffle(names)
    for name in names:
        try:
            ways[name](draw, a)
        except NotHere:
            continue
        return name
    raise AssertionError("nothing to make wrong")


def refuse(draw: Draw, op: str, a: dict, ways: dict) -> str:
    way = mutated(draw, a, ways)
    return refused(f"{op}, {way}", NAMED.get(op, op), lambda: call(op, a), a)


#: The backwards and the updates call the embedding op by its name where the features are wrong.
NAMED = {op: "embedding_" for op in ("embedding_bag_backward", "embedding_bag_backward_sparse", "embedding_bag_update",
                                     "embedding_fm", "embedding_fm_backward", "embedding_fm_backward_sparse",
                                     "embedding_fm_update")}  # fmt: skip


def invalid(draw: Draw) -> str:
    op = draw.choice(
        ("embedding_bag", "embedding_bag_backward", "embedding_bag_backward_sparse", "embedding_bag_update")
    )
    concat = op == "embedding_bag" and draw.chance(0.5)
    a = features(draw, concat)
    if op == "embedding_bag":
        a |= {"names": names_of(a), "concat": concat}
        return refuse(draw, op, a, {**FORWARD, **OF_TABLES, **TABLE_RANK, "concat": mixed_concat})
    grads = grads_for(draw, a)
    if op != "embedding_bag_update":
        return refuse(draw, op, backward_arguments(a, grads), {**FORWARD, **BACKWARD})
    return refuse(draw, op, update_arguments(draw, a, grads), {**FORWARD, **OF_TABLES, **TABLE_RANK, **UPDATE})


def update_arguments(draw: Draw, a: dict, grads) -> dict:
    kind = draw.choice(OPTIMIZERS)
    a["weights"] = [own_memory(draw, w) for w in a["weights"]]
    states = sum((states_for(draw, kind, w) for w in a["weights"]), [])
    hyper = sum((hyper_for(draw, kind) for _ in a["weights"]), [])
    return {**a, "grad_outs": grads, "states": states, "optimizer": OPTIMIZERS.index(kind), "hyper": hyper}


def invalid_sparse_update(draw: Draw) -> str:
    kind, dtype = draw.choice(OPTIMIZERS), draw.dtype()
    w = own_memory(draw, draw.normal((max(draw.size(), 2), max(draw.width(), 1)), dtype))
    rows = torch.arange(w.size(0))[:: draw.randint(1, 3)]
    a = {
        "weights": [w], "states": states_for(draw, kind, w), "rows": [rows], "optimizer": OPTIMIZERS.index(kind),
        "values": [draw.normal((rows.numel(), w.size(1)), dtype)], "hyper": hyper_for(draw, kind),
    }  # fmt: skip

    def wrong_row(draw: Draw, a: dict) -> None:
        rows = a["rows"][0].clone()
        rows[draw.randrange(rows.numel())] = draw.choice((-1, w.size(0), 2**40, -(2**63)))
        a["rows"] = [rows]

    def twice(draw: Draw, a: dict) -> None:
        if a["rows"][0].numel() < 2:
            raise NotHere
        a["rows"] = [draw.choice((a["rows"][0].flip(0), torch.zeros_like(a["rows"][0])))]

    ways = {
        "row": wrong_row, "rows that do not ascend": twice, "state": wrong_state, "optimizer": wrong_optimizer,
        "rows of one memory": expanded_table, **TABLE_RANK,
        "dtype of rows": lambda d, a: retyped(d, a, "rows", (*WRONG_INTS, torch.int32)),
        "dtype of values": lambda d, a: retyped(d, a, "values", (*WRONG_FLOATS, torch.float16, torch.float64)),
        "shape of rows": lambda d, a: reshaped(d, a, "rows"), "shape of values": lambda d, a: reshaped(d, a, "values"),
        "dtype of a table": lambda d, a: retyped(d, a, "weights", WRONG_FLOATS),
        "place": lambda d, a: elsewhere(d, a, d.choice(("weights", "rows", "values"))),
    }  # fmt: skip
    way = mutated(draw, a, ways)

    def run():
        torch.ops.rankkernels.sparse_update.default(
            a["weights"][0], a["states"], a["rows"][0], a["values"][0], a["optimizer"], a["hyper"]
        )

    return refused(f"sparse_update, {way}", "sparse_update", run, a)
