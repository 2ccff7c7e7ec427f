"""The ops that have GPU kernels, with the shapes a user trains with: what is compiled, reported and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from rankkernels.ops._features import MODES, Features
from rankkernels.ops._idle_steps import WIDTH
from rankkernels.testing import (
    OpCase,
    augru_case,
    bilinear_interaction_case,
    cross_layer_case,
    cross_network_case,
    din_attention_case,
    embedding_bag_case,
    embedding_fm_case,
    ffm_interaction_case,
    fm_interaction_case,
    mixed_experts_case,
    norm_activation_case,
    pairwise_dot_case,
    randn,
    target_attention_case,
)

HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class GPUOp:
    """An op's cases, in the dtypes that are compiled and timed.

    ``launches`` are the CUDA C++ kernels of an op with such: of a call whose tables have one dtype, sort and cumsum
    being PyTorch's. Where the library is built without them, and for ops without, Triton's run.
    """

    op: str
    cases: Sequence[OpCase]
    launches: dict[str, list[str]] = field(default_factory=dict)


def in_dtypes(case: OpCase, *dtypes: torch.dtype) -> OpCase:
    return replace(case, dtypes=dtypes)


FM = GPUOp(
    op="fm_interaction",
    cases=[
        in_dtypes(fm_interaction_case(65536, 39, 16), SINGLE, BF16, DOUBLE),
        in_dtypes(fm_interaction_case(8192, 39, 64), SINGLE, HALF),
        in_dtypes(fm_interaction_case(4096, 39, 10), SINGLE),
        in_dtypes(fm_interaction_case(4096, 39, 8, reduce_sum=False), HALF),
        in_dtypes(fm_interaction_case(4096, 39, 64, reduce_sum=False), SINGLE),
        in_dtypes(fm_interaction_case(4096, 39, 128), BF16),
        in_dtypes(fm_interaction_case(4096, 300, 64), SINGLE),
        in_dtypes(fm_interaction_case(4096, 1, 1), BF16),
    ],
)

CROSS = GPUOp(
    op="cross_network",
    cases=[
        in_dtypes(cross_network_case(4096, 429, 6), SINGLE, BF16, DOUBLE),
        in_dtypes(cross_network_case(65536, 160, 3), SINGLE, HALF),
        in_dtypes(cross_network_case(512, 4096, 2), SINGLE),
    ],
)

LAYER = GPUOp(
    op="cross_layer",
    cases=[
        in_dtypes(cross_layer_case(4096, 432), SINGLE, BF16),
        in_dtypes(cross_layer_case(65536, 160, has_bias=False), SINGLE, HALF),
    ],
)

EXPERTS = GPUOp(
    op="mixed_experts",
    cases=[
        in_dtypes(mixed_experts_case(4096, 4, 32), SINGLE, BF16),
        in_dtypes(mixed_experts_case(65536, 4, 32), SINGLE),
        # The widest rank: do the registers suffice?
        in_dtypes(mixed_experts_case(65536, 8, 64), SINGLE, HALF),
    ],
)

PAIRS = GPUOp(
    op="pairwise_dot",
    cases=[
        in_dtypes(pairwise_dot_case(8192, 39, 16), SINGLE, BF16, DOUBLE),
        in_dtypes(pairwise_dot_case(8192, 27, 128), SINGLE, HALF),
        in_dtypes(pairwise_dot_case(4096, 39, 10, weighted=True), SINGLE),
    ],
)

BILINEAR = GPUOp(
    op="bilinear_interaction",
    cases=[
        in_dtypes(bilinear_interaction_case(2048, 39, 16), SINGLE, BF16),
        in_dtypes(bilinear_interaction_case(2048, 39, 64, "field_each"), SINGLE, HALF),
        in_dtypes(bilinear_interaction_case(65536, 5, 64), SINGLE),
    ],
)

FFM = GPUOp(
    op="ffm_interaction",
    cases=[
        in_dtypes(ffm_interaction_case(2048, 39, 16), SINGLE, BF16),
        in_dtypes(ffm_interaction_case(4096, 26, 4, reduce_sum=False), SINGLE),
        in_dtypes(ffm_interaction_case(4096, 10, 64), HALF),
    ],
)

DIN = GPUOp(
    op="din_attention",
    cases=[
        in_dtypes(din_attention_case(4096, 50, 16, [36], "dice", False, False, False, "lengths"), SINGLE),
        in_dtypes(din_attention_case(4096, 50, 64, [36], "dice", False, True, False, "offsets"), SINGLE),
        in_dtypes(din_attention_case(4096, 50, 64, [64], "dice_batch_norm", False, False, False, "mask"), BF16),
        in_dtypes(din_attention_case(4096, 50, 64, [80, 40], "dice", False, False, False, "lengths"), SINGLE),
        in_dtypes(din_attention_case(4, 1000, 64, [36], "dice", False, True, False, "lengths"), SINGLE),
    ]
    + [
        # The widest layers, and what else the kernels are compiled to: do the registers suffice?
        in_dtypes(din_attention_case(512, 50, D, widths, activation, norm, softmax, training, form, dropout), dtype)
        for D, widths, activation, norm, softmax, training, form, dropout, dtype in [
            (128, [128], "dice", True, True, True, "mask", 0.1, SINGLE),
            (128, [128, 128], "dice", True, True, False, "mask", 0.1, SINGLE),
            (128, [128, 128], "dice_batch_norm", False, True, False, "offsets", 0.0, HALF),
            (128, [128], "dice_batch_norm", True, False, True, "lengths", 0.0, BF16),
            (64, [80, 40], "sigmoid", False, False, True, "lengths", 0.2, SINGLE),
            (32, [64, 16], "prelu", True, True, False, "padded", 0.0, HALF),
            (16, [36], "dice", True, True, True, "mask", 0.1, SINGLE),
        ]
    ],
)

TARGET = GPUOp(
    op="target_attention",
    cases=[
        in_dtypes(target_attention_case(8, 4, 10000, 64), SINGLE, BF16),
        in_dtypes(target_attention_case(1024, 2, 51, 16, "mask"), SINGLE),
        in_dtypes(target_attention_case(256, 4, 1000, 64, "offsets", users=8), SINGLE),
        # The widest rows, and more queries than a block: do the registers suffice?
        in_dtypes(target_attention_case(64, 40, 200, 128, "lengths"), SINGLE, HALF),
    ],
)

AUGRU = GPUOp(
    op="augru",
    cases=[
        in_dtypes(augru_case(1024, 50, 16, 16), SINGLE, BF16),
        in_dtypes(augru_case(1024, 50, 64, 64), SINGLE, HALF),
    ],
)

NORM = GPUOp(
    op="norm_activation",
    cases=[
        in_dtypes(norm_activation_case(4096, 256, "dice"), SINGLE, BF16),
        in_dtypes(norm_activation_case(4096, 200, "dice_batch_norm", affine=False), SINGLE),
        in_dtypes(norm_activation_case(4096, 128, "relu"), HALF),
        in_dtypes(norm_activation_case(4096, 256, "relu", training=False), DOUBLE),
    ],
)

EMBEDDING_BAG = GPUOp(
    op="embedding_bag",
    cases=[
        in_dtypes(embedding_bag_case([100_000] * 26, [16] * 26, list(range(26)), ["sum"] * 26, B=4096, L=1), SINGLE),
        in_dtypes(embedding_bag_case([1_000_000] * 8, [64] * 8, list(range(8)), ["sum"] * 8, B=1024, L=20), SINGLE),
        # What else the kernels are compiled to: do the registers suffice?
        in_dtypes(
            embedding_bag_case(
                [1000] * 4,
                [128, 512, 128, 10],
                [0, 1, 2, 3],
                ["max", "mean", "sum", "none"],
                B=1024,
                L=50,
                padding_idx=0,
                weighted=True,
            ),
            SINGLE,
            BF16,
            DOUBLE,
        ),  # fmt: skip
    ],
    launches={
        "embedding_bag": ["embedding_bag"],
        "embedding_bag_backward": ["zero", "embedding_lookups", "sort", "embedding_reduce", "embedding_join"],
        "embedding_bag_update": [
            "embedding_lookups",
            "sort",
            "embedding_reduce",
            "embedding_join",
            "embedding_update",
        ],
    },
)

EMBEDDING_FM = GPUOp(
    op="embedding_fm",
    cases=[in_dtypes(embedding_fm_case([100_000] * 26, 16, list(range(26)), ["none"] * 26, B=4096), SINGLE)],
    launches={
        "embedding_fm": ["embedding_fm"],
        "embedding_fm_backward": ["embedding_fm_backward", "embedding_linear"],
    },
)


class _LookupAndStep(torch.autograd.Function):
    """A lookup of tables under exact Adam, and its step in the backward."""

    @staticmethod
    def forward(ctx, split, *inputs):
        lists, features, clocks = split(inputs)
        ctx.split, ctx.inputs = split, inputs
        (out,) = torch.ops.rankkernels.embedding_bag_exact.default(*lists, *features, "", clocks, concat=True)
        return out

    @staticmethod
    def backward(ctx, grad):
        lists, features, clocks = ctx.split(ctx.inputs)
        grads = grad.split_with_sizes([lists[0][t].size(1) for t in features.tables], 1)
        hyper = [v for step in clocks[::4] for v in (1e-3, 0.9, 0.999, 1e-8, 0.0, step + 1, 1.0, 0.0, 0.0)]
        torch.ops.rankkernels.embedding_bag_exact_update.default(grads, *lists, *features, hyper, clocks)
        return None, *(t if t.is_floating_point() else None for t in ctx.inputs)


def embedding_bag_exact_case(rows: Sequence[int], D: int, B: int) -> OpCase:
    """Tables under exact Adam after their 1000th step, and one id of each a sample."""
    T, step = len(rows), 1000

    def make(dtype, generator):
        wide = torch.promote_types(dtype, torch.float32)
        states = [torch.rand((r, D), generator=generator, dtype=wide) for r in rows for _ in range(2)]
        last_steps = [torch.randint(1, step, (r,), generator=generator, dtype=torch.int32) for r in rows]
        ids = [torch.randint(0, r, (B, 1), generator=generator) for r in rows]
        weights = [randn((r, D), dtype, generator) for r in rows]
        return *weights, *states, torch.rand((step + 1, WIDTH), generator=generator, dtype=DOUBLE), *last_steps, *ids

    def split(inputs):
        weights, states, last_steps, ids = (
            list(inputs[first : first + n]) for first, n in ((0, T), (T, 2 * T), (3 * T + 1, T), (4 * T + 1, T))
        )
        none = [-1] * T
        features = Features(ids, [], [], list(range(T)), [MODES.index("sum")] * T, none, none)
        return (weights, states, last_steps, [inputs[3 * T]] * T), features, [step, 0.0, 1.0, 1e-8] * T

    def arguments(*inputs):
        lists, features, clocks = split(inputs)
        return *lists, *features, "", clocks

    def run_reference(*inputs):
        lists, features, clocks = split([t.clone() for t in inputs])
        torch.ops.rankkernels.embedding_catch_up.default(*lists, *features, "", clocks)
        return torch.cat([w[ids[:, 0]] for w, ids in zip(lists[0], features.indices)], 1)

    return OpCase(
        op="embedding_bag_exact",
        id=f"embedding_bag_exact-{T}x{max(rows)}x{D}-B{B}",
        make=make,
        function=lambda *inputs: _LookupAndStep.apply(split, *inputs),
        reference=run_reference,
        overload=torch.ops.rankkernels.embedding_bag_exact.default,
        arguments=arguments,
        elements=4 * B * T * D,
        flops=21 * B * T * D,  # of four terms
        backward_flops=35 * B * T * D,
    )


#: Compiled and reported, but not raced: what counts is a training step.
EXACT_ADAM = GPUOp(
    op="embedding_bag_exact",
    cases=[
        in_dtypes(embedding_bag_exact_case([100_000] * 26, 16, 4096), SINGLE),
        # What else the kernels are compiled to: do the registers suffice?
        in_dtypes(embedding_bag_exact_case([1000] * 4, 512, 1024), SINGLE, BF16, DOUBLE),
    ],
)

GPU_OPS = [
    FM, CROSS, LAYER, EXPERTS, PAIRS, BILINEAR, FFM, DIN, TARGET, AUGRU, NORM, EMBEDDING_BAG, EMBEDDING_FM,
]  # fmt: skip
COMPILED = [case for op in [*GPU_OPS, EXACT_ADAM] for case in op.cases]
CUDA_LAUNCHES = {name: kernels for op in GPU_OPS for name, kernels in op.launches.items()}
