"""What the settings of a group of ``rankkernels.optim``'s optimizers must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rankkernels.ops._checks import FLOATING

_NOT_NEGATIVE = (lambda x: 0 <= float(x) < math.inf), "not be negative, infinite or NaN"
#: What the settings of a group must be, whichever kind of optimizer has them.
_SETTINGS: dict[str, tuple[Callable, str]] = {
    **dict.fromkeys(("lr", "weight_decay", "lr_decay", "initial_accumulator_value", "beta", "l1", "l2",
                     "ar_alpha"), _NOT_NEGATIVE),
    "betas": (lambda x: len(x) == 2 and all(0 <= float(beta) < 1 for beta in x), "be two numbers in [0, 1)"),
    "ema_beta": (lambda x: 0 <= float(x) < 1, "be in [0, 1)"),
    "lr_power": (lambda x: -math.inf < float(x) <= 0, "be 0 or negative, and not infinite or NaN"),
    "min_shrinkage": (lambda x: 0 <= float(x) <= 1, "be in [0, 1]"),
    "stochastic_rounding": (lambda x: isinstance(x, bool), "be True or False"),
    "rounding_seed": (
        lambda x: x is None or (isinstance(x, int) and 0 <= x < 2**32), "be None or an integer below 2^32"
    ),
}  # fmt: skip


def check_group(optimizer: str, group: dict, has_state: bool) -> None:
    """Raises a ValueError for hyperparameters that are no numbers to step with, and for what is no table."""
    dtypes = [torch.float32]
    for p in group["params"]:
        if p.dim() != 2 or p.dtype not in FLOATING or p.layout != torch.strided:
            raise ValueError(
                f"{optimizer}: tables must be floating-point [R, D], got {list(p.shape)}, {p.dtype} and "
                f"{p.layout}, where float32, float64, float16 and bfloat16, strided, are served"
            )
        dtypes.append(torch.promote_types(p.dtype, torch.float32))

    def check(name: str, fits: Callable, rule: str) -> None:
        try:
            good = fits(group[name])
        except (TypeError, ValueError, RuntimeError):
            good = False
        if not good:
            raise ValueError(f"{optimizer}: {name} must {rule}, got {group[name]}")

    for name, (fits, rule) in _SETTINGS.items():
        if name in group:
            check(name, fits, rule)
    if group["max_row_norm"] is not None:
        tiny = torch.finfo(torch.float32).tiny  # the kernels flush less to 0, which means no clipping
        check("max_row_norm", lambda x: float(x) >= tiny, "be positive or None")
    # eps is all that divides a row whose gradients have all been zero, in the state's precision.
    least = max(torch.finfo(dtype).tiny for dtype in dtypes[1:] or dtypes)
    if "eps" in group and has_state and float(group.get("initial_accumulator_value", 0)) < least:
        rule = f"be at least {least}, the least normal number of the state"
        check("eps", lambda x: least <= float(x) < math.inf, rule)
    if "eps" in group:
        check("eps", *_NOT_NEGATIVE)
