"""EmbeddingBag, TableBatchedEmbeddingBag and look_up against the float64 reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from draw import Draw, check_close, check_unchanged, snapshot, tensors_of
from embedding import compare_grads, features, grads_for, reference_outs
from torch import Tensor, nn

import rankkernels as rk
from rankkernels import reference
from rankkernels.nn.embedding import look_up
from rankkernels.ops._features import MODES


def drawn_tables(draw: Draw, a: dict, concat: bool) -> rk.TableBatchedEmbeddingBag:
    """A module with the tables and the features of ``a``, whose padding becomes that of a table."""
    padding = [draw.randrange(w.size(0)) if draw.chance(0.3) else None for w in a["weights"]]
    a["frozen_rows"] = [-1 if p is None else p for p in padding]
    a["padding_idx"] = [a["frozen_rows"][t] for t in a["tables"]]
    module = rk.TableBatchedEmbeddingBag(
        [w.size(0) for w in a["weights"]], [w.size(1) for w in a["weights"]], modes=[MODES[m] for m in a["modes"]],
        tables=a["tables"], padding_idx=padding, concat=concat, sparse=draw.chance(0.4),
    )  # fmt: skip
    for t, w in enumerate(a["weights"]):
        module.weights[t] = nn.Parameter(w)
    return module.train(draw.chance(0.7))


def table_batched(draw: Draw) -> None:
    concat = draw.chance(0.4)
    a = features(draw, concat)
    module = drawn_tables(draw, a, concat)
    factors = [w.requires_grad_() for w in a["per_sample_weights"]]
    given = lambda ts: [t if t.shape != (0,) or i.shape == (0,) else None for t, i in zip(ts, a["indices"])] or None  # noqa: E731
    before = snapshot(tensors_of(a))
    out = module(a["indices"], given(a["offsets"]), given(factors))
    right = reference_outs(a, [w.double() for w in a["weights"]], [w.detach().double() for w in factors])
    outs = out.split([r.size(-1) for r in right], 1) if concat else out
    for f, (o, r) in enumerate(zip(outs, right, strict=True)):
        w = a["weights"][a["tables"][f]]
        check_close(f"TableBatchedEmbeddingBag, feature {f}", o, r, w.dtype, 0.1 * w.double().norm().item())
    grads = grads_for(draw, a)
    asked = [(o, g) for o, g in zip(outs, grads) if g is not None]
    leaves = [*module.weights, *factors]
    asked_outs, grad_outs = zip(*asked)
    found = torch.autograd.grad(asked_outs, leaves, grad_outs, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(found, leaves)]
    tables = len(a["weights"])
    compare_grads("the gradient of TableBatchedEmbeddingBag", a, grads, found[:tables], found[tables:])
    check_unchanged(before, "TableBatchedEmbeddingBag")


def drawn_bags(draw: Draw, rows: int, last: bool) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Ids, their offsets, those without the last one's end, and the ids that are of a bag."""
    B = draw.size(draw.choice((30, 300)))
    if draw.chance(0.4):
        ids = draw.ids(rows, (B, draw.size(12)))
        return ids, None, None, ids.numel()
    counts = torch.randint(0, draw.choice((1, 3, 40)), (B,), generator=draw.generator)
    N = int(counts.sum())
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(draw.choice((torch.int64, torch.int32)))
    beyond = draw.size(9) if last and draw.chance(0.3) else 0
    return draw.ids(rows, (N + beyond,)), ends if last else ends[:-1], ends[:-1], N


def one_table(draw: Draw) -> None:
    """Against the reference; with ``max_norm`` its table is what torch's own renormalization makes of it."""
    dtype, mode, last = draw.dtype(), draw.choice(("sum", "mean", "max")), draw.chance(0.4)
    rows, width = max(draw.size(), 1), max(draw.width(), 1)
    padding = draw.randrange(rows) if draw.chance(0.3) else None
    norm = draw.choice((None, None, None, 1.0)) if dtype in (torch.float32, torch.float64) else None
    kind = draw.choice((2.0, 1.0))
    weight = draw.strided(draw.normal((rows, width), dtype))
    module = rk.EmbeddingBag(
        rows, width, max_norm=norm, norm_type=kind, mode=mode, sparse=draw.chance(0.4), include_last_offset=last,
        padding_idx=padding,
    )  # fmt: skip
    module.weight = nn.Parameter(weight.clone() if norm else weight)
    ids, offsets, starts, N = drawn_bags(draw, rows, last)
    factors = draw.strided(draw.normal(ids.shape, dtype)) if mode != "max" and draw.chance(0.4) else None
    leaves = [module.weight] + ([] if factors is None else [factors.requires_grad_()])
    before = snapshot(tensors_of([ids, offsets, factors, None if norm else weight]))
    out = module(ids, offsets, factors)
    exact = weight.double()
    if norm and ids.numel():
        torch.embedding_renorm_(exact, ids.contiguous().long(), norm, kind)
        check_close("EmbeddingBag, max_norm", module.weight, exact, dtype)
        exact = (
            module.weight.detach().double()
        )  # rounding decides which of the rows that have the norm now is the largest
    leaf, scale = exact.requires_grad_(), None if factors is None else factors.detach().double().requires_grad_()
    kept = ids.long() if starts is None else ids[:N].long()
    used = scale if scale is None or starts is None else scale[:N]
    starts = None if starts is None else starts.long()
    right = reference.embedding_bag(leaf, kept, starts, mode, used, padding, padding)
    floor = 0.1 * weight.double().norm().item()
    check_close("EmbeddingBag", out, right, dtype, floor)
    grad = draw.strided(draw.normal(out.shape, dtype), overlap=True)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    wanted = [leaf] if scale is None else [leaf, scale]
    expected = [None] * len(wanted)  # of a maximum of nothing
    if right.requires_grad:
        expected = torch.autograd.grad(right, wanted, grad.double(), allow_unused=True)
    for name, g, e, x in zip(("the table", "the factors"), found, expected, leaves):
        g, e = (x.detach() * 0 if y is None else y.to_dense() for y in (g, e))
        check_close(f"EmbeddingBag's gradient of {name}", g, e, dtype, 0.1 * grad.double().norm().item())
    check_unchanged(before, "EmbeddingBag")


def several_tables(draw: Draw) -> None:
    """``look_up`` is each table's own call, one after the other."""
    dtype, tables = draw.dtype(), []
    sparse = dtype.itemsize > 2 and draw.chance(0.1)  # calls torch's, which adds up in 16 bits and knows no single id
    for _ in range(draw.randint(1, 4)):
        rows = max(draw.size(), 1)
        padding = draw.randrange(rows) if draw.chance(0.3) else None
        tables.append(nn.Embedding(rows, draw.width(), padding_idx=padding, sparse=sparse))
        tables[-1].weight = nn.Parameter(draw.strided(draw.normal((rows, tables[-1].embedding_dim), dtype)))
    chosen = [draw.choice(tables) for _ in range(draw.randint(1, 5))]
    B = draw.size()
    shapes = [draw.choice(((B,), (B, 3), (draw.size(20), 0), (B,) if sparse else ())) for _ in chosen]
    ids = [draw.ids(t.num_embeddings, shape) for t, shape in zip(chosen, shapes)]
    before = snapshot(tensors_of([ids, [t.weight for t in tables]]))
    outs = look_up(chosen, ids)
    exact = {t: t.weight.detach().double().requires_grad_() for t in tables}
    right = [F.embedding(i.long(), exact[t], t.padding_idx) for t, i in zip(chosen, ids)]
    for n, (o, r) in enumerate(zip(outs, right, strict=True)):
        check_close(f"look_up, ids {n}", o, r, dtype)
    grads = [draw.normal(o.shape, dtype) for o in outs]
    used = list(dict.fromkeys(chosen))
    found = torch.autograd.grad(outs, [t.weight for t in used], grads)
    expected = torch.autograd.grad(right, [exact[t] for t in used], [g.double() for g in grads])
    for t, g, e in zip(used, found, expected):
        floor = 0.1 * sum(x.double().norm().item() for x, table in zip(grads, chosen) if table is t)
        check_close("the gradient of look_up", g.to_dense(), e, dtype, floor)
    check_unchanged(before, "look_up")
