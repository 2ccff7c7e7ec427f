"""What the embedding ops' defaults and fakes check, in the words of the C++ (csrc/embedding_*arguments.h).

Nothing is read or written before it. In a fake implementation the sizes are symbols; values, of ids and of offsets, are
looked at on the CPU alone, where nobody waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels.ops._library import FLOATING

#: Pooling modes, by their number in the schema; "none" looks every id up on its own.
MODES = ("none", "sum", "mean", "max")


def names_of(names: str, n: int) -> list[str]:
    """The features' names from the schema's, one a line; of those without one, what it is in the schema."""
    given = names.split("\n")
    return [name or f"indices[{f}]" for f, name in enumerate((given + [""] * n)[:n])]


def offsets_of(f, ids, offsets, modes):
    return offsets[f] if offsets and ids.dim() == 1 and MODES[modes[f]] != "none" else None


def bags_of(f, ids, offsets, modes):
    bags = offsets_of(f, ids, offsets, modes)
    return (ids if bags is None else bags).size(0)


def weights_of(f, ids, per_sample_weights):
    absent = not per_sample_weights or per_sample_weights[f].shape == (0,)
    return None if absent else per_sample_weights[f]


_MOST_ROWS = 2**60  # of all tables of a backward together


def check_like(op, what, t, device, dtypes, kind):
    """Dtype, layout and device of one tensor; the dispatcher brings sparse ones to the defaults."""
    torch._check(t.dtype in dtypes, lambda: f"{op}: {what} must be {kind}, got {t.dtype}")
    torch._check(t.layout == torch.strided, lambda: f"{op}: {what} must be a strided tensor, got {t.layout}")
    torch._check(t.device == device, lambda: f"{op}: {what} must be on {device} like its table, got {t.device}")


def check_features(num_tables, device, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                   names):  # fmt: skip
    """What needs neither tables nor values; the texts are those of csrc/embedding_bag_arguments.h."""
    op, check, integers = "embedding_bag", torch._check, (torch.int32, torch.int64)
    check(num_tables > 0 and len(indices) > 0, lambda: f"{op}: weights and indices must not be empty lists")
    for name, values, optional in (
        ("offsets", offsets, True), ("per_sample_weights", per_sample_weights, True), ("tables", tables, False),
        ("modes", modes, False), ("padding_idx", padding_idx, False),
    ):  # fmt: skip
        check(
            len(values) == len(indices) or (optional and not values),
            lambda: f"{op}: {name} must have one entry a feature, {len(indices)}, got {len(values)}",
        )
    check(
        len(frozen_rows) == num_tables,
        lambda: f"{op}: frozen_rows must have one entry a table, {num_tables}, got {len(frozen_rows)}",
    )
    for f in range(len(indices)):
        check(0 <= tables[f] < num_tables, lambda: f"{op}: {names[f]} has table {tables[f]} of {num_tables}")
        check(0 <= modes[f] < len(MODES), lambda: f"{op}: {names[f]} has unknown mode {modes[f]}")
    for f, ids in enumerate(indices):
        mode, off = MODES[modes[f]], offsets_of(f, ids, offsets, modes)
        check_like(op, names[f], ids, device, integers, "int32 or int64")
        if mode != "none":
            check(
                ids.dim() == 2 or (off is not None and off.dim() == 1 and (off.size(0) > 0 or ids.numel() == 0)),
                lambda: (
                    f"{op}: {names[f]} must be [B, L], or [N] beside offsets [B], got shape {list(ids.shape)}"
                    + ("" if off is None else f" beside offsets {list(off.shape)}")
                ),
            )
        if off is not None:
            check_like(op, f"offsets of {names[f]}", off, device, integers, "int32 or int64")
        elif offsets:
            check(
                offsets[f].shape == (0,),
                lambda: (
                    f"{op}: {names[f]} of shape {list(ids.shape)} and mode {mode} takes no offsets, got shape "
                    f"{list(offsets[f].shape)}"
                ),
            )
        psw = weights_of(f, ids, per_sample_weights)
        if psw is not None:
            check(
                mode in ("sum", "mean") and psw.shape == ids.shape,
                lambda: (
                    f"{op}: per_sample_weights of {names[f]} must have its shape {list(ids.shape)} and mode "
                    f"sum or mean, got {list(psw.shape)} and {mode}"
                ),
            )


def check_factors(f, like, per_sample_weights, ids, name):
    psw = weights_of(f, ids, per_sample_weights)
    torch._check(
        psw is None or (psw.dtype == like.dtype and psw.device == like.device and psw.layout == torch.strided),
        lambda: (
            f"embedding_bag: per_sample_weights of {name} must have the dtype and device of its table, {like.dtype} "
            f"on {like.device}, got {psw.dtype} on {psw.device}"
        ),
    )


def check_padding(rows, tables, padding_idx, frozen_rows, names):
    def check(what, i, n):
        text = f"embedding_bag: {what} must be -1 or a row of its table with {n} rows, got {i}"
        torch._check(i == -1 or 0 <= i < n, lambda: text)

    for f, i in enumerate(padding_idx):
        check(f"padding_idx of {names[f]}", i, rows[tables[f]])
    for t, i in enumerate(frozen_rows):
        check(f"frozen_rows[{t}]", i, rows[t])


def check_table(op, t, w, device):
    torch._check(w.dim() == 2, lambda: f"{op}: weights[{t}] must be [R, D], got shape {list(w.shape)}")
    check_like(op, f"weights[{t}]", w, device, FLOATING, "float32, float64, float16 or bfloat16")


def check_forward(
    weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat
):
    op, check, device = "embedding_bag", torch._check, weights[0].device if weights else None
    names = names_of(names, len(indices))
    check_features(len(weights), device, indices, offsets, per_sample_weights, tables, modes, padding_idx,
                   frozen_rows, names)  # fmt: skip
    for t, w in enumerate(weights):
        check_table(op, t, w, device)
    check_padding([w.size(0) for w in weights], tables, padding_idx, frozen_rows, names)
    for f, ids in enumerate(indices):
        check_factors(f, weights[tables[f]], per_sample_weights, ids, names[f])
    if concat:
        dtype, B = weights[tables[0]].dtype, bags_of(0, indices[0], offsets, modes)
        for f, ids in enumerate(indices):
            check(
                (MODES[modes[f]] != "none" or ids.dim() == 1)
                and weights[tables[f]].dtype == dtype
                and bags_of(f, ids, offsets, modes) == B,
                lambda: (
                    f"{op}: with concat, features must give [B, D] of one B and one dtype, but {names[f]} of shape "
                    f"{list(ids.shape)} differs from {names[0]}"
                ),
            )


def check_backward(grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx,
                   frozen_rows):  # fmt: skip
    """The texts are those of csrc/cpu/embedding_bag_runs.cpp."""
    op, check, names = "embedding_bag_backward", torch._check, [f"indices[{f}]" for f in range(len(indices))]
    given = [g for g in grad_outs if g is not None]
    check(len(given) > 0, lambda: f"{op}: grad_outs has no gradient")
    device = given[0].device
    check_features(len(rows), device, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                   names)  # fmt: skip
    check(
        len(grad_outs) == len(indices),
        lambda: f"{op}: grad_outs must have one entry a feature, {len(indices)}, got {len(grad_outs)}",
    )
    for t, n in enumerate(rows):
        check(0 <= n < _MOST_ROWS - sum(rows[:t]), lambda: f"{op}: rows[{t}] must be a table's number of rows, got {n}")
    check_padding(rows, tables, padding_idx, frozen_rows, names)
    like = {}
    for f, (ids, grad) in enumerate(zip(indices, grad_outs)):
        if grad is None:
            continue
        check_like(op, f"grad_outs[{f}]", grad, device, FLOATING, "float32, float64, float16 or bfloat16")
        shape = ids.shape if MODES[modes[f]] == "none" else (bags_of(f, ids, offsets, modes),)
        check(
            grad.dim() == len(shape) + 1 and grad.shape[:-1] == tuple(shape),
            lambda: (
                f"{op}: grad_outs[{f}] must be [{', '.join([*map(str, shape), 'D'])}] like the result, got shape "
                f"{list(grad.shape)}"
            ),
        )
        first = like.setdefault(tables[f], grad)
        check(
            grad.size(-1) == first.size(-1) and grad.dtype == first.dtype,
            lambda: (
                f"{op}: grad_outs[{f}] must have the width and the dtype of the others of its table, {first.size(-1)} "
                f"and {first.dtype}, got shape {list(grad.shape)} and {grad.dtype}"
            ),
        )
        check_factors(f, grad, per_sample_weights, ids, names[f])
    needed = any(
        g is not None and (MODES[modes[f]] == "max" or weights_of(f, indices[f], per_sample_weights) is not None)
        for f, g in enumerate(grad_outs)
    )
    check(
        len(weights) == len(rows) or not (weights or needed),
        lambda: f"{op}: weights must have one entry a table, {len(rows)}, got {len(weights)}",
    )
    for t, w in enumerate(weights):
        check_table(op, t, w, device)
        g = like.get(t)
        check(
            w.size(0) == rows[t] and (g is None or (w.size(1) == g.size(-1) and w.dtype == g.dtype)),
            lambda: (
                f"{op}: weights[{t}] must have {rows[t]} rows"
                + ("" if g is None else f" of the gradient's width and dtype, {g.size(-1)} and {g.dtype}")
                + f", got shape {list(w.shape)} and {w.dtype}"
            ),
        )


def check_range(rows: int, indices: Tensor, name: str) -> None:
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= rows:
        bad = (indices < 0) | (indices >= rows)
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"embedding_bag: {name}[{', '.join(map(str, position))}] = {int(indices[position])} is out of range for a "
            f"table with {rows} rows"
        )


def check_starts(f, ids, offsets, modes, name) -> None:
    """The texts are those of csrc/cpu/embedding_bag_features.cpp."""
    starts = offsets_of(f, ids, offsets, modes)
    if starts is None or starts.device.type != "cpu" or starts.numel() == 0:
        return
    ends, N = torch.cat([starts, starts.new_full((1,), ids.numel())]).tolist(), ids.numel()
    torch._check(ends[0] == 0, lambda: f"embedding_bag: offsets of {name} must start at 0, got {ends[0]}")
    for b, (start, end) in enumerate(zip(ends, ends[1:])):
        torch._check(
            start <= end,
            lambda: (
                f"embedding_bag: offsets of {name} must not decrease and not exceed {N}, the number of ids: "
                f"offsets[{b}] = {start} is before {end}"
            ),
        )
