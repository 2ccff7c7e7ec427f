"""What surrounds the embedding kernels in Triton: which calls reach them, and what is said before.

The kernels run under the interpreter: tests/gpu/cases/embedding_bag.py.
"""

from __future__ import annotations

import types

import pytest
import torch

from rankkernels import ReferenceWarning
from rankkernels.ops import _library, _table
from rankkernels.ops._embedding_checks import report_values
from rankkernels.ops._features import MODES, Features
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, check_apart

pytestmark = pytest.mark.skipif(not _library.triton_embeds, reason="no Triton, or kernels in CUDA C++")
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def features(ids: torch.Tensor, offsets: list[torch.Tensor] | None = None) -> Features:
    return Features([ids], offsets or [], [], [0], [MODES.index("sum")], [-1], [-1])


def test_the_table_of_ops_says_so():
    for op in ("embedding_bag", "sparse_update", "embedding_catch_up", "embedding_fm"):
        assert _table.OPS[op].kernel("cuda") == "Triton"


@pytest.mark.parametrize("D", [512, 513])
def test_wide_tables_run_the_reference(D, monkeypatch):
    """By way of the dispatcher's CUDA key, here on CPU tensors, which no kernel is launched for."""
    monkeypatch.setattr(_table, "reference_notices", {("embedding_bag", "cpu"): "", ("sparse_update", "cpu"): ""})
    ops, weight, rest = torch.ops.rankkernels, torch.randn(9, D), features(torch.randint(9, (3, 2)))
    grads, hyper, sgd = [torch.randn(3, D)], [0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], OPTIMIZERS.index("sgd")
    for op, arguments in (
        (ops.embedding_bag, ([weight], *rest, "")),
        (ops.embedding_bag_backward, (grads, [], [9], *rest)),
        (ops.embedding_bag_backward_sparse, (grads, [], [9], *rest)),
        (ops.embedding_bag_update, (grads, [weight], [], *rest, sgd, hyper)),
        (ops.sparse_update, (weight, [], torch.arange(3), grads[0], sgd, hyper)),
    ):
        if D > 512:
            op.default.redispatch(CUDA, *arguments)
        else:
            with pytest.raises(RuntimeError, match="driver"):
                op.default.redispatch(CUDA, *arguments)


def test_the_notice_says_what_is_not_served(monkeypatch):
    monkeypatch.setattr(_table, "reference_notices", {})
    with pytest.warns(ReferenceWarning, match="the Triton kernels do not serve this configuration"):
        _table.notice_reference("embedding_bag", types.SimpleNamespace(device=torch.device("cuda")))


@pytest.mark.parametrize("asked", ["ignore", "warn", "fatal", "never", ""])
def test_ids_are_said_as_asked(asked, monkeypatch, capsys):
    monkeypatch.setenv("RANKKERNELS_CHECK_IDS", asked)
    text = "embedding_bag: item[1, 0] = 9 is out of range for a table with 9 rows"
    arguments = features(torch.tensor([[1, 2], [9, 0]])), [9], ["item"]
    if asked == "fatal":
        with pytest.raises(IndexError) as raised:
            report_values(*arguments)
        assert str(raised.value) == text
    elif asked == "never":
        with pytest.raises(RuntimeError, match="must be ignore, warn or fatal, got never"):
            report_values(*arguments)
    else:
        report_values(*arguments)
    assert (text in capsys.readouterr().err) == (asked == "warn")


def test_offsets_are_said_as_asked(monkeypatch):
    monkeypatch.setenv("RANKKERNELS_CHECK_IDS", "fatal")
    with pytest.raises(RuntimeError, match="offsets of item must start at 0, got 3"):
        report_values(features(torch.arange(4), [torch.tensor([3, 1])]), [9], ["item"])


def test_tables_that_share_memory_take_no_step():
    whole = torch.zeros(9, 8)
    for views in ((whole, whole), (whole[1:], whole[:-1]), (whole[:, :5], whole[:, 4:]), (whole[2:], whole[:3, :4]),
                  (whole[:, :2], whole.view(18, 4)[:, 2:])):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"weights\[0\] and weights\[1\] share memory"):
            check_apart(views)
    check_apart((whole[:, :4], whole[:, 4:]))
    check_apart((whole[:4], whole[4:], whole[:0]))


def test_what_a_graph_reads_is_kept(monkeypatch):
    from rankkernels._triton import embedding_bag_numbers as numbers

    kept, device = {}, torch.device("cuda")
    monkeypatch.setattr(numbers, "_of_graphs", kept)
    monkeypatch.setattr(numbers, "_described", lambda values, device: torch.tensor(values))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
        found = numbers.described((1, 2), device)
        assert (kept.get(((1, 2), device)) is found) == capturing
