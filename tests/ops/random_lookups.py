"""Random calls of the embedding op over tables of different widths and dtypes, and their gradients in float64.

Widths, batch sizes and numbers of ids are anything, not whole vectors or tiles: tables share the scratch of a backward,
and where a table ends inside a tile of sorted lookups it meets the next one there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rankkernels import optim, reference, table_batched_embedding_bag
from rankkernels.testing import TOLERANCE, relative_error


@dataclass
class Lookups:
    """Arguments of ``table_batched_embedding_bag``, and a gradient for each of its results."""

    weights: list[Tensor]
    indices: list[Tensor]
    options: dict
    grad_outs: list[Tensor]

    def gradients(self, way: str) -> list[Tensor]:
        """The tables' gradients: dense ones, sparse ones, or the difference that a fused step of SGD made."""
        weights = [w.detach().clone().requires_grad_() for w in self.weights]
        options = {"sparse": True} if way == "sparse" else {}
        if way == "fused":
            options["optimizer"] = optim.SGD(weights, lr=1.0)
        outs = table_batched_embedding_bag(weights, self.indices, **self.options, **options)
        torch.autograd.backward(outs, self.grad_outs)
        if way == "fused":
            return [old - w.detach() for old, w in zip(self.weights, weights)]
        return [w.grad.to_dense() if way == "sparse" else w.grad for w in weights]

    def expected(self) -> list[Tensor]:
        grads = [torch.zeros_like(w, dtype=torch.float64) for w in self.weights]
        for f, (ids, grad_out) in enumerate(zip(self.indices, self.grad_outs)):
            t = self.options["tables"][f]
            weight = self.weights[t].double().requires_grad_()
            mode, padding = self.options["modes"][f], self.options["padding_idx"][f]
            if mode == "none":
                out = torch.nn.functional.embedding(ids, weight)
            else:
                factors = self.options["per_sample_weights"][f]
                factors = None if factors is None else factors.double()
                out = reference.embedding_bag(weight, ids, self.options["offsets"][f], mode, factors, padding)
            grads[t] += torch.autograd.grad(out, weight, grad_out.double())[0]
        for grad, row in zip(grads, self.options["frozen_rows"]):
            if row is not None:
                grad[row] = 0
        return grads

    def check(self, way: str) -> None:
        for t, (grad, expected) in enumerate(zip(self.gradients(way), self.expected())):
            dtype = self.weights[t].dtype
            # A fused step rounds the table, of values up to 1, and not the gradient.
            error = relative_error(grad, expected, floor=self.weights[t].double().norm().item() * (way == "fused"))
            assert error <= TOLERANCE[dtype], f"table {t} {list(grad.shape)} {dtype} of {self}: off by {error}"

    def __str__(self) -> str:
        shapes = [(*w.shape, str(w.dtype)) for w in self.weights]
        return f"tables {shapes}, ids {[list(i.shape) for i in self.indices]}, {self.options['tables']}"


def random_lookups(seed: int, max_tables: int = 6, max_batch: int = 10_000, max_width: int = 200) -> Lookups:
    """One call. Few or many rows, uniform or one of them in half of the lookups; pooled beside unpooled features."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def size(most: int) -> int:  # small sizes as often as large ones
        return round(most ** rng.random())

    def values(*shape: int, dtype: torch.dtype) -> Tensor:
        return (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1).to(dtype)

    num_tables, B = rng.randint(2, max_tables), size(max_batch)
    dtypes = rng.choice([[torch.float32], [torch.float32], [torch.bfloat16], list(TOLERANCE)])
    weights = [values(size(3000), size(max_width), dtype=rng.choice(dtypes)) for _ in range(num_tables)]
    tables = [*range(num_tables), *(rng.randrange(num_tables) for _ in range(rng.randint(0, 3)))]
    rng.shuffle(tables)
    indices, offsets, factors, modes, padding_idx, grad_outs = [], [], [], [], [], []
    for t in tables:
        rows, dtype = len(weights[t]), weights[t].dtype
        mode = rng.choice(["none", "none", "sum", "mean"])
        L = 1 if mode == "none" else rng.randint(0, 3)
        jagged = mode != "none" and rng.random() < 0.3
        shape = (B,) if mode == "none" else (B * L,) if jagged else (B, L)
        ids = torch.randint(rows, shape, generator=generator)
        if rng.random() < 0.5:
            ids[torch.rand(shape, generator=generator) < 0.5] = rows // 2
        starts = torch.randint(B * L + 1, (B,), generator=generator).sort().values if jagged else None
        if starts is not None:
            starts[0] = 0
        weighted = mode == "sum" and rng.random() < 0.3
        indices.append(ids.int() if rng.random() < 0.3 else ids)
        offsets.append(starts)
        factors.append(values(*shape, dtype=dtype) if weighted else None)
        modes.append(mode)
        padding_idx.append(rng.randrange(rows) if mode != "none" and rng.random() < 0.3 else None)
        grad_outs.append(values(B, weights[t].size(1), dtype=dtype))
    options = {"tables": tables, "modes": modes, "offsets": offsets, "per_sample_weights": factors}
    options["padding_idx"] = padding_idx
    options["frozen_rows"] = [rng.randrange(len(w)) if rng.random() < 0.2 else None for w in weights]
    return Lookups(weights, indices, options, grad_outs)
