"""Ids that need not be rows of their table, under the shim."""

from __future__ import annotations

import torch

from rankkernels.ops._features import MODES, Features
from rankkernels.ops.embedding_bag import run_op


def unknown_ids() -> None:
    """Ids that need not be rows get the results and gradients of the rows that the reference says, bit for bit; more
    of them than a block has, and more features than a launch."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.int32, torch.int64):
        ids = [torch.randint(-9, 40, (n, 2), generator=generator).to(dtype) for n in (1300, 3, 0, *[2] * 70)]
        F, limits = len(ids), torch.iinfo(dtype)
        ids[1][0] = torch.tensor([limits.min, limits.max])
        features = Features(
            ids, [], [], [0] * F, [MODES.index(mode) for mode in ("none", *["sum"] * (F - 1))], [-1, *[3] * (F - 1)],
            [-1], [v for f in range(F) for v in (f % 3 if f > 2 else 2, 7, 3 if f % 2 else -1)],
        )  # fmt: skip
        kept = [f for f in range(F) if features.known_of(f).unknown]
        results = []
        for given in (features.subset(kept)[1], features.subset(kept)[1].as_rows()):
            weight = torch.arange(28.0).view(7, 4).requires_grad_()
            outs = run_op([weight], given, "")
            results.append([*outs, *torch.autograd.grad([out.sin().sum() for out in outs], weight)])
        assert all(map(torch.equal, *results))
