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

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from rankkernels.nn.embedding import fused_weight
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops.embedding_bag import check_trainable
from rankkernels.ops.embedding_bag_update import OPTIMIZERS

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RowWiseAdagrad", "fuse", "to_torch"]


def _coalesced(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, ascending, and values. Autograd drops the mark of a coalesced gradient where it stores it in ``grad``."""
    rows = grad._indices()[0]
    if not grad.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


class _RowOptimizer(torch.optim.Optimizer):
    """``_kind`` is one of ``OPTIMIZERS``; ``_states`` names its state, one value an element of the table or a row."""

    _step_supports_amp_scaling = True  # GradScaler.step sets grad_scale and found_inf for the time of a step
    grad_scaler: torch.amp.GradScaler | None = None  # of a fused optimizer

    _kind: str
    _states: tuple[str, ...] = ()
    _one_a_row = False
    _initial = 0.0

    def __init__(self, params: Iterable, **defaults):
        for name in ("lr", "eps", "weight_decay", "max_row_norm"):
            if float(defaults[name] or 0) < 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {defaults[name]}")
        for beta in defaults["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"{type(self).__name__}: betas must be in [0, 1), got {defaults['betas']}")
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2 or not p.is_floating_point():
                    raise ValueError(
                        f"{type(self).__name__}: tables must be floating-point [R, D], got {list(p.shape)}"
                    )

    def _state_of(self, p: Tensor) -> dict:
        """The state of ``p``, made if there is none."""
        state = self.state[p]
        if not state:
            state |= {"step": 0, **self._new_state(p)}
        return state

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state's tensors for ``p``. What a row has in each lies side by side, so that a step finds it in one
        place; so two moments are views of one tensor."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        shape = p.shape[0], len(self._states), *([] if self._one_a_row else p.shape[1:])
        whole = torch.full(shape, self._initial, dtype=dtype, device=p.device)
        use_huge_pages(whole)
        return dict(zip(self._states, whole.unbind(1)))

    def _hyper(self, group: dict, step: int, scale: float) -> list[float]:
        """The op's ``hyper`` of a step, for a gradient times ``scale``."""
        beta1, beta2 = group["betas"]
        return [
            self._learning_rate(group, step), float(beta1), float(beta2), float(group["eps"]),
            float(group["weight_decay"]), float(step), 1 / scale, float(group["max_row_norm"] or 0.0),
        ]  # fmt: skip

    @contextlib.contextmanager
    def _step_of(self, params: Sequence[Tensor], groups: Sequence[dict], scale: float):
        """A step on ``params``, of one group each: the op's ``states`` and ``hyper`` for it; afterwards it counts."""
        states, tensors, hyper, hypers = [self._state_of(p) for p in params], [], [], {}
        for state, group in zip(states, groups):
            key = id(group), state["step"]  # mostly one for all tables
            if key not in hypers:
                hypers[key] = self._hyper(group, state["step"] + 1, scale)
            tensors += [state[name] for name in self._states]
            hyper += hypers[key]
        yield tensors, hyper
        for state in states:
            state["step"] += 1
        torch.autograd.graph.increment_version(list(params))

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
        for p, group in given:
            rows, values = _coalesced(p.grad)
            with self._step_of([p], [group], scale) as (states, hyper):
                torch.ops.rankkernels.sparse_update.default(
                    p, states, rows, values, OPTIMIZERS.index(self._kind), hyper
                )
        return loss

    def _groups_of(self, weights: Sequence[Tensor]) -> list[dict]:
        """The group of each table. Raises a ValueError for one that is frozen or not among the params."""
        check_trainable(self, weights)
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        groups = [group_of.get(weight) for weight in weights]
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
            if not all(bool(g.isfinite().all()) for g in grad_outs):
                return [torch.zeros_like(w) for w in lists[2]]
        with self._step_of(weights, groups, scale) as (states, hyper):
            return torch.ops.rankkernels.embedding_bag_update.default(
                grad_outs, weights, states, *lists, *features, OPTIMIZERS.index(self._kind), hyper
            )

    def whole_gradients(self, weights: Sequence[Tensor], tables: Sequence[int]) -> bool:
        """Whether ``update`` must see the gradients of the lookups and ``update_fm`` does not do."""
        scaled = self.grad_scaler is not None and self.grad_scaler.is_enabled()
        return scaled or len(set(tables)) < len(weights)

    @torch.no_grad()
    def update_fm(self, grads: Sequence, weights: Sequence[Tensor], unchanged: bool, lists: Sequence,
                  features: Sequence) -> Tensor:  # fmt: skip
        """The step in the backward of ``rankkernels.embedding_fm`` -> the gradient of the linear weights."""
        with self._step_of(weights, self._groups_of(weights), 1.0) as (states, hyper):
            _, grad_linear_weight = torch.ops.rankkernels.embedding_fm_update.default(
                *grads, weights, unchanged, states, *lists, *features, OPTIMIZERS.index(self._kind), hyper
            )
            return grad_linear_weight

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As ``torch.optim.Optimizer``, but state keeps its precision where the tables have less.

        Takes that of torch's optimizer of the same name (``SparseAdam`` for ``Adam``) over the same tables, too; what
        it does not say, like a weight decay for ``SparseAdam``, stays as it was given to this optimizer.

        Raises:
            ValueError: it is of an optimizer of another kind, or of one with momentum, amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for name in ("momentum", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{type(self).__name__}: there is no {name} here, the state to load has it")
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            saved = state_dict["state"].get(i)
            for name in self._states if saved else ():
                shape = p.shape[:1] if self._one_a_row else p.shape
                if name not in saved or saved[name].shape != shape:
                    raise ValueError(
                        f"{type(self).__name__}: the state of table {i} must have {name} of shape {list(shape)}, got "
                        + ", ".join(f"{k} {list(getattr(v, 'shape', []))}" for k, v in saved.items())
                    )
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before):
            for name in set(group) - set(old) - {"initial_lr"}:
                del group[name]
            for name in set(old) - set(group):
                group[name] = old[name]
        for i, p in zip(ids, params):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            state = self._new_state(p)
            for name in self._states:
                state[name].copy_(saved[name])
            self.state[p].update(state, step=int(saved.get("step", 0)))


class SGD(_RowOptimizer):
    """w -= lr g on the rows looked up; equal to ``torch.optim.SGD`` on sparse gradients.

    Args:
        params: tables [R, D] or groups of them.
        lr: the learning rate, a number or a tensor.
        weight_decay: adds weight_decay w to the gradient of each row looked up.
        max_row_norm: of each row looked up, the gradient is clipped to this norm (all optimizers have it).
    """

    _kind = "sgd"

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
        self._initial = initial_accumulator_value
        super().__init__(
            params,
            lr=lr,
            betas=(0.0, 0.0),
            eps=eps,
            weight_decay=weight_decay,
            max_row_norm=max_row_norm,
            lr_decay=lr_decay,
        )

    def _learning_rate(self, group, step):
        return float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])


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

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_row_norm: float | None = None,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_row_norm=max_row_norm)


class AdamW(Adam):
    """``torch.optim.AdamW`` on the rows looked up; equal to it where a batch looks up every row."""

    _kind = "adamw"

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_row_norm: float | None = None,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_row_norm=max_row_norm)


def to_torch(optimizer: _RowOptimizer, theirs: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Loads the state and the hyperparameters of ``optimizer`` into torch's optimizer over the same params; returns it.

    The way back is ``optimizer.load_state_dict(theirs.state_dict())``. ``theirs`` is ``torch.optim.SGD`` without
    momentum, ``Adagrad``, ``SparseAdam`` or ``Adam``, ``AdamW``. A dense optimizer goes on from the same numbers, but
    from then on its moments decay in every step, of a row that no batch looks up as well.

    Raises:
        ValueError: ``theirs`` is of another kind.
    """
    kinds = {"sgd": ("SGD",), "adagrad": ("Adagrad",), "adam": ("SparseAdam", "Adam"), "adamw": ("AdamW",)}
    if type(theirs).__name__ not in kinds.get(optimizer._kind, ()):
        raise ValueError(f"to_torch: {type(theirs).__name__} has no place for the state of {type(optimizer).__name__}")
    ours, state_dict = optimizer.state_dict(), theirs.state_dict()
    if [g["params"] for g in ours["param_groups"]] != [g["params"] for g in state_dict["param_groups"]]:
        raise ValueError("to_torch: the optimizers must have the same groups of params")
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
