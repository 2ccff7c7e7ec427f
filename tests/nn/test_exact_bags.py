"""Lookups and fused steps of exact Adam that catch up by themselves: in bits what its parts give in turn."""

from __future__ import annotations

import pytest
import torch
from exact_lists import OPS, ROWS, STEP, by_key, features, refusals, tables

import rankkernels as rk
from rankkernels.ops._features import MODES

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning"),
    pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("D", [1, 19, 64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_lookup_is_of_rows_that_have_caught_up_and_changes_none(dtype, D, decay):
    modes = [MODES.index(mode) for mode in ("sum", "mean", "max", "sum")]
    for looked_up in (features(modes), features(modes, dtype)):
        results = []
        for key in ("CompositeExplicitAutograd", "CPU"):
            lists, clocks = tables(dtype, D, decay)
            before = [t.clone() for each in lists for t in each]
            results.append(by_key(key, OPS.embedding_bag_exact.default, *lists, *looked_up, "", clocks))
            changed = [not torch.equal(a, b) for a, b in zip(before, (t for each in lists for t in each))]
            assert any(changed) == (key != "CPU")
        assert all(torch.equal(a, b) for a, b in zip(*results))


@DTYPES
@pytest.mark.parametrize("D", [1, 19, 64])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_a_step_is_one_of_rows_that_have_caught_up(dtype, D, max_norm):
    results, stepped = [], features([1, 2, 1, 1])
    for key in ("CompositeExplicitAutograd", "CPU"):
        lists, clocks = tables(dtype, D, 0.1)
        grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(f)).to(dtype)
                 for f, o in enumerate(OPS.embedding_bag.default(lists[0], *stepped, ""))]  # fmt: skip
        grads[1] = None
        hyper = [0.01, 0.9, 0.999, 1e-8, 0.1, STEP + 1.0, 1.0, max_norm, 0.0] * 2
        assert by_key(key, OPS.embedding_bag_exact_update.default, grads, *lists, *stepped, hyper, clocks) == []
        results.append(lists)
    (weights, states, last_steps, _), ours = results
    before = tables(dtype, D, 0.1)[0]
    for t, last in enumerate(last_steps):
        moved = last == STEP + 1
        assert moved.any() and not moved.all() and torch.equal(moved, ours[2][t] == STEP + 1)
        for theirs, own, old in zip((weights[t], *states[2 * t :][:2]), (ours[0][t], *ours[1][2 * t :][:2]),
                                    (before[0][t], *before[1][2 * t :][:2])):  # fmt: skip
            assert torch.equal(theirs[moved], own[moved]) and torch.equal(own[~moved], old[~moved])
    assert last_steps[0][2] != STEP + 1  # the frozen row


def test_ids_out_of_range_change_nothing():
    lists, clocks = tables(torch.float32, 8, 0.1)
    looked_up = features([1, 1, 1, 1])
    looked_up.indices[2][3, 1] = ROWS
    before = [t.clone() for each in lists for t in each]
    message = rf"third\[13\] = {ROWS} is out of range|third\[3, 1\] = {ROWS} is out of range"
    with pytest.raises(IndexError, match=message), rk.ops._checks.raise_documented():
        OPS.embedding_bag_exact.default(*lists, *looked_up, "\n".join(("a", "b", "third", "d", "e", "f", "g")), clocks)
    grads = [torch.ones(o.shape) for o in OPS.embedding_bag.default(lists[0], *features([1, 1, 1, 1]), "")]
    with pytest.raises(RuntimeError, match="out of range"):
        OPS.embedding_bag_exact_update.default(
            grads, *lists, *looked_up, [0.01, 0.9, 0.999, 1e-8, 0, 40, 1, 0, 0] * 2, clocks
        )
    assert all(torch.equal(a, b) for a, b in zip(before, (t for each in lists for t in each)))


@pytest.mark.skipif(not rk.ops._library.triton_embeds, reason="no Triton, or CUDA C++ in its place")
def test_lists_that_do_not_fit_are_refused_before_a_launch():
    refusals([1, 2, 1, 1])
    lists, _ = tables(torch.float32, 8, 0.1)
    with pytest.raises(RuntimeError, match=r"embedding_mark_steps: steps must have one entry a table, 2, got 1"):
        by_key("CUDA", OPS.embedding_mark_steps.default, lists[2], *features([1, 2, 1, 1]), [5])
    with pytest.raises(RuntimeError, match=r"adam_history: step 80 must lie after base 9 and fit into a history"):
        by_key("CUDA", OPS.adam_history.default, lists[3][0], 9, 80, 0.9, 0.999, 0.1, 1.0, 1.0)
