"""Fused steps of several processes: the gradients of the touched rows, exchanged before each step.

Every process sends the ids and the summed gradients of the rows that its backward touched, and steps on those of all:
an all-gather and no all-reduce, since a table has more rows than all their batches together. The sum of a row is taken
in the order of the ranks, so that all processes have the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from operator import itemgetter
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

_numbers = count()
#: torch 2.13 has it under a new name.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_use_count = getattr(Tensor, "_use_count", None)
#: Seconds that gloo's thread may take to let go of what it sent.
_LET_GO = 1.0


def all_gather(every: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """``own`` [n] of each process -> ``every`` [processes * n].

    Returns when gloo's thread has let go of the tensors, a moment after it has answered: a tensor that Python drops
    first dies in that thread, which aborts a process that ends meanwhile.
    """
    received, sent = every.detach(), own.detach()
    _all_gather(received, sent, group=group)
    if _use_count is None or own.device.type != "cpu" or torch.compiler.is_compiling():
        return
    end = time.monotonic() + _LET_GO
    while max(_use_count(received), _use_count(sent)) > 1 and time.monotonic() < end:
        time.sleep(0)


class _AtTheEnd(list):
    """What the exchanges of one backward still have to do, with their numbers."""

    def run(self) -> None:
        for _, call in sorted(self, key=itemgetter(0)):
            call()


_at_the_end: WeakValueDictionary[int, _AtTheEnd] = WeakValueDictionary()  # by the number of autograd's task


class Exchange:
    """Between the processes of ``group``, that have equal tables and each a batch of its own. None: there was no group
    when it was made, which must remain so.

    All processes make their exchanges in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.ranks = [] if group is None else dist.get_process_group_ranks(group)
        self.number = next(_numbers)

    def __deepcopy__(self, memo: dict) -> Exchange:
        return self

    def __reduce__(self):
        return Exchange, (None,)  # a group does not outlive its process

    def is_needed(self) -> bool:
        """Whether there are others to exchange with.

        Raises:
            RuntimeError: there are by now, and nobody has been told.
        """
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "rankkernels.optim.fuse was called before torch.distributed.init_process_group, so each process would "
                "step on its own gradients alone: call it again, on all processes and before DistributedDataParallel"
            )
        return len(self.ranks) > 1

    def begin(self, kind: str, tables: Mapping[str, Tensor], seed: int | None) -> int | None:
        """Gives all processes the tables of the first -> its ``seed``, of stochastic rounding.

        Raises:
            ValueError: they have other tables, or an optimizer of another ``kind``, or one rounds to the nearest.
        """
        kind += "" if seed is None else " with stochastic_rounding"
        own = kind, {name: (tuple(table.shape), str(table.dtype)) for name, table in tables.items()}
        told = [None] * len(self.ranks)
        dist.all_gather_object(told, (own, seed), group=self.group)
        others, seeds = zip(*told)
        for rank, other in zip(self.ranks, others):
            if other != others[0]:
                raise ValueError(
                    f"fuse: all processes of the group must have the same tables and optimizer, rank {rank} has "
                    f"{other} and rank {self.ranks[0]} has {others[0]}; for tables of this process alone, give "
                    "process_group=torch.distributed.new_group([rank], use_local_synchronization=True)"
                )
        for table in tables.values():
            dist.broadcast(table.detach(), self.ranks[0], group=self.group)
        return seeds[0]

    def at_the_end(self, call: Callable[[], None]) -> None:
        """Runs ``call`` when the backward has come to its end and all reducers have begun what they send: it may send
        over the same group. Several exchanges run in the order that they were made in."""
        task = torch._C._current_graph_task_id()
        calls = _at_the_end.get(task)
        if calls is None:
            calls = _at_the_end[task] = _AtTheEnd()
            # The engine's task owns the list, so a backward that fails drops it.
            torch.autograd.Variable._execution_engine.queue_callback(calls.run)
        calls.append((self.number, call))

    @torch.no_grad()
    def gather(
        self, tables: Sequence[Tensor], rows: Sequence[Tensor | None], values: Sequence[Tensor | None], flag: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None], bool]:
        """The gradients of ``tables`` on all processes, averaged.

        Args:
            rows: of each table the rows that have a gradient here [n], None for one that takes no step.
            values: their gradients [n, D].

        Returns:
            Rows and values of all processes, in the order of their ranks; and whether one has the ``flag``.
        """
        device, T = tables[0].device, len(tables)
        own = torch.tensor([*(-1 if r is None else r.numel() for r in rows), flag], device=device)
        told = [numbers.tolist() for numbers in self._gather(own, [T + 1] * len(self.ranks))]
        counts, flags = [numbers[:T] for numbers in told], [bool(numbers[T]) for numbers in told]
        stepped = [t for t in range(T) if any(c[t] >= 0 for c in counts)]
        dtype = torch.int32 if max(table.size(0) for table in tables) < 2**31 else torch.int64
        found_rows, found_values = [None] * T, [None] * T
        self._fill(found_rows, stepped, rows, counts, [1] * T, torch.empty(0, dtype=dtype, device=device))
        for dtype in dict.fromkeys(tables[t].dtype for t in stepped):
            of_dtype = [t for t in stepped if tables[t].dtype == dtype]
            means = [None if v is None else v / len(self.ranks) for v in values]
            widths = [table.size(1) for table in tables]
            self._fill(found_values, of_dtype, means, counts, widths, torch.empty(0, dtype=dtype, device=device))
        for t in stepped:
            found_values[t] = found_values[t].view(-1, tables[t].size(1))
        return found_rows, found_values, any(flags)

    def _fill(
        self, found: list, kept: Sequence[int], own: Sequence[Tensor | None], counts: Sequence[Sequence[int]],
        widths: Sequence[int], like: Tensor,
    ) -> None:  # fmt: skip
        """Puts what all processes have of the tables ``kept``, of these ``widths``, into ``found``."""
        sizes = [[max(c[t], 0) * widths[t] for t in kept] for c in counts]
        parts = [own[t].flatten().to(like.dtype) for t in kept if own[t] is not None]
        of_ranks = self._gather(torch.cat([like, *parts]), list(map(sum, sizes)))
        split = [whole.split_with_sizes(size) for whole, size in zip(of_ranks, sizes)]
        for i, t in enumerate(kept):
            found[t] = torch.cat([pieces[i] for pieces in split])

    def _gather(self, own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """What each process has, [its length]. Sent in pieces of one length, which is all that every backend has."""
        longest = max(lengths)
        if longest == 0:
            return [own.new_empty(0)] * len(lengths)
        padded = own.new_zeros(longest)
        padded[: own.numel()] = own
        whole = own.new_empty(longest * len(lengths))
        all_gather(whole, padded, group=self.group)
        return [whole[longest * i : longest * i + n] for i, n in enumerate(lengths)]
