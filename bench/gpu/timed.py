"""What is raced on a GPU: the shapes of practice. ``PREDICTED`` of bench.gpu.predictions has what each was expected to
take, by the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from bench import workloads
from bench.gpu import plain
from bench.gpu.cases import GPU_OPS
from bench.gpu.contests import (
    ADAM,
    CRITEO,
    EXACT_ADAM,
    LARGE,
    ROWWISE_ADAGRAD,
    Place,
    attention,
    lookup,
    lookup_and_step,
    lookup_fm,
    made,
    of_case,
    steps,
)
from bench.gpu.timing import Contest
from rankkernels.testing import fm_interaction_case, norm_activation_case


class Timed(NamedTuple):
    """A contest to be made, of a kind (forward, forward + backward, step), in which kernels of ``op`` run."""

    name: str
    kind: str
    dtype: torch.dtype
    op: str
    make: Callable[[Place], Contest]


# Attention.


ATTENTION = [
    Timed(
        f"DIN B{B} L{L} D{D} {list(dims)}",
        "forward + backward" if training else "forward",
        dtype,
        "din_attention",
        partial(attention, B, L, D, dims, training, dtype),
    )
    for B, L, D, dims, training, dtype in [
        (2048, 50, 64, (80, 40), False, torch.float32),
        (2048, 50, 64, (80, 40), True, torch.float32),
        (4096, 100, 64, (36,), False, torch.float32),
        (4096, 100, 64, (36,), True, torch.float32),
        (1024, 50, 16, (36,), True, torch.float32),
        (2048, 50, 64, (80, 40), False, torch.bfloat16),
        (4096, 50, 8, (256, 128), True, torch.float32),
    ]
]


# Interactions and normalization, out of the tests' cases.


INTERACTIONS = [
    Timed(
        name, "forward + backward" if backward else "forward", torch.float32, op,
        partial(made, make, shape, options, backward),
    )
    for name, op, make, shape, options, backward in [
        ("FM B65536 F39 D16", "fm_interaction", fm_interaction_case, (65536, 39, 16), (), False),
        ("FM B65536 F39 D16", "fm_interaction", fm_interaction_case, (65536, 39, 16), (), True),
        ("FM B8192 F39 D16", "fm_interaction", fm_interaction_case, (8192, 39, 16), (), True),
        ("BatchNorm + Dice N4096 H256", "norm_activation", norm_activation_case, (4096, 256), ("dice",), False),
        ("BatchNorm + Dice N65536 H256", "norm_activation", norm_activation_case, (65536, 256), ("dice",), True),
    ]
]  # fmt: skip


# Embeddings.


EMBEDDINGS = [
    Timed("26 tables x 100k x 16, B65536", "forward", torch.float32, "embedding_bag", partial(lookup, CRITEO)),
    Timed("26 tables x 100k x 16, B65536", "forward + backward + Adam", torch.float32, "embedding_bag_update",
          partial(lookup_and_step, CRITEO, ADAM)),
    Timed("26 tables x 100k x 16, B65536", "forward + backward + exact Adam", torch.float32, "embedding_bag_update",
          partial(lookup_and_step, CRITEO, EXACT_ADAM)),
    Timed("8 tables x 1M x 64, B16384 L20", "forward", torch.float32, "embedding_bag", partial(lookup, LARGE)),
    Timed("26 tables x 100k x 16, B65536", "forward + backward + row-wise Adagrad", torch.float32,
          "embedding_bag_update", partial(lookup_and_step, CRITEO, ROWWISE_ADAGRAD)),
    Timed("embedding_fm 26 x 16, B65536", "forward", torch.float32, "embedding_fm", partial(lookup_fm, CRITEO)),
    Timed("8 tables x 1M x 64, B16384 L20", "forward + backward + Adam", torch.float32, "embedding_bag_update",
          partial(lookup_and_step, LARGE, ADAM)),
]  # fmt: skip


# Training steps.


def plain_deepfm(rows: int) -> nn.Module:
    return plain.DeepFM([f"C{i}" for i in range(26)], [f"I{i}" for i in range(13)], rows, 16, (256, 128))


def plain_din(rows: int, D: int, attention: Sequence[int]) -> nn.Module:
    return plain.DIN(["user"], ["item", "category"], rows, D, attention, (256, 128))


def din(rows: int, B: int, D: int, attention: Sequence[int]) -> workloads.Workload:
    return workloads.din(rows, B, D=D, attention=attention)


STEPS = [
    Timed("DeepFM 26 x 100k x 16 [256, 128], B4096", "step", torch.float32, "embedding_fm",
          partial(steps, workloads.deepfm, plain_deepfm, 4096)),
    *(Timed(f"DIN 2 x L50 D{D} {list(widths)}, B4096", "step", torch.float32, "din_attention",
            partial(steps, partial(din, D=D, attention=widths), partial(plain_din, D=D, attention=widths), 4096))
      for D, widths in ((64, (36,)), (8, (256, 128)))),
]  # fmt: skip

#: By the part of the check that races them, the most wanted first.
TIMED = {"embeddings": EMBEDDINGS, "attention": ATTENTION, "steps": STEPS, "interactions": INTERACTIONS}
#: In the order in which torch.compile's are wanted, each of which takes long to compile.
COMPILED = [*ATTENTION[:4], STEPS[0], *INTERACTIONS[:2], EMBEDDINGS[0], *STEPS[1:], *ATTENTION[4:], *INTERACTIONS[2:]]


def others(place: Place) -> list[Timed]:
    """Every case that is compiled and reported, forward and backward."""
    return [
        Timed(case.id, "forward + backward", dtype, case.op, partial(of_case, case, dtype, True))
        for op in GPU_OPS
        for case in op.cases
        for dtype in case.dtypes
        if dtype != torch.float64 and not (place.small and case.elements > 10_000)
    ]
