"""What the embedding ops' defaults and fakes check, in the words of the C++ (csrc/embedding).

Nothing is read or written before it. In a fake implementation the sizes are symbols; values, of ids and of offsets, are
looked at on the CPU alone, where nobody waits for them.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from rankkernels.ops._checks import FLOATING
from rankkernels.ops._features import MODES, Features, Known, names_of

_FLOATING = "float32, float64, float16 or bfloat16"
_MOST_ROWS = 2**60  # of all tables of a backward together


def row_of(op: str, what: str, row: int, R: int) -> int:
    """``row`` of a table with R rows counted from its beginning, where ``op``'s argument is called ``what``."""
    if not -R <= row < R:
        raise ValueError(f"{op}: {what} {row} is no row of a table with {R} rows")
    return row % R


def check_like(op, what, t, device, dtypes, kind):
    """Dtype, layout and device of one tensor; the dispatcher brings sparse ones to the defaults."""
    torch._check(t.dtype in dtypes, lambda: f"{op}: {what} must be {kind}, got {t.dtype}")
    torch._check(t.layout == torch.strided, lambda: f"{op}: {what} must be a strided tensor, got {t.layout}")
    torch._check(t.device == device, lambda: f"{op}: {what} must be on {device} like its table, got {t.device}")


def check_features(num_tables: int, device: torch.device | None, features: Features, names: list[str]) -> None:
    """What needs neither tables nor values; the texts are those of csrc/embedding/features.h."""
    op, check, F = "embedding_bag", torch._check, len(features.indices)
    check(num_tables > 0 and F > 0, lambda: f"{op}: weights and indices must not be empty lists")
    for name, optional in (
        ("offsets", True), ("per_sample_weights", True), ("tables", False), ("modes", False), ("padding_idx", False)
    ):  # fmt: skip
        n = len(getattr(features, name))
        check(n == F or (optional and not n), lambda: f"{op}: {name} must have one entry a feature, {F}, got {n}")
    n = len(features.frozen_rows)
    check(n == num_tables, lambda: f"{op}: frozen_rows must have one entry a table, {num_tables}, got {n}")
    n, numbers = len(features.known), len(Known._fields)
    check(
        n in (0, numbers * F),
        lambda: f"{op}: known must have {numbers} entries a feature, {numbers * F}, or none, got {n}",
    )
    for f, name in enumerate(names):
        unknown, size, hidden = features.known_of(f)
        check(
            unknown == 0 or (unknown in (1, 2) and size > 0 and -1 <= hidden < size),
            lambda: (
                f"{op}: {name} has unknown ids of kind {unknown}, which must be 0, 1 or 2, in {size} rows but {hidden}"
            ),
        )
    for name, table, mode in zip(names, features.tables, features.modes):
        check(0 <= table < num_tables, lambda: f"{op}: {name} has table {table} of {num_tables}")
        check(0 <= mode < len(MODES), lambda: f"{op}: {name} has unknown mode {mode}")
    for f, name in enumerate(names):
        _check_feature(device, features, f, name)


def _check_feature(device: torch.device | None, features: Features, f: int, name: str) -> None:
    """The indices of one feature, its offsets and its per-sample weights."""
    op, check, integers = "embedding_bag", torch._check, (torch.int32, torch.int64)
    ids, mode, offsets = features.indices[f], features.mode(f), features.offsets_of(f)
    check_like(op, name, ids, device, integers, "int32 or int64")
    if mode != "none":
        starts = offsets is not None and offsets.dim() == 1 and (offsets.size(0) > 0 or ids.numel() == 0)
        check(
            ids.dim() == 2 or starts,
            lambda: (
                f"{op}: {name} must be [B, L], or [N] beside offsets [B], got shape {list(ids.shape)}"
                + ("" if offsets is None else f" beside offsets {list(offsets.shape)}")
            ),
        )
    if offsets is not None:
        check_like(op, f"offsets of {name}", offsets, device, integers, "int32 or int64")
    elif features.offsets:
        given = features.offsets[f].shape
        check(
            given == (0,),
            lambda: (
                f"{op}: {name} of shape {list(ids.shape)} and mode {mode} takes no offsets, got shape {list(given)}"
            ),
        )
    factors = features.per_sample_weights_of(f)
    check(
        factors is None or (mode in ("sum", "mean") and factors.shape == ids.shape),
        lambda: (
            f"{op}: per_sample_weights of {name} must have its shape {list(ids.shape)} and mode sum or mean, got "
            f"{list(factors.shape)} and {mode}"
        ),
    )


def _check_factors(features: Features, f: int, like: Tensor, name: str) -> None:
    factors = features.per_sample_weights_of(f)
    torch._check(
        factors is None
        or (factors.dtype == like.dtype and factors.device == like.device and factors.layout == torch.strided),
        lambda: (
            f"embedding_bag: per_sample_weights of {name} must have the dtype and device of its table, {like.dtype} "
            f"on {like.device}, got {factors.dtype} on {factors.device}"
        ),
    )


def _check_padding(rows: list[int], features: Features, names: list[str]) -> None:
    def check(what, i, n):
        text = f"embedding_bag: {what} must be -1 or a row of its table with {n} rows, got {i}"
        torch._check(i == -1 or 0 <= i < n, lambda: text)

    for name, t, i in zip(names, features.tables, features.padding_idx):
        check(f"padding_idx of {name}", i, rows[t])
    for t, i in enumerate(features.frozen_rows):
        check(f"frozen_rows[{t}]", i, rows[t])


def check_table(op, t, w, device):
    torch._check(w.dim() == 2, lambda: f"{op}: weights[{t}] must be [R, D], got shape {list(w.shape)}")
    check_like(op, f"weights[{t}]", w, device, FLOATING, _FLOATING)


def check_forward(weights: list[Tensor], features: Features, names: str, concat: bool) -> None:
    op, device, names = "embedding_bag", weights[0].device if weights else None, names_of(names, len(features.indices))
    check_features(len(weights), device, features, names)
    for t, w in enumerate(weights):
        check_table(op, t, w, device)
    _check_padding([w.size(0) for w in weights], features, names)
    of_feature = [weights[t] for t in features.tables]
    for f, (weight, name) in enumerate(zip(of_feature, names)):
        _check_factors(features, f, weight, name)
    for f, (weight, name, ids) in enumerate(zip(of_feature, names, features.indices)) if concat else ():
        torch._check(
            (features.mode(f) != "none" or ids.dim() == 1)
            and weight.dtype == of_feature[0].dtype
            and features.bags_of(f) == features.bags_of(0),
            lambda: (
                f"{op}: with concat, features must give [B, D] of one B and one dtype, but {name} of shape "
                f"{list(ids.shape)} differs from {names[0]}"
            ),
        )


def check_backward(grad_outs: list[Tensor | None], weights: list[Tensor], rows: list[int], features: Features) -> None:
    """The texts are those of csrc/embedding/backward.h."""
    op, check, F = "embedding_bag_backward", torch._check, len(features.indices)
    names = [f"indices[{f}]" for f in range(F)]
    given = [g for g in grad_outs if g is not None]
    check(len(given) > 0, lambda: f"{op}: grad_outs has no gradient")
    check_features(len(rows), given[0].device, features, names)
    check(len(grad_outs) == F, lambda: f"{op}: grad_outs must have one entry a feature, {F}, got {len(grad_outs)}")
    for t, n in enumerate(rows):
        check(0 <= n < _MOST_ROWS - sum(rows[:t]), lambda: f"{op}: rows[{t}] must be a table's number of rows, got {n}")
    _check_padding(rows, features, names)
    first = {}  # of each table's gradients
    for f, (table, grad) in enumerate(zip(features.tables, grad_outs)):
        if grad is not None:
            check_like(op, f"grad_outs[{f}]", grad, given[0].device, FLOATING, _FLOATING)
            _check_grad_out(features, f, grad, first.setdefault(table, grad))
            _check_factors(features, f, grad, names[f])
    needed = any(
        g is not None
        and (features.mode(f) == "max" or (features.per_sample_weights and features.per_sample_weights[f].numel() > 0))
        for f, g in enumerate(grad_outs)
    )
    check(
        len(weights) == len(rows) or not (weights or needed),
        lambda: f"{op}: weights must have one entry a table, {len(rows)}, got {len(weights)}",
    )
    for t, (w, n) in enumerate(zip(weights, rows)):
        check_table(op, t, w, given[0].device)
        g = first.get(t)
        check(
            w.size(0) == n and (g is None or (w.size(1) == g.size(-1) and w.dtype == g.dtype)),
            lambda: (
                f"{op}: weights[{t}] must have {n} rows"
                + ("" if g is None else f" of the gradient's width and dtype, {g.size(-1)} and {g.dtype}")
                + f", got shape {list(w.shape)} and {w.dtype}"
            ),
        )


def _check_grad_out(features: Features, f: int, grad: Tensor, first: Tensor) -> None:
    """The gradient of one feature's result; ``first`` is that of the first feature of its table."""
    op, check, ids = "embedding_bag_backward", torch._check, features.indices[f]
    shape = ids.shape if features.mode(f) == "none" else (features.bags_of(f),)
    check(
        grad.dim() == len(shape) + 1 and grad.shape[:-1] == tuple(shape),
        lambda: (
            f"{op}: grad_outs[{f}] must be [{', '.join([*map(str, shape), 'D'])}] like the result, got shape "
            f"{list(grad.shape)}"
        ),
    )
    check(
        grad.size(-1) == first.size(-1) and grad.dtype == first.dtype,
        lambda: (
            f"{op}: grad_outs[{f}] must have the width and the dtype of the others of its table, {first.size(-1)} "
            f"and {first.dtype}, got shape {list(grad.shape)} and {grad.dtype}"
        ),
    )


def check_values(features: Features, rows: list[int], names: list[str], used: list[bool], waits: bool = False) -> None:
    """Offsets, and the ids of the features ``used``: reads values, so on the CPU alone, where nobody ``waits`` for
    them."""
    for f, name in enumerate(names):
        _check_starts(features, f, name, waits)
    for ids, table, name, is_used in zip(features.indices, features.tables, names, used):
        if is_used:
            _check_range(rows[table], ids, name, waits)


def report_values(features: Features, rows: list[int], names: list[str]) -> None:
    """What RANKKERNELS_CHECK_IDS asks to be said of values on a GPU: csrc/cuda/embedding/lookup.cu."""
    asked = os.environ.get("RANKKERNELS_CHECK_IDS") or "ignore"
    torch._check(
        asked in ("ignore", "warn", "fatal"),
        lambda: f"RANKKERNELS_CHECK_IDS must be ignore, warn or fatal, got {asked}",
    )
    if asked == "ignore":
        return
    try:
        check_values(features.as_rows(), rows, names, [True] * len(names), waits=True)
    except (IndexError, RuntimeError) as error:
        if asked == "fatal":
            raise
        print(error, file=sys.stderr)


def _check_range(rows: int, indices: Tensor, name: str, waits: bool) -> None:
    if not (waits or indices.device.type == "cpu") or indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= rows:
        bad = (indices < 0) | (indices >= rows)
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"embedding_bag: {name}[{', '.join(map(str, position))}] = {int(indices[position])} is out of range for a "
            f"table with {rows} rows"
        )


def _check_starts(features: Features, f: int, name: str, waits: bool) -> None:
    """The texts are those of csrc/cpu/embedding/features.cpp."""
    starts, N = features.offsets_of(f), features.indices[f].numel()
    if starts is None or not (waits or starts.device.type == "cpu") or starts.numel() == 0:
        return
    ends = torch.cat([starts, starts.new_full((1,), N)]).tolist()
    torch._check(ends[0] == 0, lambda: f"embedding_bag: offsets of {name} must start at 0, got {ends[0]}")
    for b, (start, end) in enumerate(zip(ends, ends[1:])):
        torch._check(
            start <= end,
            lambda: (
                f"embedding_bag: offsets of {name} must not decrease and not exceed {N}, the number of ids: "
                f"offsets[{b}] = {start} is before {end}"
            ),
        )
