"""State of table optimizers to FBGEMM and back. FBGEMM's CPU build has the two Adagrads; a stand-in has the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
ROWS, D = (40, 60), 8


def make(kind: str, **options):
    torch.manual_seed(0)
    module = rk.TableBatchedEmbeddingBag(list(ROWS), D)
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.05, **options)
    return rk.optim.fuse(module, optimizer), optimizer


def batch(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, rows, (30, 5), generator=generator) for rows in ROWS]


def train(module, steps) -> None:
    for step in steps:
        module(batch(step)).sin().sum().backward()


@pytest.mark.parametrize("kind, theirs", [("Adagrad", "EXACT_ADAGRAD"), ("RowWiseAdagrad", "EXACT_ROWWISE_ADAGRAD")])
def test_training_goes_on_there_and_back(kind, theirs):
    reason = "FBGEMM (fbgemm-gpu-cpu, one binary for each torch release) is not installed"
    pytest.importorskip("fbgemm_gpu", reason=reason, exc_type=ImportError)
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    fbgemm = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, D, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        optimizer=EmbOptimType[theirs], learning_rate=0.05, eps=1e-8,
    )  # fmt: skip
    straight, _ = make(kind, eps=1e-8)
    train(straight, range(9))
    first, optimizer = make(kind, eps=1e-8)
    train(first, range(3))
    for own, weight in zip(fbgemm.split_embedding_weights(), first.weights):
        own.copy_(weight.detach())
    assert rk.optim.to_fbgemm(optimizer, fbgemm) is fbgemm and int(fbgemm.iter) == 3
    for step in range(3, 6):
        fbgemm(torch.cat([i.flatten() for i in batch(step)]), torch.arange(0, 301, 5)).sin().sum().backward()
    second, optimizer = make(kind, eps=1e-8)
    with torch.no_grad():
        for own, weight in zip(fbgemm.split_embedding_weights(), second.weights):
            weight.copy_(own)
    assert rk.optim.from_fbgemm(optimizer, fbgemm) is optimizer
    train(second, range(6, 9))
    for a, b in zip(second.weights, straight.weights):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class StandIn(SimpleNamespace):
    """What ``SplitTableBatchedEmbeddingBagsCodegen`` has of its optimizer."""

    def split_optimizer_states(self):
        return self.states


def stand_in(optimizer: str, *shapes) -> StandIn:
    states = [[torch.full((rows, *shape), 7.0) for shape in shapes] for rows in ROWS]
    return StandIn(optimizer=optimizer, states=states, iter=torch.tensor([0]))


@pytest.mark.parametrize(
    "kind, theirs, shapes",
    [
        ("AdamW", "adam", [(D,), (D,)]),
        ("RowWiseAdam", "partial_row_wise_adam", [(D,), ()]),
        ("RowWiseRMSprop", "row_wise_rmsprop_ar", [(), ()]),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_states_are_in_fbgemms_order(kind, theirs, shapes, steps):
    module, optimizer = make(kind)
    train(module, range(steps))
    fbgemm = rk.optim.to_fbgemm(optimizer, stand_in(theirs, *shapes))
    assert int(fbgemm.iter) == steps
    for p, states in zip(module.weights, fbgemm.states):
        for name, state in zip(optimizer._states, states):
            assert torch.equal(state, optimizer.state[p][name]) if steps else (state == 0).all()
    other = rk.optim.from_fbgemm(make(kind)[1], fbgemm)
    for own, loaded in zip(optimizer.state.values(), other.state.values()):
        assert loaded["step"] == own["step"] and all(torch.equal(loaded[n], own[n]) for n in optimizer._states)


def test_what_is_refused():
    module, optimizer = make("RowWiseAdam")
    with pytest.raises(ValueError, match="to_fbgemm: FBGEMM's adam and RowWiseAdam have no state in common"):
        rk.optim.to_fbgemm(optimizer, stand_in("adam", (D,), (D,)))
    with pytest.raises(ValueError, match="from_fbgemm: FBGEMM's lamb and FTRL have no state in common"):
        rk.optim.from_fbgemm(make("FTRL")[1], stand_in("lamb", (D,), (D,)))
    with pytest.raises(ValueError, match=r"from_fbgemm: the tables must be the same .*40, 8.*40, 9"):
        rk.optim.from_fbgemm(optimizer, stand_in("partial_row_wise_adam", (D + 1,), ()))
    module(batch(0))[:, :D].sum().backward(inputs=[module.weights[0]])
    theirs = stand_in("partial_row_wise_adam", (D,), ())
    with pytest.raises(ValueError, match=r"to_fbgemm: FBGEMM has one number of steps for all tables.*\[0, 1\]"):
        rk.optim.to_fbgemm(optimizer, theirs)
    assert all((state == 7).all() for states in theirs.states for state in states)
