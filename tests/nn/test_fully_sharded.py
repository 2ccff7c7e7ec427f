"""FSDP2 around fused tables, checkpoints in shards, and tables in parts of their rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fully_sharded import by_rows, load, train, train_alone
from joint_batches import JOINT, joint_batch, make, mean_loss, tables_of
from ranks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
]


def close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-6, atol=1e-9)


def test_saved_by_two_processes_loaded_by_one_and_back(tmp_path):
    """Trained as by one process; then 2 -> 1 -> 2."""
    both, one = tmp_path / "both", tmp_path / "one"
    (first, second) = run(2, tmp_path, train, str(both))
    losses, alone = train_alone(2)
    torch.testing.assert_close([sum(of_step) for of_step in zip(first["losses"], second["losses"])], losses)
    assert all(map(torch.equal, first["tables"], second["tables"]))
    loaded = make("DIN")
    state = loaded.state_dict()
    dcp.load(state, checkpoint_id=both, no_dist=True)
    loaded.load_state_dict(state)
    close(alone.state_dict(), loaded.state_dict())
    dcp.save(loaded.state_dict(), checkpoint_id=one, no_dist=True)
    (tmp_path / "again").mkdir()
    for again in run(2, tmp_path / "again", load, str(one)):
        assert all(torch.equal(value, again[name]) for name, value in loaded.state_dict().items())


def test_tables_in_parts_of_their_rows(tmp_path):
    """The layers call such tables as modules; their gradients are those of whole ones."""
    model = make("DIN")
    loss = mean_loss(model, joint_batch(0), JOINT)
    loss.backward()
    for found in run(2, tmp_path, by_rows):
        torch.testing.assert_close(found["loss"], loss.detach())
        for a, table in zip(found["gradients"], tables_of(model)):
            torch.testing.assert_close(a, table.grad)
