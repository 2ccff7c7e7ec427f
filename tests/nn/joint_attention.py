"""DIN's attention in training with the statistics of the rows of several processes, beside one process with all."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from sync_norms import Operators
from torch import Tensor, nn

import rankkernels as rk
from rankkernels.ops import _ranks
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._schema import parsed
from rankkernels.ops.attention_params import Flags, Inputs
from rankkernels.testing import OpCase, din_attention_case

#: Samples in all, and what each process has of them: none, one without a valid row, many.
B, SHARES = 23, {2: ((0, 23), (1, 22), (9, 14)), 3: ((0, 1, 22), (9, 0, 14), (1, 9, 13))}
FORMS = "padded", "lengths", "mask", "offsets"


def _cases() -> list[tuple[OpCase, torch.dtype]]:
    drawn = []
    for activation, norm, form in product(ACTIVATIONS, (True, False), FORMS):
        if norm or activation == "dice_batch_norm":
            options = {"activation": activation, "batch_norm": norm, "use_softmax": form != "lengths"}
            drawn.append((torch.float64, (6, 5, [7, 3]), {"form": form, **options}))
    for dtype, form in product((torch.float32, torch.bfloat16), FORMS):
        drawn.append((dtype, (9, 16, [36]), {"form": form}))
        drawn.append((dtype, (9, 16, [40, 20]), {"form": form, "activation": "dice_batch_norm"}))
    for form, users in product(FORMS, (4, 30)):
        drawn.append((torch.float64, (6, 5, [7]), {"form": form, "users": users, "use_softmax": users == 4}))
    for form, softmax in product(("lengths", "mask"), (True, False)):
        options = {"form": form, "use_softmax": softmax}
        drawn.append((torch.float64, (6, 5, [7]), {"count_padding": True, **options}))
        drawn.append((torch.float64, (6, 5, [7]), {"return_scores": True, **options}))
    drawn.append((torch.float64, (6, 5, [1]), {"activation": "relu"}))
    drawn.append((torch.float64, (6, 5, [7, 3]), {"form": "lengths", "dropout": 0.3}))
    drawn.append((torch.float32, (3, 64, [80, 40, 17]), {"activation": "sigmoid"}))
    return [(din_attention_case(B, *sizes, **options), dtype) for dtype, sizes, options in drawn]


CASES = _cases()


class Step(NamedTuple):
    """What a forward and a backward give."""

    out: Tensor
    stats: Tensor
    history: Tensor
    target: Tensor
    params: list[Tensor]


def _samples(inputs: Inputs, begin: int, end: int) -> Inputs:
    """Some of the samples. Histories that they share stay whole."""
    history, target, lengths, mask, offsets, index, *_ = inputs
    if index is not None:
        return inputs._replace(target=target[begin:end], history_index=index[begin:end])
    if offsets is not None:
        ends = offsets[begin : end + 1]
        return inputs._replace(history=history[ends[0] : ends[-1]], target=target[begin:end], offsets=ends - ends[0])
    history, target, lengths, mask = (None if t is None else t[begin:end] for t in (history, target, lengths, mask))
    return inputs._replace(history=history, target=target, lengths=lengths, mask=mask)


def step(number: int, processes: int, rank: int | None) -> Step:
    """Of a process, or with None of one that has all samples."""
    case, dtype = CASES[number]
    inputs, flags = parsed(case.arguments(*(t.detach() for t in case.inputs(dtype))), Inputs, Flags)
    begin, end = 0, B
    if rank is not None:
        # Units are dropped by the samples' numbers: those of a process that has all are as in one.
        shares = (*[0] * (processes - 1), B) if flags.dropout else SHARES[processes][number % 3]
        begin = sum(shares[:rank])
        end = begin + shares[rank]
        inputs, flags = _samples(inputs, begin, end), flags._replace(group=dist.group.WORLD.group_name)
    history, target = (t.clone().requires_grad_() for t in inputs[:2])
    params = [p.clone().requires_grad_() for p in inputs.params]
    out, stats, _ = case.overload(*inputs._replace(history=history, target=target, params=params), *flags)
    grad = torch.randn(B, *out.shape[1:], generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    grads = torch.autograd.grad(out, [history, target, *params], grad[begin:end].to(dtype))
    return Step(out.detach(), stats, *grads[:2], list(grads[2:]))


def joined(number: int, steps: list[Step]) -> Step:
    """Of all processes: a sample's is its own process's, of what all have the sum."""
    case, dtype = CASES[number]
    shared = "users" in case.id
    out, target = (torch.cat([getattr(s, name) for s in steps]) for name in ("out", "target"))
    histories = [s.history for s in steps]
    history = sum(histories) if shared else torch.cat(histories)
    return Step(out, steps[0].stats, history, target, [sum(grads) for grads in zip(*(s.params for s in steps))])


def _error(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _unit() -> nn.Module:
    torch.manual_seed(0)
    return rk.SyncBatchNorm1d.convert(rk.ActivationUnit(8, [16, 7], use_softmax=True).double())


def _gradients(unit: nn.Module, rank: int) -> list[Tensor]:
    """Of a process's histories, 5 of 4 rows, and of the parameters, summed over all; running statistics behind."""
    generator = torch.Generator().manual_seed(rank)
    history, target = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                       for shape in ((5, 4, 8), (5, 8)))  # fmt: skip
    out = unit(history, target, lengths=torch.tensor([4, 0, 2, 1, 4]))
    of_history, of_target, *of_all = torch.autograd.grad(out.sin().sum(), [history, target, *unit.parameters()])
    for grad in of_all:
        dist.all_reduce(grad)
    return [out.detach(), of_history, of_target, *of_all, *unit.buffers()]


def units(rank: int) -> dict:
    """A step of a unit as one op and module by module, as where norms have several groups: the results, which ops run
    and how many values go into each message."""
    found, gather, apart = {}, _ranks.all_gather, _unit()
    apart.attention.mlp[1].process_group = dist.new_group()
    for name, unit in {"one op": _unit(), "modules": apart}.items():
        sent = []

        def send(every: Tensor, own: Tensor, group: dist.ProcessGroup, sent=sent) -> None:
            sent.append(own.numel())
            gather(every, own, group=group)

        with mock.patch.object(_ranks, "all_gather", send), Operators() as ran:
            found[name] = _gradients(unit, rank), ran.names, sent
    return found


def compiled(rank: int) -> bool:
    """Whether a compiled unit has the bits of the eager one, and the op passes torch's checks of it."""
    case = din_attention_case(4, 3, 2, [5], form="offsets")
    *arguments, _ = case.arguments(*case.inputs(torch.float64))
    torch.library.opcheck(case.overload, (*arguments, dist.group.WORLD.group_name))
    unit = torch.compile(_unit(), backend="aot_eager", fullgraph=True)
    return all(map(torch.equal, _gradients(_unit(), rank), _gradients(unit, rank)))


def refusals(rank: int) -> dict[str, str]:
    """What processes raise: of one row in all, without a group, for a second derivative; and the first one, where
    the others have wrong lengths and never come."""
    hasty, world = dist.new_group(timeout=timedelta(seconds=2)), dist.group.WORLD.group_name
    case = din_attention_case(4, 3, 2, [5])
    history, target, *params = case.inputs(torch.float32)

    def attend(rows: int, group: str, **options) -> Tensor:
        x = history[:rows, :1] if rows < 4 else history
        return rk.din_attention(x, target[:rows], params, batch_norm=True, training=True, group=group, **options)[0]

    found = {"one row": _error(attend, 1 - min(rank, 1), world), "unknown": _error(attend, 4, "nobody")}
    params = [p.detach().requires_grad_() for p in params]
    found["twice"] = _error(torch.autograd.grad, attend(4, world).sum(), params, create_graph=True)
    bad = {} if rank == 0 else {"lengths": torch.tensor([1, 2, 3, 4])}
    found["alone"] = _error(attend, 4, hasty.group_name, **bad)
    return found


def everything(rank: int, processes: int) -> dict:
    """What this process has of everything here."""
    return {
        "steps": [step(i, processes, rank) for i in range(len(CASES))],
        "units": units(rank), "compiled": compiled(rank), "refusals": refusals(rank),
    }  # fmt: skip
