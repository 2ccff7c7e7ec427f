"""Models for inference alone: ``freeze``, one user's candidates in one call, tables of 16, 8 or 4 bits.

``freeze`` folds normalizations into the layers before them, joins constants and stores tables in the form that the
kernels read. The result has no autograd and needs neither the model nor its library.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch
from torch import nn

from rankkernels.serve import _rechub
from rankkernels.serve._builder import Builder
from rankkernels.serve._export import RankModule
from rankkernels.serve._frozen import FORMAT, FrozenModel, Ranking
from rankkernels.serve._layers import NotServed, kind_of, plain

__all__ = ["FrozenModel", "NotServed", "RankModule", "Ranking", "freeze", "load"]


@torch.no_grad()
def freeze(model: nn.Module, tables: str = "float32") -> FrozenModel:
    """A copy of ``model`` for inference, by the running statistics of its normalizations.

    Args:
        model: a DeepFM or DIN of ours, of torch-rechub, FuxiCTR or DeepCTR-Torch, accelerated or not. A request to
            one of DeepCTR-Torch's is by its features' names, a history's length among them; to FuxiCTR's DIN for long
            histories by the names of its item's features and, for their histories, these and ``_history``.
        tables: float32, bfloat16, int8 or int4. Codes of 8 and 4 bits have a scale and a bias a row, and an error of
            half the row's range over 255 or 15 at most; tables are read as they are stored.

    Raises:
        NotServed: a ValueError that names the module or the feature that a frozen model cannot have.
    """
    builder = Builder(tables)
    plain(model, type(model).__name__)
    fuxictr = _is_of("fuxictr.pytorch.models", model) and importlib.import_module("rankkernels.serve._fuxictr")
    if _is_of("deepctr_torch.models.basemodel", model):
        built = importlib.import_module("rankkernels.serve._deepctr").build(model, builder)
    elif fuxictr:
        built = fuxictr.build(model, builder)
    else:
        built = _rechub.build(model, kind_of(model), builder)
    if built is None:
        raise NotServed(
            f"freeze: {type(model).__module__}.{type(model).__name__} is not served; served are DeepFM and DIN of "
            "rankkernels, torch-rechub, FuxiCTR and DeepCTR-Torch"
        )
    plan, weights = builder.plan(*built)
    if fuxictr:
        fuxictr.check(model, builder, plan, weights)
    return FrozenModel(builder.inputs, builder.stored, weights, plan.encode())


def _is_of(module: str, model: nn.Module) -> bool:
    """Whether ``model`` is a BaseModel of this module, which need not be imported."""
    return module in sys.modules and isinstance(model, sys.modules[module].BaseModel)


def load(path: str | os.PathLike, mmap: bool = False) -> FrozenModel:
    """The model that ``FrozenModel.save`` wrote; with ``mmap`` its tables stay in the file until they are read.

    Raises:
        ValueError: the file has something else, or another version's format.
    """
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"load: {os.fspath(path)!r} is no frozen model of format {FORMAT}")
    return FrozenModel(state["inputs"], state["tables"], state["weights"], state["plan"])
