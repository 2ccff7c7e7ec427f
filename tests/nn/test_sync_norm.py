"""Synchronized batch normalization in one process; several are in test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from joint_batches import JOINT, MODELS, joint_batch, make, mean_loss
from sync_norms import Operators
from torch import nn

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, rk.SyncBatchNorm1d.convert])
@pytest.mark.parametrize("model", MODELS)
def test_of_one_process_it_is_batch_norm(model, convert):
    """Of both kinds, in training and in eval, the layers are as fused as ever."""
    plain, synchronized = make(model), convert(make(model))
    kinds = [type(m) for m in synchronized.modules()]
    assert nn.BatchNorm1d not in kinds and {nn.SyncBatchNorm, rk.SyncBatchNorm1d} & set(kinds)
    with Operators() as of_plain:
        mean_loss(plain, joint_batch(0), JOINT).backward()
        plain.eval()(joint_batch(1))
    with Operators() as of_synchronized:
        mean_loss(synchronized, joint_batch(0), JOINT).backward()
        synchronized.eval()(joint_batch(1))
    assert of_synchronized.names == of_plain.names and "rankkernels::norm_activation" in of_plain.names
    for a, b in zip(plain.parameters(), synchronized.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for (name, a), b in zip(plain.state_dict().items(), synchronized.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(plain.eval()(joint_batch(1)), synchronized.eval()(joint_batch(1)))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"SyncBatchNorm1d: input must be \[N, 4\], got shape \[2, 4, 3\]"):
        rk.SyncBatchNorm1d(4)(torch.rand(2, 4, 3))
