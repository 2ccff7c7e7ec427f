"""Optimizers for embedding tables: lazy, a step touches the rows that were looked up and no others.

Each works in two ways. As a ``torch.optim.Optimizer`` its ``step`` takes the coalesced sparse gradients that
``sparse=True`` gives: clip them, accumulate them, all-reduce them first if you like. Fused (``fuse``), the step happens
in the backward, and no gradient is ever stored.

The state is named and shaped like that of torch's optimizers ("step", "sum"; "step", "exp_avg", "exp_avg_sq"), so that
``load_state_dict`` takes theirs, and ``to_torch`` gives it back; it is float32 for tables in 16 bits.

Mixed precision: ``torch.amp.GradScaler.step`` works with stepped optimizers as with torch's. A fused one is given the
scaler (``fuse(module, optimizer, grad_scaler=scaler)``): it divides by the scale, in the precision of the state, and a
backward with an infinity or a NaN in a gradient changes nothing. Its tables have no ``grad``, so what makes the scaler
lower the scale is what its other optimizers see of the same backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rankkernels.nn.embedding import fused_weight
from rankkernels.ops._library import is_transformed, use_huge_pages
from rankkernels.ops.embedding_bag_update import OPTIMIZERS
from rankkernels.ops.fused_step import Gate, check_not_distributed

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RowWiseAdagrad", "fuse", "to_torch"]


def _coalesced(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, ascending, and values. Autograd drops the mark of a coalesced gradient where it stores it in ``grad``."""
    rows = grad._indices()[0]
    if not grad.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


#: What torch's groups have and ours have not, all without effect on the numbers once _check_kind has passed.
_TORCHS = {"momentum", "dampening", "nesterov", "amsgrad", "maximize", "foreach", "capturable", "differentiable",
           "fused", "decoupled_weight_decay"}  # fmt: skip
#: What says how to step, and no group can have otherwise.
_FIXED = ("decoupled_weight_decay",)


class _RowOptimizer(torch.optim.Optimizer):
    """``_kind`` is one of ``OPTIMIZERS``; ``_states`` names its state, one value an element of the table or a row."""

    _step_supports_amp_scaling = True  # GradScaler.step sets grad_scale and found_inf for the time of a step
    grad_scaler: torch.amp.GradScaler | None = None  # of a fused optimizer

    _kind: str
    _states: tuple[str, ...] = ()
    _one_a_row = False

    def __init__(self, params: Iterable, **defaults):
        self._gates: dict[torch.device, Gate] = {}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"grad_scaler": self.grad_scaler}

    def __setstate__(self, state: dict) -> None:
        self._gates = {}
        super().__setstate__(state)

    def add_param_group(self, param_group: dict) -> None:
        """As ``torch.optim.Optimizer``. Raises a ValueError, and adds nothing, for what the constructor refuses."""
        groups = list(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups[:] = groups
            raise
        self._gates.clear()

    def _check(self, group: dict) -> None:
        """Raises a ValueError for hyperparameters that are no numbers to step with, and for what is no table."""
        dtypes = [torch.float32]
        for p in group["params"]:
            if p.dim() != 2 or not p.is_floating_point():
                raise ValueError(f"{type(self).__name__}: tables must be floating-point [R, D], got {list(p.shape)}")
            dtypes.append(torch.promote_types(p.dtype, torch.float32))

        def check(name: str, fits: Callable[[float], bool], rule: str) -> None:
            try:
                good = fits(float(group[name]))
            except (TypeError, ValueError, RuntimeError):
                good = False
            if not good:
                raise ValueError(f"{type(self).__name__}: {name} must {rule}, got {group[name]}")

        not_negative = [
            name for name in ("lr", "weight_decay", "lr_decay", "initial_accumulator_value") if name in group
        ]
        for name in not_negative:
            check(name, lambda x: 0 <= x < math.inf, "not be negative, infinite or NaN")
        betas = group["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= float(b) < 1 for b in betas)):
            raise ValueError(f"{type(self).__name__}: betas must be two numbers in [0, 1), got {betas}")
        if group["max_row_norm"] is not None:
            check("max_row_norm", lambda x: x > 0, "be positive or None")
        if not self._states or float(group.get("initial_accumulator_value", 0)) > 0:
            return check("eps", lambda x: 0 <= x < math.inf, "not be negative, infinite or NaN")
        # A row whose gradients have all been zero is divided by it, in the state's precision.
        least = max(torch.finfo(dtype).tiny for dtype in dtypes[1:] or dtypes)
        check("eps", lambda x: least <= x < math.inf, f"be at least {least}, the least normal number of the state")

    def _state_of(self, p: Tensor, group: dict) -> dict:
        """The state of ``p``, or a new one, which is not its state yet."""
        return self.state.get(p) or {"step": 0, **self._new_state(p, group)}

    def _new_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """The state's tensors for ``p``. What a row has in each lies side by side, so that a step finds it in one
        place; so two moments are views of one tensor."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        shape = p.shape[0], len(self._states), *([] if self._one_a_row else p.shape[1:])
        whole = torch.full(shape, group.get("initial_accumulator_value", 0.0), dtype=dtype, device=p.device)
        use_huge_pages(whole)
        return dict(zip(self._states, whole.unbind(1)))

    def _hyper(self, group: dict, step: int, scale: float) -> list[float]:
        """The op's ``hyper`` of a step, for a gradient times ``scale``."""
        beta1, beta2 = group["betas"]
        return [
            self._learning_rate(group, step), float(beta1), float(beta2), float(group["eps"]),
            float(group["weight_decay"]), float(step), 1 / scale, float(group["max_row_norm"] or 0.0),
        ]  # fmt: skip

    def _take(
        self, op, params: Sequence[Tensor], groups: Sequence[dict], scale: float, before: tuple, after: tuple = ()
    ):
        """A step of the op on ``params``, of one group each; its arguments are ``before``, the states, ``after``, the
        optimizer and the hyperparameters. -> what it returns.

        The step and its count are one call of C: an interrupt (Ctrl-C) comes before both or after both, and where the
        op raises, nothing has changed.
        """
        states, tensors, hyper, hypers = [self._state_of(p, g) for p, g in zip(params, groups)], [], [], {}
        for state, group in zip(states, groups):
            key = id(group), state["step"]  # mostly one for all tables
            if key not in hypers:
                hypers[key] = self._hyper(group, state["step"] + 1, scale)
            tensors += [state[name] for name in self._states]
            hyper += hypers[key]
        calls = [partial(op._op, *before, tensors, *after, OPTIMIZERS.index(self._kind), hyper)]
        for p, state in zip(params, states):
            calls.append(partial(state.__setitem__, "step", state["step"] + 1))
            if self.state.get(p) is not state:
                calls.append(partial(self.state.__setitem__, p, state))
        calls.append(partial(torch.autograd.graph.increment_version, list(params)))
        return list(map(partial.__call__, calls))[0]

    def _learning_rate(self, group: dict, step: int) -> float:
        return float(group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One step on the rows of every sparse gradient.

        Raises:
            RuntimeError: a gradient is dense: every row of it would have to be touched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if float(getattr(self, "found_inf", 0)) > 0:
            return loss
        scale = getattr(self, "grad_scale", None)  # None: the scaler has divided by it
        scale = 1.0 if scale is None else float(scale)
        given = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in given:
            if not p.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of a table of shape {list(p.shape)} is dense; make it "
                    "with sparse=True, or take torch.optim's"
                )
            if p.grad.sparse_dim() != 1:
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of a table of shape {list(p.shape)} must have rows of values "
                    f"and so one sparse dimension, got {p.grad.sparse_dim()}"
                )
            self._check_state(p)
        steps = [(p, group, *_coalesced(p.grad)) for p, group in given]
        for p, group, rows, values in steps:
            self._take(torch.ops.rankkernels.sparse_update.default, [p], [group], scale, (p,), (rows, values))
        return loss

    def _check_state(self, p: Tensor) -> None:
        """Raises a RuntimeError if ``p`` has another shape than when its state was made."""
        for name in self._states if p in self.state else ():
            shape = self.state[p][name].shape
            if shape != (p.shape[:1] if self._one_a_row else p.shape):
                raise RuntimeError(
                    f"{type(self).__name__}: a table of shape {list(p.shape)} has {name} of shape {list(shape)}: it "
                    "was replaced after its state was made"
                )

    def gate(self, weights: Sequence[Tensor]) -> Gate:
        """What decides when a fused step of ``weights`` is taken: see ``rankkernels.ops.fused_step``.

        Raises:
            ValueError: a table is frozen, has hooks on its gradient or is not among the params.
            RuntimeError: DistributedDataParallel is to reduce their gradients; forward mode, ``torch.func``.
        """
        if is_transformed():
            raise RuntimeError(
                f"{type(self).__name__}: a fused optimizer steps in an ordinary backward, not in forward mode nor "
                "under torch.func"
            )
        check_not_distributed(self, weights)
        for t, weight in enumerate(weights):
            if not weight.requires_grad:
                raise ValueError(f"{type(self).__name__}: table {t} of shape {list(weight.shape)} is frozen")
            if weight._backward_hooks or weight._post_accumulate_grad_hooks:
                raise ValueError(
                    f"{type(self).__name__}: table {t} of shape {list(weight.shape)} has hooks on its gradient, and a "
                    "fused step makes none"
                )
        device = weights[0].device
        gate = self._gates.get(device)
        if gate is None or not gate.holds(weights):
            self._groups_of(weights)
            tables = [p for group in self.param_groups for p in group["params"] if p.device == device]
            gate = self._gates[device] = Gate(self, [p for p in tables if p.requires_grad])
        return gate

    def _groups_of(self, weights: Sequence[Tensor]) -> list[dict]:
        """The group of each table. Raises a ValueError for one that is not among the params."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        groups = [group_of.get(id(weight)) for weight in weights]
        for t, (weight, group) in enumerate(zip(weights, groups)):
            if group is None:
                raise ValueError(
                    f"{type(self).__name__}: table {t} of shape {list(weight.shape)} is not among its params"
                )
        return groups

    @torch.no_grad()
    def update(self, grad_outs: list, weights: Sequence[Tensor], lists: Sequence, features: Sequence) -> list[Tensor]:
        """The step in the backward of a lookup, see ``rankkernels.table_batched_embedding_bag``."""
        groups = self._groups_of(weights)
        used = {features[0][f] for f, g in enumerate(grad_outs) if g is not None}
        if len(used) < len(weights):  # a table without a gradient takes no step
            place = {t: i for i, t in enumerate(sorted(used))}
            kept = [f for f, g in enumerate(grad_outs) if g is not None]
            tables, modes, padding_idx, frozen_rows = features
            features = (
                [place[tables[f]] for f in kept],
                [modes[f] for f in kept],
                [padding_idx[f] for f in kept],
                [frozen_rows[t] for t in place],
            )
            everywhere, lists = lists, [[values[f] for f in kept] if values else [] for values in lists]
            grads = self.update([grad_outs[f] for f in kept], [weights[t] for t in place], lists, features)
            found = dict(zip(kept, grads))
            return [found.get(f, torch.zeros_like(w)) for f, w in enumerate(everywhere[2])]
        scale = 1.0
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler.get_scale()
            if not all(bool(g.isfinite().all()) for g in grad_outs if g is not None):
                return [torch.zeros_like(w) for w in lists[2]]
        op = torch.ops.rankkernels.embedding_bag_update.default
        return self._take(op, weights, groups, scale, (grad_outs, weights), (*lists, *features))

    def whole_gradients(self, weights: Sequence[Tensor], tables: Sequence[int]) -> bool:
        """Whether ``update`` must see the gradients of the lookups and ``update_fm`` does not do."""
        scaled = self.grad_scaler is not None and self.grad_scaler.is_enabled()
        return scaled or len(set(tables)) < len(weights)

    @torch.no_grad()
    def update_fm(self, grads: Sequence, weights: Sequence[Tensor], unchanged: bool, lists: Sequence,
                  features: Sequence) -> Tensor:  # fmt: skip
        """The step in the backward of ``rankkernels.embedding_fm`` -> the gradient of the linear weights."""
        op = torch.ops.rankkernels.embedding_fm_update.default
        before = *grads, weights, unchanged
        return self._take(op, weights, self._groups_of(weights), 1.0, before, (*lists, *features))[1]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As ``torch.optim.Optimizer``, but state keeps its precision where the tables have less.

        Takes that of torch's optimizer of the same name (``SparseAdam`` for ``Adam``) over the same tables, too; what
        it does not say, like a weight decay for ``SparseAdam``, stays as it was given to this optimizer.

        Raises:
            ValueError: it is of an optimizer of another kind, or of one with momentum, amsgrad or maximize, or has
                hyperparameters that the constructor refuses. The optimizer is then as it was.
        """
        self._check_kind(state_dict["param_groups"])
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(state_dict)
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            groups = [self._merged(group, old) for group, old in zip(self.param_groups, before["param_groups"])]
            self.param_groups[:] = groups
            group_of = [(p, group) for group in groups for p in group["params"]]
            for i, (p, group) in zip(ids, group_of):
                if saved := state_dict["state"].get(i):
                    self.state[p] = self._loaded(i, p, group, saved)
        except BaseException:
            self.__dict__.update(before)
            raise

    def _check_kind(self, groups: Sequence[dict]) -> None:
        """Raises a ValueError for groups of another kind of optimizer, which goes by the names in them."""
        for group in groups:
            for name in ("momentum", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{type(self).__name__}: there is no {name} here, the state to load has it")
            ours = "max_row_norm" in group
            if not (ours or self._is_torchs(set(group))) or any(
                name in self.defaults and name in group and group[name] != self.defaults[name] for name in _FIXED
            ):
                raise ValueError(
                    f"{type(self).__name__}: the state to load is of an optimizer of another kind, with "
                    + ", ".join(f"{name} {value}" for name, value in group.items() if name != "params")
                )

    @staticmethod
    def _is_torchs(names: set[str]) -> bool:
        """Whether a group with these names is of torch's optimizer of this kind."""
        return False

    def _merged(self, group: dict, old: dict) -> dict:
        """A loaded group without what only torch's optimizers have, and with what they have not, checked."""
        group = {**old, **{name: value for name, value in group.items() if name in old or name not in _TORCHS}}
        self._check(group)
        return group

    def _loaded(self, i: int, p: Tensor, group: dict, saved: dict) -> dict:
        """The state of ``p`` from a saved one. Raises a ValueError if that is of another kind."""
        shape, step = p.shape[:1] if self._one_a_row else p.shape, saved.get("step", 0)
        saved = {name: value for name, value in saved.items() if value is not None}  # SGD's momentum_buffer
        names = {"step", *self._states}
        if not names >= set(saved) >= set(self._states) or any(
            not isinstance(saved[name], Tensor) or saved[name].shape != shape for name in self._states
        ):
            raise ValueError(
                f"{type(self).__name__}: the state of table {i} must have "
                + (" and ".join(f"{name} of shape {list(shape)}" for name in self._states) or "a step alone")
                + ", got " + ", ".join(f"{k} {list(getattr(v, 'shape', []))}" for k, v in saved.items())
            )  # fmt: skip
        try:
            count = int(step)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            count = -1
        if count < 0 or count != step:
            raise ValueError(f"{type(self).__name__}: the state of table {i} must have a number of steps, got {step!r}")
        state = self._new_state(p, group)
        for name in self._states:
            state[name].copy_(saved[name])
        return {"step": count, **state}


class SGD(_RowOptimizer):
    """w -= lr g on the rows looked up; equal to ``torch.optim.SGD`` on sparse gradients.

    Args:
        params: tables [R, D] or groups of them.
        lr: the learning rate, a number or a tensor.
        weight_decay: adds weight_decay w to the gradient of each row looked up.
        max_row_norm: of each row looked up, the gradient is clipped to this norm (all optimizers have it).
    """

    _kind = "sgd"

    @staticmethod
    def _is_torchs(names):
        return {"dampening", "nesterov"} <= names

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, weight_decay: float = 0.0, max_row_norm: float | None = None
    ):
        super().__init__(params, lr=lr, betas=(0.0, 0.0), eps=0.0, weight_decay=weight_decay, max_row_norm=max_row_norm)


class Adagrad(_RowOptimizer):
    """Equal to ``torch.optim.Adagrad`` on sparse gradients.

    s += g^2, w -= lr / (1 + (t - 1) lr_decay) g / (sqrt s + eps), elementwise.
    """

    _kind, _states = "adagrad", ("sum",)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        max_row_norm: float | None = None,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=(0.0, 0.0),
            eps=eps,
            weight_decay=weight_decay,
            max_row_norm=max_row_norm,
            lr_decay=lr_decay,
            initial_accumulator_value=initial_accumulator_value,
        )

    @staticmethod
    def _is_torchs(names):
        return {"lr_decay", "initial_accumulator_value"} <= names

    def _learning_rate(self, group, step):
        return float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"]))


class RowWiseAdagrad(_RowOptimizer):
    """One accumulator a row: s += mean g^2, w -= lr g / (sqrt s + eps); FBGEMM's EXACT_ROWWISE_ADAGRAD."""

    _kind, _states, _one_a_row = "rowwise_adagrad", ("sum",), True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        max_row_norm: float | None = None,
    ):
        super().__init__(params, lr=lr, betas=(0.0, 0.0), eps=eps, weight_decay=weight_decay, max_row_norm=max_row_norm)


class Adam(_RowOptimizer):
    """Equal to ``torch.optim.SparseAdam``: the moments of a row move only when it is looked up.

    ``weight_decay`` adds weight_decay w to the gradient of each row looked up (SparseAdam has none).
    """

    _kind, _states = "adam", ("exp_avg", "exp_avg_sq")
    _decoupled = False  # torch's name and place for what tells Adam and AdamW apart in a state_dict

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_row_norm: float | None = None,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_row_norm=max_row_norm,
            decoupled_weight_decay=self._decoupled,
        )

    @staticmethod
    def _is_torchs(names):
        return "amsgrad" in names or ("betas" in names and "weight_decay" not in names)  # Adam or SparseAdam


class AdamW(Adam):
    """``torch.optim.AdamW`` on the rows looked up; equal to it where a batch looks up every row."""

    _kind = "adamw"
    _decoupled = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_row_norm: float | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, max_row_norm)

    @staticmethod
    def _is_torchs(names):
        return "amsgrad" in names


def to_torch(optimizer: _RowOptimizer, theirs: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Loads the state and the hyperparameters of ``optimizer`` into torch's optimizer over the same params; returns it.

    The way back is ``optimizer.load_state_dict(theirs.state_dict())``. ``theirs`` is ``torch.optim.SGD`` without
    momentum, ``Adagrad``, ``SparseAdam`` or ``Adam``, ``AdamW``. A dense optimizer goes on from the same numbers, but
    from then on its moments decay in every step, of a row that no batch looks up as well.

    Raises:
        ValueError: ``theirs`` is of another kind or over tables of other shapes, or has no place for what is set here,
            or something set that has no state here (momentum, amsgrad, maximize). It is then as it was.
    """
    kinds = {"sgd": ("SGD",), "adagrad": ("Adagrad",), "adam": ("SparseAdam", "Adam"), "adamw": ("AdamW",)}
    if type(theirs).__name__ not in kinds.get(optimizer._kind, ()):
        raise ValueError(f"to_torch: {type(theirs).__name__} has no place for the state of {type(optimizer).__name__}")
    ours, state_dict = optimizer.state_dict(), theirs.state_dict()
    if [[p.shape for p in g["params"]] for g in optimizer.param_groups] != [
        [p.shape for p in g["params"]] for g in theirs.param_groups
    ]:
        raise ValueError("to_torch: the optimizers must have the same groups of params")
    for group, own in zip(state_dict["param_groups"], ours["param_groups"]):
        for name in ("momentum", "amsgrad", "maximize"):
            if group.get(name):
                raise ValueError(f"to_torch: {type(theirs).__name__} has {name}, {type(optimizer).__name__} has none")
        for name in ("weight_decay", "max_row_norm"):
            if own[name] and name not in group:
                raise ValueError(f"to_torch: {type(theirs).__name__} has no {name}, and here it is {own[name]}")
    for group, own in zip(state_dict["param_groups"], ours["param_groups"]):
        group.update({name: own[name] for name in own if name in group})
    if optimizer._kind != "sgd":
        state_dict["state"] = {
            i: {
                "step": torch.tensor(float(state["step"])),
                **{s: state[s].clone(memory_format=torch.contiguous_format) for s in optimizer._states},
            }
            for i, state in ours["state"].items()
            if state
        }
    theirs.load_state_dict(state_dict)
    return theirs


def fuse(module: nn.Module, optimizer: _RowOptimizer, *, grad_scaler: torch.amp.GradScaler | None = None) -> nn.Module:
    """Lets ``optimizer`` step in the backward of every ``EmbeddingLayer``, ``EmbeddingBag`` and
    ``TableBatchedEmbeddingBag`` in ``module``, whose tables must all be among its params. Returns ``module``.

    Each lookup's backward is a step of its tables, so look a table up once a batch: features that share a table in one
    layer are one lookup, a layer that is called twice is two, and then two steps are taken, as on two batches. Their
    ``grad`` stays None. ``optimizer.state_dict`` holds the state, ``optimizer.step`` does nothing. With
    ``grad_scaler`` the backward is taken to be of a loss that it scaled.

    Raises:
        ValueError: there is no such layer in ``module``, or one has a table that is frozen, not among the params, or
            looked up by a module of its own (``max_norm`` in an ``nn.Embedding``, ``scale_grad_by_freq``, subclasses).
    """
    params = {p for group in optimizer.param_groups for p in group["params"]}
    layers = {name: m for name, m in module.named_modules() if hasattr(type(m), "fused_optimizer")}
    if not layers:
        raise ValueError(f"fuse: {type(module).__name__} has no layer of embedding tables")
    for layer_name, layer in layers.items():
        for name, p in layer.named_parameters():
            full = ".".join(part for part in (layer_name, name) if part)
            if not p.requires_grad:
                raise ValueError(f"fuse: table {full} is frozen")
            if p not in params:
                raise ValueError(f"fuse: table {full} is not among the optimizer's params")
        for name, m in layer.named_modules():
            full = ".".join(part for part in (layer_name, name) if part)
            if (isinstance(m, nn.Embedding) and fused_weight(m) is None) or getattr(m, "scale_grad_by_freq", False):
                raise ValueError(f"fuse: table {full} is looked up by a module of its own: {m}")
    optimizer.grad_scaler = grad_scaler
    for layer in layers.values():
        layer.fused_optimizer = optimizer
        for p in layer.parameters():
            use_huge_pages(p)
    return module
