"""Tables under exact Adam: rows lag behind dense Adam's until somebody reads them.

The table itself sees to that. It becomes an ``ExactParameter``, which torch asks before any of its functions reads the
table; lookups, ours and torch's, then bring their rows up to date, and everything else (``state_dict``, ``detach``,
arithmetic, copies, pickles) all rows. Values change in place, but only those that nobody has read since the last step:
autograd need not know.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels.ops._features import Features
from rankkernels.ops._idle_steps import Clock, new_history
from rankkernels.ops._tracing import is_transformed, plain_classes

_ops = torch.ops.rankkernels
#: Within, tables are read as they are, and not asked for each attribute, which takes a microsecond.
as_plain = torch._C.DisableTorchFunctionSubclass
#: Steps of a history. When it is full its tables are brought up to date, and it begins again.
MOST_STEPS = 16384


class StepHistory:
    """The steps that some tables have taken together since ``base``, when their rows were all up to date."""

    def __init__(self, betas: tuple[float, float], eps: float, step: int):
        self.betas, self.eps, self.step, self.base, self.decay = betas, eps, step, step, 1.0
        self.numbers = new_history(64, *betas)
        self.ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()

    def fork(self, ledgers: Iterable[Ledger]) -> StepHistory:
        """A copy, which these of its tables follow from now on."""
        copy = StepHistory.__new__(StepHistory)
        copy.__dict__ = {**self.__dict__, "numbers": self.numbers.clone(), "ledgers": weakref.WeakSet()}
        for ledger in ledgers:
            self.ledgers.discard(ledger)
            ledger.follow(copy)
        return copy

    def begin_again(self, betas: tuple[float, float], eps: float) -> None:
        """Brings all tables up to date."""
        flush([ledger for ledger in self.ledgers if ledger.is_behind()])
        self.base, self.decay = self.step, 1.0
        if betas != self.betas:
            self.numbers = new_history(64, *betas, self.numbers.device)
        self.betas, self.eps = betas, eps

    def make_room(self, device: torch.device) -> None:
        """For one more step of tables on this device."""
        if self.numbers.device != device:
            self.numbers = self.numbers.to(device)
        length, used = self.numbers.size(0), self.step + 1 - self.base
        if used > MOST_STEPS or self.decay < 1e-100:
            self.begin_again(self.betas, self.eps)
        elif used == length:
            longer = new_history(min(4 * length, MOST_STEPS + 1), *self.betas, self.numbers.device)
            longer[:length, :-2] = self.numbers[:, :-2]
            self.numbers = longer

    def add(self, lr: float, weight_decay: float) -> list[Callable]:
        """Calls, of C alone, that add one step, for which there is room."""
        after = self.decay * (1 - lr * weight_decay)
        step = self.step + 1
        history = _ops.adam_history.default._op
        arguments = self.numbers, self.base, step, *self.betas, lr, self.decay, after
        return [partial(history, *arguments), partial(self.__dict__.update, step=step, decay=after)]

    def clock(self) -> Clock:
        return Clock(self.step, self.base, self.decay, self.eps)


class Ledger:
    """What a table's rows have yet to catch up with."""

    def __init__(self, table: Tensor, history: StepHistory):
        self.table = weakref.ref(table)
        self.states: Sequence[Tensor] = ()  # the moments, none before the first step
        self.last_steps: Tensor | None = None
        self.flushed = history.step  # the step that all rows are as of
        self.follow(history)

    def follow(self, history: StepHistory) -> None:
        self.history = history
        history.ledgers.add(self)

    def close(self) -> None:
        """Brings the table up to date for good."""
        flush([self])
        self.history.ledgers.discard(self)
        self.last_steps = None

    def is_behind(self) -> bool:
        return self.flushed != self.history.step and self.last_steps is not None


class _Exact:
    """A tensor that is brought up to date before it is read. Copies and pickles are plain tensors again."""

    ledger: Ledger | None = None  # none where torch made another of this class

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _READ_NOTHING and not _is_given_tables(func):
            _before(func, args, kwargs)
        with as_plain():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._plain(self.detach().clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        return self._plain(self.detach()).__reduce_ex__(protocol)

    def _plain(self, values: Tensor) -> Tensor:
        plain = nn.Parameter(values) if isinstance(self, nn.Parameter) else values
        return plain.requires_grad_(self.requires_grad)


class ExactParameter(_Exact, nn.Parameter):
    """A parameter under exact Adam."""


class ExactTensor(_Exact, Tensor):
    """A tensor that is no parameter, under exact Adam."""


_EXACT = {nn.Parameter: ExactParameter, Tensor: ExactTensor}
plain_classes.update(_EXACT.values())
#: Whether there has been such a table in this process: lookups without ask no further.
in_use = False


def attach(table: Tensor, history: StepHistory) -> Ledger:
    """Lets ``table`` follow ``history``. Raises a ValueError for a subclass of torch's tensors."""
    global in_use
    if is_exact(table):
        table.ledger.close()  # of an optimizer before this one
    elif type(table) in _EXACT:
        table.__class__ = _EXACT[type(table)]
    else:
        raise ValueError(f"exact=True takes plain tensors and parameters, got {type(table).__name__}")
    table.ledger = Ledger(table, history)
    in_use = True
    return table.ledger


def is_exact(value: object) -> bool:
    """Whether ``value`` is a table under exact Adam."""
    return isinstance(value, _Exact) and value.ledger is not None


def exact_tables(values: Iterable) -> list[Tensor]:
    """Those of ``values``, which may be anything, that are under exact Adam; they are looked for in lists, too."""
    found = []
    for value in values:
        if is_exact(value):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += exact_tables(value)
    return found


def of_each(tables: Sequence[Tensor]) -> tuple[list, ...]:
    """The catch-up ops' first arguments, and the clocks."""
    ledgers = [table.ledger for table in tables]
    states = [state for ledger in ledgers for state in ledger.states]
    histories = [ledger.history.numbers for ledger in ledgers]
    clocks = [number for ledger in ledgers for number in ledger.history.clock()]
    return list(tables), states, [ledger.last_steps for ledger in ledgers], histories, clocks


@torch.no_grad()
def flush(ledgers: Iterable[Ledger]) -> None:
    """Brings every row of these tables up to date."""
    behind = [ledger for ledger in ledgers if ledger.is_behind() and ledger.table() is not None]
    if behind:
        *arguments, clocks = of_each([ledger.table() for ledger in behind])
        with as_plain():
            _ops.embedding_catch_up_all.default(*arguments, clocks)
        for ledger in behind:
            ledger.flushed = ledger.history.step


def flush_tables(values: Iterable) -> None:
    """Brings every row up to date of the tables under exact Adam among ``values``."""
    flush([table.ledger for table in exact_tables(values)])


def were_flushed(tables: Iterable[Tensor]) -> bool:
    """Whether one of these was brought up to date as a whole since its last step, which rounds."""
    return any(is_exact(table) and table.ledger.flushed == table.ledger.history.step > 0 for table in tables)


@torch.no_grad()
def catch_up(weights: Sequence[Tensor], features: Features, names: str = "") -> None:
    """Brings the rows up to date that ``features`` look up in ``weights``, whichever of these are under exact Adam."""
    behind = [t for t, w in enumerate(weights) if is_exact(w) and w.ledger.is_behind()]
    if not behind:
        return
    if is_transformed():  # ids may be a batch of vmap's: which rows they name is not to be seen
        return flush_tables(weights)
    if len(behind) < len(weights):
        kept = [f for f, t in enumerate(features.tables) if t in behind]
        if not kept:
            return
        behind, features = features.subset(kept)
        names = ""
    *arguments, clocks = of_each([weights[t] for t in behind])
    with as_plain():
        _ops.embedding_catch_up.default(*arguments, *features, names, clocks)


def any_exact(weights: Sequence[Tensor]) -> bool:
    """Whether one of these is under exact Adam."""
    return any(map(is_exact, weights))


def lag_behind(weights: Sequence[Tensor], features: Features) -> bool:
    """Whether ops that catch up by themselves take these lookups: all tables are behind, and a backward, if there is
    one, reads none of their values."""
    if features.need_values() or is_transformed():
        return False
    return all(is_exact(w) and w.ledger.is_behind() for w in weights)


def read(run: Callable, weights: Sequence[Tensor], features: Features, names: str, by_itself: bool = False):
    """What ``run`` returns, which looks these features up, with their rows up to date: ``by_itself`` it does so."""
    if not by_itself:
        catch_up(weights, features, names)
    with as_plain():
        return run()


def _is_given_tables(func: Callable) -> bool:
    """Whether ``func`` is an op of ours whose callers see to it that the rows are up to date."""
    if getattr(func, "namespace", None) != "rankkernels":
        return False
    name = func.name().removeprefix("rankkernels::")
    return name.startswith("embedding_") or name in ("deepfm", "sparse_update", "use_huge_pages")


def _before(func: Callable, args: tuple, kwargs: dict) -> None:
    """Brings up to date what ``func`` is about to read."""
    if func in (F.embedding, F.embedding_bag):
        ids, weight, *_ = (*args, *(kwargs[n] for n in ("input", "weight") if n in kwargs))
        if is_exact(weight) and type(ids) is Tensor and ids.dtype in (torch.int32, torch.int64):
            return catch_up([weight], Features([ids], [], [], [0], [0], [-1], [-1]))
    flush_tables((*args, *kwargs.values()))


def _reads_nothing() -> set[Callable]:
    """Functions of tensors that depend on no value of theirs."""
    properties = (
        "_backward_hooks", "_base", "_post_accumulate_grad_hooks", "_version", "device", "dtype", "grad", "grad_dtype",
        "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_quantized", "is_sparse",
        "is_sparse_csr", "itemsize", "layout", "name", "names", "nbytes", "ndim", "output_nr", "requires_grad",
        "retains_grad", "shape",
    )  # fmt: skip
    methods = (
        "__len__", "backward", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
        "is_inference", "is_same_size", "is_shared", "ndimension", "nelement", "new_empty", "new_zeros", "numel",
        "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size",
        "storage_offset", "stride",
    )  # fmt: skip
    found = {getattr(Tensor, name) for name in methods if hasattr(Tensor, name)}
    for name in properties:
        slot = getattr(Tensor, name, None)
        found |= {getattr(slot, way) for way in ("__get__", "__set__", "__delete__") if hasattr(slot, way)}
    return found | {torch.autograd.backward, torch.autograd.grad, torch.empty_like, torch.is_complex,
                    torch.is_floating_point, torch.numel, torch.ones_like, torch.zeros_like}  # fmt: skip


_READ_NOTHING = _reads_nothing()
