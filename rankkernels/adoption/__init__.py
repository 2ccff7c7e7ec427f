"""Fused layers inside a model that is already built: what is replaced, what is left and why, and the way back.

A layer is replaced by changing the class of its object. Parameters, buffers, hooks, ``state_dict`` and optimizers stay
what they are, and so do the numbers. A module beside this one speaks for one library and is imported only where that
library is. It has

- ``LIBRARY``, its name in reports;
- ``replacement(module, model)``: the class that a layer is given, a text that says why it is left, or None for what it
  does not know. The class is a namesake of ours or derives from theirs.

A class may have a method ``_adopt(self)``, called when all layers have their class, to set plain attributes. Those and
others that it sets later are named in its tuple ``_kept_by_adoption`` and deleted by ``restore``.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

from torch import nn

from rankkernels.adoption._report import Entry, Report, name_of
from rankkernels.adoption._tables import Table, tables_of

__all__ = ["Entry", "Report", "Table", "accelerate", "explain", "restore"]

#: The package that a user of the library has imported, and the module here that speaks for it.
_ADAPTERS = {
    "torch_rechub": "torch_rechub",
    "fuxictr": "fuxictr",
    "deepctr_torch": "deepctr_torch",
    "torch": "torch_nn",
}

#: Where a replaced layer keeps the class that it had, and whose that is.
_ORIGINAL = "_before_acceleration"
_log = logging.getLogger("rankkernels")


def accelerate(model: nn.Module) -> nn.Module:
    """Gives every layer in ``model`` that has a fused counterpart its class, in place; returns ``model``.

    Layers of torch-rechub, FuxiCTR, DeepCTR-Torch and ``nn.EmbeddingBag``, wherever in the model they are, also below
    ``torch.compile``, DataParallel and DistributedDataParallel. Parameters, buffers, hooks and optimizers that hold
    them stay what they are, and so do the numbers. Subclasses of the libraries' layers are left alone: only their
    author knows what they changed. Twice is once. ``explain`` tells what was replaced and what the optimizer of its
    tables moves in a step, which is also logged ("rankkernels", INFO); ``restore`` undoes it.

    Warns:
        UserWarning: nothing in ``model`` is replaced, and nothing was before.
    """
    adapters = _adapters()
    said = [(module, *_said(module, model, adapters)) for module in model.modules()]
    found = [(module, library, kind) for module, library, kind in said if isinstance(kind, type)]
    for module, library, cls in found:
        module.__dict__[_ORIGINAL] = type(module), library
        module.__class__ = cls
    for module, _, cls in found:
        if hasattr(cls, "_adopt"):
            cls._adopt(module)
    if not found and not any(map(_is_ours, model.modules())):
        warnings.warn(f"rankkernels.accelerate: {explain(model)}", stacklevel=2)
    elif _log.isEnabledFor(logging.INFO):
        _log.info("accelerate: %s", explain(model))
    return model


def explain(model: nn.Module) -> Report:
    """What ``accelerate`` replaces in ``model``, or has replaced, and what it leaves and why; what dense gradients of
    its tables cost, and what an exact fused optimizer would move instead. Changes nothing."""
    entries, fusable, adapters = [], [], _adapters()
    for path, module in model.named_modules():
        cls = type(module)
        kind: type | str | None = cls
        if _ORIGINAL in module.__dict__:
            original, library = module.__dict__[_ORIGINAL]
            entries.append(Entry(path, original.__name__, library, name_of(cls), "", True))
        elif _is_ours(module):
            entries.append(Entry(path, cls.__name__, "rankkernels", None, "it is one of ours", False))
        else:
            library, kind = _said(module, model, adapters)
            if isinstance(kind, type):
                entries.append(Entry(path, cls.__name__, library, name_of(kind), "", False))
            elif kind is not None:
                entries.append(Entry(path, cls.__name__, library, None, kind, False))
        if hasattr(cls, "fused_optimizer") or hasattr(kind, "fused_optimizer"):
            fusable.append(module)
    return Report(type(model).__name__, entries, tables_of(model, fusable))


def restore(model: nn.Module) -> nn.Module:
    """Gives every layer that ``accelerate`` replaced its own class back, in place; returns ``model``.

    The model then runs its library's code, bit for bit. Layers that were ours from the beginning stay.

    Raises:
        RuntimeError: a layer whose class was changed since, or whose tables a fused optimizer steps: nothing is
            restored.
    """
    replaced = [(path, m) for path, m in model.named_modules() if _ORIGINAL in m.__dict__]
    for path, module in replaced:
        if not _is_ours(module):
            raise RuntimeError(
                f"restore: {path or 'the model'} is a {type(module).__name__} since it was accelerated: "
                "take back what made it one (a parametrization, FSDP) first"
            )
        if getattr(module, "fused_optimizer", None) is not None:
            raise RuntimeError(
                f"restore: the tables of {path or 'the model'} are stepped by a fused optimizer in our backward, and "
                "nothing else would step them"
            )
    for _, module in replaced:
        for name in getattr(type(module), "_kept_by_adoption", ()):
            module.__dict__.pop(name, None)
        module.__class__, _ = module.__dict__.pop(_ORIGINAL)
    return model


def _adapters() -> list:
    """The modules that speak for the libraries that are imported."""
    return [importlib.import_module(f"{__name__}.{a}") for library, a in _ADAPTERS.items() if library in sys.modules]


def _said(module: nn.Module, model: nn.Module, adapters: list) -> tuple[str | None, type | str | None]:
    """The library whose adapter knows this layer of ``model``, and what it says of it; nothing where ``accelerate`` has
    replaced it, or where it is ours."""
    if _ORIGINAL in module.__dict__ or _is_ours(module):
        return None, None
    said = ((a.LIBRARY, a.replacement(module, model)) for a in adapters)
    return next((s for s in said if s[1] is not None), (None, None))


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("rankkernels.")
