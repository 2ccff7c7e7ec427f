"""Optimizers for embedding tables: lazy, a step touches the rows that were looked up and no others.

Each works in two ways. As a ``torch.optim.Optimizer`` its ``step`` takes the coalesced sparse gradients that
``sparse=True`` gives: clip them, accumulate them, all-reduce them first if you like. Fused (``fuse``), the step happens
in the backward, and no gradient is ever stored.

The state is named and shaped like that of torch's optimizers ("step", "sum"; "step", "exp_avg", "exp_avg_sq"), so that
``load_state_dict`` takes theirs, and ``to_torch`` gives it back; it is float32 for tables in 16 bits.

``weight_decay`` concerns the rows looked up. A dense optimizer decays every row in every step, and dense Adam with
coupled decay (torch-rechub's trainer, 1e-5) takes rows that are seen rarely to zero, by about ``lr`` a step whatever
the decay is: with it and without it, densely and lazily, other models are trained.

Mixed precision: ``torch.amp.GradScaler.step`` works with stepped optimizers as with torch's. A fused one is given the
scaler (``fuse(module, optimizer, grad_scaler=scaler)``): it divides by the scale, in the precision of the state, and a
backward with an infinity or a NaN in a gradient changes nothing. Fused tables have no ``grad``, so GradScaler detects
overflow through the other parameters of the same backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rankkernels._fbgemm import from_fbgemm, to_fbgemm
from rankkernels._fuse import fuse
from rankkernels._row_optimizer import RowOptimizer

__all__ = [
    "FTRL", "SGD", "Adagrad", "Adam", "AdamW", "RowWiseAdagrad", "RowWiseAdam", "RowWiseRMSprop", "from_fbgemm", "fuse",
    "to_fbgemm", "to_torch",
]  # fmt: skip


class SGD(RowOptimizer):
    """w -= lr g on the rows looked up; equal to ``torch.optim.SGD`` on sparse gradients.

    Args:
        params: tables [R, D] or groups of them.
        lr: the learning rate, a number or a tensor.
        weight_decay: adds weight_decay w to the gradient of each row looked up.
        max_row_norm: of each row looked up, the gradient is clipped to this norm (all optimizers have it).
        capturable: keep learning rate, number of the step and loss scale on the tables' GPU, so that a CUDA graph may
            hold the step (all optimizers have it). The rate becomes a tensor, which schedulers write to.
        stochastic_rounding: round tables of 16 bits up or down at random, so that the mean is what was computed (all
            optimizers have it). Rounded to the nearest, as torch's optimizers do, steps below half of the distance to
            the next number are lost. The random bits are a function of a seed, which is drawn from torch's generator
            and saved with the state, and of step, table, row and column. State and wider tables are not rounded.
    """

    _kind = "sgd"

    @staticmethod
    def _is_torchs(names):
        return {"dampening", "nesterov"} <= names

    def __init__(
        self, params: Iterable, lr: float | Tensor = 1e-3, weight_decay: float = 0.0, max_row_norm: float | None = None,
        capturable: bool = False, stochastic_rounding: bool = False,
    ):  # fmt: skip
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, betas=(0.0, 0.0), eps=0.0, weight_decay=weight_decay,
            max_row_norm=max_row_norm,
        )  # fmt: skip


class Adagrad(RowOptimizer):
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
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, betas=(0.0, 0.0), eps=eps, weight_decay=weight_decay,
            max_row_norm=max_row_norm, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value,
        )  # fmt: skip

    @staticmethod
    def _is_torchs(names):
        return {"lr_decay", "initial_accumulator_value"} <= names

    def _learning_rate(self, group, step):
        return float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"]))


class RowWiseAdagrad(RowOptimizer):
    """One accumulator a row: s += mean g^2, w -= lr g / (sqrt s + eps); FBGEMM's EXACT_ROWWISE_ADAGRAD."""

    _kind, _states = "rowwise_adagrad", ("sum",)

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        max_row_norm: float | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, betas=(0.0, 0.0), eps=eps, weight_decay=weight_decay,
            max_row_norm=max_row_norm,
        )  # fmt: skip


class Adam(RowOptimizer):
    """Equal to ``torch.optim.SparseAdam``: the moments of a row move only when it is looked up.

    With ``exact`` equal to ``torch.optim.Adam`` on dense gradients, for every row, at the cost of the rows looked up: a
    lookup first brings its rows to where dense Adam has them by then, under any schedule of the learning rate. Whatever
    reads a table otherwise (``state_dict``, copies, pickles, torch's functions) brings all its rows there, and so does
    ``eval()`` of a layer. After ``flush`` its memory is up to date until the next step.

    Args:
        weight_decay: adds weight_decay w to the gradient of each row looked up (SparseAdam has none). With ``exact`` it
            must be 0: it would be a gradient of all rows.
        exact: follow dense Adam.

    Raises:
        ValueError: also for ``exact`` with ``stochastic_rounding``, with betas of which the second does not fade much
            more slowly than the first, or with a table that is a subclass of torch's tensors.
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
        exact: bool = False,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            max_row_norm=max_row_norm, decoupled_weight_decay=self._decoupled,
        )  # fmt: skip
        if exact and capturable:
            raise ValueError(f"{type(self).__name__}: exact=True counts on the host, so it is not capturable")
        if exact:
            self._follow_dense()

    @staticmethod
    def _is_torchs(names):
        return "amsgrad" in names or ("betas" in names and "weight_decay" not in names)  # Adam or SparseAdam


class AdamW(Adam):
    """``torch.optim.AdamW`` on the rows looked up; equal to it where a batch looks up every row.

    With ``exact`` equal to it on dense gradients, for every row, at the cost of the rows looked up: see ``Adam``.
    """

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
        exact: bool = False,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, max_row_norm, exact, capturable, stochastic_rounding)

    @staticmethod
    def _is_torchs(names):
        return "amsgrad" in names


class RowWiseAdam(RowOptimizer):
    """``AdamW`` with one second moment a row: v += (1 - beta2) (mean g^2 - v); FBGEMM's PARTIAL_ROWWISE_ADAM.

    State: D + 1 values a row, ``exp_avg`` [R, D] and ``exp_avg_sq`` [R]. ``weight_decay`` takes lr weight_decay w off
    each row looked up, before the step.
    """

    _kind, _states = "rowwise_adam", ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_row_norm: float | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            max_row_norm=max_row_norm,
        )  # fmt: skip


class RowWiseRMSprop(RowOptimizer):
    """RMSprop with one second moment a row and adaptive regularization; FBGEMM's ROWWISE_RMSPROP_AR.

    v += (1 - ema_beta) (mean g^2 - v), w -= min(lr ar_alpha I, 1 - min_shrinkage) w, w -= lr g / (sqrt v + eps), where
    I is the number of the table's steps since the row was last looked up, 1 the first time. A row decays by how long it
    was away, and pays when it comes back: Li and Lyu (arXiv 2511.06374) hold the norms of rare rows down so, against
    overfitting after one epoch. State: 2 values a row, ``exp_avg_sq`` [R] and ``last_step`` [R], a step of the table.

    Args:
        params: tables [R, D] or groups of them.
        lr: the learning rate, a number or a tensor.
        ema_beta: what v keeps of itself in a step, in [0, 1).
        eps: added to the root of v.
        ar_alpha: strength of the decay; 0 leaves row-wise RMSprop.
        min_shrinkage: at least this part of a row survives its decay, in [0, 1]; 0 lets a row start anew.
        max_row_norm: of each row looked up, the gradient is clipped to this norm.
    """

    _kind, _states = "rowwise_rmsprop", ("exp_avg_sq", "last_step")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        ema_beta: float = 0.99,
        eps: float = 1e-8,
        ar_alpha: float = 0.0,
        min_shrinkage: float = 0.1,
        max_row_norm: float | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, ema_beta=ema_beta, eps=eps, ar_alpha=ar_alpha,
            min_shrinkage=min_shrinkage, max_row_norm=max_row_norm,
        )  # fmt: skip


class FTRL(RowOptimizer):
    """FTRL-proximal (McMahan et al. 2013), elementwise: weights that l1 holds at zero are exactly zero.

    z += g - ((n + g^2)^p - n^p) / lr w, n += g^2, with p = -lr_power; then w = 0 where abs(z) <= l1, else
    w = -(z - sign(z) l1) / ((beta + n^p) / lr + l2). With beta = l1 = l2 = 0 it is ``Adagrad`` with eps = 0.

    State: 2 D values a row, ``z`` and ``n`` [R, D], zeros at first. A row's first step keeps n^p / (beta + n^p) of its
    initial values: start from zeros, or with beta = 0, where those matter. Padding rows and rows that no batch looks up
    stay as they are, also where l1 would hold them at zero. TensorFlow's l2_regularization_strength is half of this l2.

    Args:
        params: tables [R, D] or groups of them.
        lr: the paper's alpha, positive, a number or a tensor. The weights are computed from z, n and ``lr``, so another
            rate would scale every row at its next lookup: once a table has stepped, a changed rate raises a
            RuntimeError.
        lr_power: 0 or negative; -0.5 is the paper's.
        beta: the paper's beta: the rate of an element's first step is about lr / beta.
        l1: elements whose abs(z) does not exceed it are zero.
        l2: shrinks weights.
        max_row_norm: of each row looked up, the gradient is clipped to this norm.
    """

    _kind, _states = "ftrl", ("z", "n")

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        lr_power: float = -0.5,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        max_row_norm: float | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ):
        super().__init__(
            params, capturable, stochastic_rounding, lr=lr, lr_power=lr_power, beta=beta, l1=l1, l2=l2,
            max_row_norm=max_row_norm, stepped_lr=None,
        )  # fmt: skip

    def _check(self, group: dict) -> None:
        super()._check(group)
        least = torch.finfo(torch.float32).tiny  # the kernels divide by it
        if not float(group["lr"]) >= least:
            raise ValueError(f"FTRL: lr must be positive, got {group['lr']}")

    def _learning_rate(self, group: dict, step: int) -> float:
        lr = float(group["lr"])
        if group["stepped_lr"] is None:
            group["stepped_lr"] = lr
        if lr != group["stepped_lr"]:
            raise RuntimeError(
                f"FTRL: lr is {lr} and was {group['stepped_lr']} when the tables first stepped: weights are computed "
                "from the state and lr, so another rate would scale each row at its next lookup. Keep it, or take "
                "Adagrad under a schedule"
            )
        return lr


def _check_range(states: dict[int, dict[str, Tensor]], names: Sequence[str], params: list[Tensor]) -> None:
    """Raises where torch, which keeps what has these ``names`` in a param's dtype, would make a number infinite."""
    for i, state in states.items():
        dtype = params[i].dtype
        for name in names:
            values = state[name]
            if values.numel() and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
                most = values.abs().max().item()
                if torch.finfo(dtype).max < most < float("inf"):
                    raise ValueError(f"to_torch: {name} of table {i} has {most:g}, which {dtype} has no number for")


def to_torch(optimizer: RowOptimizer, theirs: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Loads the state and the hyperparameters of ``optimizer`` into torch's optimizer over the same params; returns it.

    The way back is ``optimizer.load_state_dict(theirs.state_dict())``. ``theirs`` is ``torch.optim.SGD`` without
    momentum, ``Adagrad``, ``SparseAdam`` or ``Adam``, ``AdamW``. A dense optimizer goes on from the same numbers, but
    from then on its moments decay in every step, of a row that no batch looks up as well.

    Raises:
        ValueError: ``theirs`` is of another kind or over tables of other shapes, or has no place for what is set here,
            or something set that has no state here (momentum, amsgrad, maximize), or keeps numbers in the tables' dtype
            that are too large for it (float16). It is then as it was.
    """
    kinds = {"sgd": ("SGD",), "adagrad": ("Adagrad",), "adam": ("SparseAdam", "Adam"), "adamw": ("AdamW",)}
    if type(theirs).__name__ not in kinds.get(optimizer._kind, ()):
        raise ValueError(f"to_torch: {type(theirs).__name__} has no place for the state of {type(optimizer).__name__}")
    if optimizer._exact and type(theirs).__name__ == "SparseAdam":
        raise ValueError(
            "to_torch: SparseAdam has no place for the state of Adam with exact=True: take torch.optim.Adam"
        )
    ours, state_dict = optimizer.state_dict(), theirs.state_dict()
    if [[p.shape for p in g["params"]] for g in optimizer.param_groups] != [
        [p.shape for p in g["params"]] for g in theirs.param_groups
    ]:
        raise ValueError("to_torch: the optimizers must have the same groups of params")
    for group, own in zip(state_dict["param_groups"], ours["param_groups"]):
        for name in ("momentum", "amsgrad", "maximize"):
            if group.get(name):
                raise ValueError(f"to_torch: {type(theirs).__name__} has {name}, {type(optimizer).__name__} has none")
        for name in ("weight_decay", "max_row_norm", "stochastic_rounding"):
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
        params = [p for g in theirs.param_groups for p in g["params"]]
        _check_range(state_dict["state"], optimizer._states, params)
    theirs.load_state_dict(state_dict)
    return theirs
