"""The one table of the ops: what runs each on which device, and the layers that use it.

``python -m rankkernels.info``, the notice that the reference runs, the README's table and the tests read it, and the
ops that have a choice ask it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._cpu import has_avx512, onednn_is_faster
from rankkernels.ops._library import (
    OLDEST_TRITON,
    no_cuda,
    no_extension,
    only_reference,
    reference_notices,
    triton_serves,
)


class ReferenceWarning(UserWarning):
    """An op ran the pure-PyTorch reference because no kernel serves its device."""


class Op(NamedTuple):
    name: str
    layers: tuple[str, ...]
    title: str = ""
    cuda: str = ""  # what its CUDA kernels are written in, if there are any
    else_triton: bool = False  # whether there are others, which run where the library has none in CUDA C++
    cuda_limits: str = ""
    otherwise: str = "reference"  # what runs where no kernel does
    cpu_needs: str = ""  # without this the C++ kernel is not the faster one, and does not run
    is_served: Callable[[], bool] = lambda: True  # whether this CPU has that

    def kernel(self, device: str) -> str | None:
        """What the kernel is written in that runs the op on tensors of this device type, here and now; None if none."""
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
        if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"rankkernels::{self.name}", key):
            return None
        if key == "CUDA":
            return "Triton" if self.else_triton and no_cuda else self.cuda
        return "C++" if self.is_served() else None


IN_FLOAT64 = "the reference in float64"

OPS = {
    op.name: op
    for op in (
        Op("fm_interaction", ("FM", "DeepFM"), cuda="Triton"),
        Op(
            "din_attention",
            ("ActivationUnit", "DIN"),
            cuda="Triton",
            cuda_limits="a library's products in float64, beyond two layers or 128 wide",
        ),
        Op("cross_network", ("CrossNetwork",), cuda="Triton", cuda_limits="the reference beyond 4096 wide"),
        Op(
            "cross_layer",
            ("CrossNetV2", "CrossNetMix"),
            "what follows a product of DCN v2",
            cuda="Triton",
            cuda_limits=IN_FLOAT64,
        ),
        Op(
            "mixed_cross_layer",
            ("CrossNetMix",),
            "a layer of DCN v2 with experts of low rank",
            otherwise="its parts in turn",
        ),
        Op(
            "mixed_experts",
            ("CrossNetMix",),
            "DCN v2's experts of low rank",
            cuda="Triton",
            cuda_limits="the reference in float64 and beyond 64 experts or rank 64",
        ),
        Op("pairwise_dot", ("PNN",), cuda="Triton"),
        Op("ffm_interaction", ("FFM",), cuda="Triton", cuda_limits=IN_FLOAT64),
        Op("bilinear_interaction", ("BiLinearInteractionLayer",), cuda="Triton", cuda_limits=IN_FLOAT64),
        Op("norm_activation", ("MLP", "Dice"), cuda="Triton"),
        Op(
            "embedding_bag",
            ("EmbeddingLayer", "EmbeddingBag", "TableBatchedEmbeddingBag"),
            cuda="CUDA C++",
            else_triton=True,
        ),
        Op(
            "sparse_update",
            ("optim",),
            "an optimizer's step on the rows of a batch",
            cuda="CUDA C++",
            else_triton=True,
        ),
        Op(
            "embedding_catch_up",
            ("optim",),
            "dense Adam's steps on rows that no batch looked up",
            cuda="CUDA C++",
            else_triton=True,
        ),
        Op(
            "embedding_fm",
            ("DeepFM",),
            "lookup, FM and linear term in one pass",
            cuda="CUDA C++",
            else_triton=True,
            cuda_limits="in Triton of features with one id a sample",
            otherwise="its parts in turn",
        ),
        Op(
            "deepfm",
            ("DeepFM",),
            "all of DeepFM's evaluation in one pass",
            otherwise="its parts in turn",
            cpu_needs="AVX-512",
            is_served=has_avx512,
        ),
        Op(
            "augru",
            ("DIEN",),
            "a GRU with DIEN's attentional update gate",
            cuda="Triton",
            cuda_limits="the reference in float64 and of wide rows",
        ),
        Op(
            "target_attention",
            ("MultiHeadTargetAttention", "InteractingLayer", "BST"),
            "a target's queries to its history",
            cuda="Triton",
            cuda_limits="the reference in float64 and of wide rows",
        ),
        Op("rank", (), "one user's candidates by a frozen model (`serve`)"),
        Op("frozen_rows", (), "rows of a frozen model's table"),
        Op(
            "linear_weight_grad",
            ("MLP",),
            "the gradient of a large layer's weight",
            otherwise="torch's",
            cpu_needs="AMD's AVX-512",
            is_served=onednn_is_faster,
        ),
    )
}


def notice_reference(op: str, tensor: Tensor) -> None:
    """Says once per op and device that the reference runs, and why."""
    device = tensor.device.type
    if (op, device) in reference_notices:
        return
    if device == "cpu" and no_extension:
        reason = no_extension
    elif device == "cuda" and no_extension and only_reference:
        reason = no_extension
    elif device == "cuda" and not triton_serves(tensor):
        reason = f"this needs Triton {'.'.join(map(str, OLDEST_TRITON))} and, of NVIDIA, a GPU from Ampere on"
        if OPS[op].else_triton:
            reason = f"{no_cuda}, and without it {reason}"
    elif device == "cuda":
        reason = "the Triton kernels do not serve this configuration (see docs/gpu.md)"
    else:
        reason = f"there is no kernel for device type {device!r}"
    reference_notices[op, device] = reason
    warnings.warn(
        f"rankkernels.{op} runs the pure-PyTorch reference on {device!r}: {reason}. "
        "`python -m rankkernels.info` lists what runs where.",
        ReferenceWarning,
        stacklevel=3,
    )
