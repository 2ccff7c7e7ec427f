"""Tables of different widths and dtypes in one call: what they share in a backward belongs to one at a time."""

from __future__ import annotations

import pytest
import torch
from random_lookups import Lookups, random_lookups
from test_out_of_bounds import check_with_kernels_of

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
WAYS = pytest.mark.parametrize("way", ["dense", "sparse", "fused"])
SEEDS = range(60)


@WAYS
@pytest.mark.parametrize("widths", [(8, 1), (1, 8), (64, 3), (3, 64), (128, 64), (64, 128), (200, 7, 33)], ids=str)
@pytest.mark.parametrize("B", [1, 255, 257, 1000])
def test_wide_beside_narrow(widths, B, way):
    rows = [50, 4, 7][: len(widths)]
    weights = [2 * torch.rand(r, D) - 1 for r, D in zip(rows, widths)]
    ids = [torch.randint(r, (B,)) for r in rows]
    n = len(widths)
    options = {"tables": list(range(n)), "modes": ["none"] * n, "padding_idx": [None] * n, "frozen_rows": [None] * n}
    Lookups(weights, ids, options, [torch.randn(B, D) for D in widths]).check(way)


@WAYS
def test_random_tables(way):
    for seed in SEEDS:
        random_lookups(seed).check(way)


@pytest.mark.parametrize("B", [100, 1000])
def test_features_of_default_widths(B):
    """A feature without ``embed_dim`` has one that depends on its vocabulary."""
    features = [rk.SparseFeature(f"c{i}", rows) for i, rows in enumerate((5000, 300, 20, 4))]
    layer = rk.EmbeddingLayer(features)
    x = {f.name: torch.randint(f.vocab_size, (B,)) for f in features}
    out = layer(x, features, squeeze_dim=True)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    for f, grad in zip(features, grad_out.split([f.embed_dim for f in features], 1)):
        weight = layer.embed_dict[f.name].weight
        assert torch.allclose(weight.grad, torch.zeros_like(weight).index_add_(0, x[f.name], grad), atol=1e-4)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_each_instruction_set(capability):
    check_with_kernels_of(capability, __file__)


if __name__ == "__main__":
    print(rk.ops._library.cpu_isa)
    for seed in SEEDS:
        for way in ("dense", "sparse", "fused"):
            random_lookups(seed).check(way)
    print("right")
