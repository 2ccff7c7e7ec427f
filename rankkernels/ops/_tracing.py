"""Who follows a call: exporters, compilers and the transforms of autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def is_exporting() -> bool:
    """Whether a model is being exported or traced, which is for inference: no backward and no step will follow."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


#: The mode of torch's older vmap, of ``torch.autograd.grad(is_grads_batched=True)``.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")


def is_transformed() -> bool:
    """Whether tensors may be those of ``torch.func``'s transforms, or carry the tangents of forward mode."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
    )


def is_traced() -> bool:
    """Whether compilers or tracers follow the modules' own calls."""
    return is_compiling() or torch._C._is_tracing()


def must_stay_transparent() -> bool:
    """Whether compilers, tracers, ``torch.func`` or forward mode follow torch's own operators, or autocast is to choose
    their dtypes."""
    return is_traced() or torch.is_autocast_enabled("cpu") or is_transformed()


def has_nothing(mask: Tensor) -> bool:
    """Whether a bool ``mask`` has no true value; of a GPU's, and under compilers and ``torch.func``, which would wait
    or not know, only whether it has no value at all."""
    if not mask.numel():
        return True
    return mask.is_cpu and not (is_traced() or is_transformed() or mask.any())


#: Types whose tensors' memory is what it seems.
plain_classes: set[type] = {nn.Parameter, Tensor}


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a plain tensor, whose memory an op may read. A subclass (a quantized weight, a shard) gives
    its memory a meaning of its own; compilers trace with subclasses in place of plain tensors."""
    if type(value) in plain_classes:
        return True
    return isinstance(value, FakeTensor) or (isinstance(value, Tensor) and is_compiling())
