"""When a layer may do the work of another module without calling it: where nobody could tell.

A fused path reads the parameters and settings of the modules it replaces. Whoever hooks such a module, derives from
it, parametrizes it, gives it a ``forward`` or a weight of its own, or follows all modules' calls, expects to be called:
then the modules are called, one after the other, as torch-rechub calls them. Every call checks again.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module

_BEFORE, _AFTER = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
_BEFORE_BACKWARD, _AFTER_BACKWARD = torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks


def nobody_follows() -> bool:
    """Whether no global hook sees all modules' calls."""
    return not (_BEFORE or _AFTER or _BEFORE_BACKWARD or _AFTER_BACKWARD)


def is_untouched(module: nn.Module, cls: type) -> bool:
    """Whether calling ``module`` is ``cls.forward`` and nothing else, where ``nobody_follows``.

    Pruning and the old weight_norm and spectral_norm are hooks; parametrizations, FSDP and quantization another type.
    """
    if type(module) is not cls:
        return False
    own = module.__dict__  # faster than attributes, and there is one module a table
    return not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
    )


def is_plain(module: nn.Module, cls: type) -> bool:
    """Whether nobody could tell that ``cls.forward`` was done without calling ``module``."""
    return is_untouched(module, cls) and nobody_follows()


def are_plain(modules: Iterable[nn.Module], classes: Iterable[type]) -> bool:
    """``is_plain`` of all of them."""
    return nobody_follows() and all(map(is_untouched, modules, classes))
