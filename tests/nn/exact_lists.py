"""Tables under exact Adam as the ops take them, and lookups of them."""

from __future__ import annotations

import torch

from rankkernels.ops._features import Features
from rankkernels.ops._idle_steps import new_history

OPS = torch.ops.rankkernels
ROWS, STEP, BASE = 60, 39, 9


def tables(dtype: torch.dtype, D: int, decay: float, n: int = 2) -> tuple:
    """What the ops take of ``n`` tables whose rows are as of different steps, some without a gradient so far."""
    history, product = new_history(64, 0.9, 0.999), 1.0
    for step in range(BASE + 1, STEP + 1):
        after = product * (1 - 0.01 * decay)
        OPS.adam_history.default(history, BASE, step, 0.9, 0.999, 0.01, product, after)
        product = after
    generator, state = torch.Generator().manual_seed(D), torch.promote_types(dtype, torch.float32)
    weights, states, last_steps = [], [], []
    for _ in range(n):
        last = torch.randint(-STEP, STEP + 1, (ROWS,), generator=generator, dtype=torch.int32)
        last[last > 0] = last[last > 0].clamp(min=BASE)
        weights.append(torch.randn(ROWS, D, generator=generator).to(dtype))
        both = torch.randn(ROWS, 2, D, generator=generator, dtype=state) * (last > 0)[:, None, None]
        states += [both[:, 0].mul_(1e-6), both[:, 1].square_().mul_(1e-12)]
        last_steps.append(last)
    return (weights, states, last_steps, [history] * n), [STEP, BASE, product, 1e-8] * n


def features(pooled: list[int], dtype: torch.dtype | None = None) -> Features:
    """Several of two tables: [B, L] of these modes, jagged with empty bags, one id a bag, ids as they are. Ids from 40
    on are hashed in the second, and one row in the last."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(ROWS, (31, 4), generator=generator) for _ in pooled]
    offsets = torch.tensor([0, 0, 3, 3, 150, 159, 160])
    ids += [torch.randint(ROWS, (160,), generator=generator, dtype=torch.int32),
            *(torch.randint(ROWS, shape, generator=generator) for shape in ((31, 1), (7, 3)))]  # fmt: skip
    n, none = len(ids), torch.empty(0)
    weights = [torch.randn(i.shape, generator=generator).to(dtype) for i in ids[:1]] if dtype else []
    weights += [none.to(dtype)] * (n - 1) if dtype else []
    known = [[0, 0, -1] for _ in ids]
    known[1], known[-1] = [2, 40, 7], [1, 40, -1]
    return Features(
        ids, [none.long()] * (n - 3) + [offsets] + [none.long()] * 2, weights, [i % 2 for i in range(n)],
        [*pooled, 1, 2, 0], [5, -1, 3, -1, -1][: n - 3] + [4, -1, -1], [2, -1], sum(known, []),
    )  # fmt: skip


def by_key(key: str, op, *arguments, **options):
    return op.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *arguments, **options)


#: Which of the lists of tables 8 wide, what is wrong with it, and what is said.
WRONG = (
    (1, lambda states: states[:3], "there must be 2 states, last_steps, a history and a clock"),
    (1, lambda states: [s.double() for s in states], "state 0 of a table of shape [60, 8] must be torch.float32"),
    (1, lambda states: [s.to("meta") for s in states], "state 0 of a table of shape [60, 8] must be"),
    (2, lambda last_steps: [last[1:] for last in last_steps], "last_steps must be int32 [60], contiguous"),
    (2, lambda last_steps: [last.to("meta") for last in last_steps], "last_steps must be int32 [60], contiguous"),
    (3, lambda histories: [h[:20] for h in histories], "the history of table 0 must reach from step 9 to 39"),
    (3, lambda histories: [h.float() for h in histories], "a history must be float64 [S, 20], contiguous"),
)


def refusals(modes: list[int]) -> None:
    """Lists that do not fit the tables are refused by the ops on a GPU, and change nothing."""
    for i, wrong, expected in WRONG:
        lists, clocks = tables(torch.float32, 8, 0.1)
        before = [t.clone() for t in (*lists[0], *lists[1], *lists[2])]
        given = [wrong(each) if k == i else each for k, each in enumerate(lists)]
        for op in (OPS.embedding_catch_up_all.default, OPS.embedding_bag_exact.default):
            looked_up = () if op is OPS.embedding_catch_up_all.default else (*features(modes), "")
            try:
                by_key("CUDA", op, *given, *looked_up, clocks)
            except RuntimeError as error:
                assert expected in str(error), error
            else:
                raise AssertionError(f"{expected!r} was not raised")
        assert all(map(torch.equal, before, (*lists[0], *lists[1], *lists[2])))
