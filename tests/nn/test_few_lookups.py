"""Lookups so small that torch's own are the faster ones: who runs when, and the same errors, gradients and steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rankkernels as rk
from rankkernels.ops.few_lookups import MOST_FEATURES, MOST_RECORDED, MOST_UNRECORDED, MOST_WIDTH

R, D = 30, 5


def layer(features: int, padding_idx: int | None = 3, D: int = D) -> rk.EmbeddingLayer:
    torch.manual_seed(0)
    made = rk.EmbeddingLayer([rk.SparseFeature(f"c{i}", R, D, padding_idx=padding_idx) for i in range(features)])
    for table in made.embed_dict.values():
        torch.nn.init.normal_(table.weight)
    return made


def batch(features: int, B: int) -> dict[str, torch.Tensor]:
    return {f"c{i}": torch.randint(0, R, (B,)) for i in range(features)}


def calls_op(layer: rk.EmbeddingLayer, x: dict[str, torch.Tensor], recorded: bool = True) -> bool:
    with torch.profiler.profile() as profile, torch.set_grad_enabled(recorded):
        layer(x, layer.features, squeeze_dim=True)
    names = {event.name for event in profile.events()}
    assert ("rankkernels::embedding_bag" in names) != ("aten::embedding" in names)
    return "rankkernels::embedding_bag" in names


@pytest.mark.parametrize("recorded, most", [(True, MOST_RECORDED), (False, MOST_UNRECORDED)])
def test_who_runs(recorded, most):
    for features in range(1, MOST_FEATURES + 2):
        fits = most // features
        assert calls_op(layer(features), batch(features, fits), recorded) == (features > MOST_FEATURES)
        assert calls_op(layer(features), batch(features, fits + 1), recorded)
    assert calls_op(layer(1).bfloat16(), batch(1, 4), recorded) == recorded  # torch sums gradients in bfloat16
    assert calls_op(layer(2, D=MOST_WIDTH + 1), batch(2, 4), recorded)
    sequence = rk.SequenceFeature("c0", R, D, pooling="sum")
    assert calls_op(rk.EmbeddingLayer([sequence]), {"c0": torch.randint(0, R, (4, 2))}, recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_numbers_are_torchs(padding_idx, ids_dtype, dtype):
    ours, x = layer(1, padding_idx).to(dtype), {"c0": batch(1, 70)["c0"].to(ids_dtype)}
    weight = ours.embed_dict["c0"].weight
    expected = F.embedding(x["c0"], weight, padding_idx)
    grad_out = torch.randn_like(expected)
    for found in (
        ours(x, ours.features, squeeze_dim=True),
        ours(x, ours.features)[:, 0],
        ours.lookup(x, ours.features)[0],
    ):
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(y, weight, grad_out, retain_graph=True)[0] for y in (found, expected)]
        assert torch.equal(*grads) and (padding_idx is None or not grads[0][padding_idx].any())


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("widths", [(D, D), (D, 3)])
def test_features_stand_side_by_side(widths, recorded):
    """Also those of two widths, and beside dense columns."""
    tables = [rk.SparseFeature(f"c{i}", R, width) for i, width in enumerate(widths)]
    dense = [rk.DenseFeature("age"), rk.DenseFeature("counts")]
    ours, x = rk.EmbeddingLayer(tables + dense), batch(2, 9) | {"age": torch.rand(9), "counts": torch.rand(9, 4)}
    with torch.set_grad_enabled(recorded):
        found = [ours.embed_dict[f.name](x[f.name]) for f in tables]
        expected = torch.cat(found, 1)
        assert torch.equal(ours(x, tables, squeeze_dim=True), expected)
        assert torch.equal(
            ours(x, [dense[1], *tables, dense[0]], squeeze_dim=True),
            torch.cat([expected, x["counts"], x["age"][:, None]], 1),
        )
        assert all(map(torch.equal, ours.lookup(x, [*tables, tables[0]]), [*found, found[0]]))
        if widths[0] == widths[1]:
            assert torch.equal(ours(x, tables), expected.view(9, 2, D))
            assert torch.equal(ours(x, [*tables, *dense]), expected.view(9, 2, D))  # dense values are dropped
        else:
            with pytest.raises(ValueError, match="can only be combined with squeeze_dim=True"):
                ours(x, tables)


def test_other_batches_are_refused():
    ours = layer(2)
    x = {"c0": torch.tensor([1, 2]), "c1": torch.tensor([1])}
    for call in (lambda: ours(x, ours.features, squeeze_dim=True), lambda: ours.lookup(x, ours.features)):
        with pytest.raises((ValueError, RuntimeError), match="c1"):
            call()


def test_a_mask_that_may_be_seen_is_called():
    history = [rk.SequenceFeature("c0", R, D, pooling="concat")]
    ours, seen = rk.EmbeddingLayer(history), []
    ours.input_mask.register_forward_hook(lambda *_: seen.append(1))
    ours({"c0": torch.tensor([[1, 2]])}, history)
    assert seen == [1]


@pytest.mark.parametrize("bad", [-1, R])
def test_an_id_outside_its_table_is_named(bad):
    ours = layer(1)
    with pytest.raises(IndexError, match=rf"c0\[2\] = {bad} is out of range for a table with {R} rows"):
        ours({"c0": torch.tensor([1, 2, bad])}, ours.features)


def test_an_optimizer_steps_in_the_backward():
    ours, x = layer(1), batch(1, 9)
    before = ours.embed_dict["c0"].weight.detach().clone()
    rk.optim.fuse(ours, rk.optim.SGD(ours.embed_dict.parameters(), lr=0.5))
    ours(x, ours.features).sum().backward()
    counts = torch.bincount(x["c0"], minlength=R).index_fill(0, torch.tensor([3]), 0)
    torch.testing.assert_close(ours.embed_dict["c0"].weight.detach(), before - 0.5 * counts[:, None])


def test_a_table_under_exact_adam_is_read_up_to_date():
    ours, reference = layer(1), layer(1)
    optimizers = [rk.optim.Adam(ours.embed_dict.parameters(), lr=0.1, exact=True),
                  torch.optim.Adam(reference.embed_dict.parameters(), lr=0.1)]  # fmt: skip
    rk.optim.fuse(ours, optimizers[0])
    for i in range(4):
        x = {"c0": torch.tensor([i, i + 5])}
        found, expected = (m(x, m.features) for m in (ours, reference))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        optimizers[1].zero_grad()
        found.square().sum().backward(), expected.square().sum().backward()
        optimizers[1].step()


def test_ids_of_another_device_are_refused():
    """torch's own embedding takes them, and returns memory that nobody wrote."""
    ours = layer(1)
    with pytest.raises((RuntimeError, ValueError), match="c0"):
        ours({"c0": torch.zeros(4, dtype=torch.int64, device="meta")}, ours.features)
