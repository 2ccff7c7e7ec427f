"""What the processes of a group tell each other in the middle of an op."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rankkernels.ops._exchange import all_gather
from rankkernels.ops._library import define, lib

define("gather_ranks(Tensor own, str group) -> Tensor")


def of_every_process(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """own [n] -> [processes, n], in the order of the ranks, so that sums over it have the same bits everywhere."""
    every = own.new_empty(dist.get_world_size(group) * own.numel())
    all_gather(every, own, group=group)
    return every.view(-1, own.numel())


@torch.library.impl(lib, "gather_ranks", "CompositeExplicitAutograd")
def _(own, group):
    """For csrc/cpu/runtime/ranks.h. An error's text is returned, in uint8: the stable ABI hands on none."""
    try:
        return of_every_process(own, dist.distributed_c10d._resolve_process_group(group))
    except Exception as error:
        return torch.tensor(list(str(error).encode()), dtype=torch.uint8)
