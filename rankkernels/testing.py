"""What tests and benchmarks know of an op: an ``OpCase`` makes its inputs and has its function and its reference.

``TEST_CASES`` are small and odd-sized, ``BENCH_CASES`` have the shapes of practice. All are built by the same
functions, one an op; a new op adds one of these and its cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankkernels import ops, reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._features import MODES
from rankkernels.ops.attention_params import norms_per_layer, params_per_layer, unflatten
from rankkernels.ops.bilinear_interaction import KINDS, bilinear_interaction
from rankkernels.ops.cross_layer import cross_layer
from rankkernels.ops.ffm_interaction import ffm_interaction
from rankkernels.ops.mixed_cross_layer import mixed_cross_layer
from rankkernels.ops.mixed_experts import mixed_experts

#: Largest relative error of a result or a gradient (norm of the difference over the norm), by the dtype of the inputs.
#: The reference runs in float64 on the same values. 16-bit results are rounded once: half a unit in the last place is
#: 2^-11 for float16 and 2^-8 for bfloat16.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class OpCase:
    """One configuration of one op.

    ``make(dtype, generator)`` gives the input tensors, random and never zero; the floating-point ones get gradients.
    ``function`` and ``reference`` take them and return the result; ``overload`` and ``arguments`` are what
    ``torch.library.opcheck`` takes. ``elements`` is what a forward must read and write, ``flops`` what it must do and
    ``backward_flops`` what a backward must, what it computes again included.
    """

    op: str
    id: str
    make: Callable[[torch.dtype, torch.Generator], tuple[Tensor, ...]]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    overload: torch._ops.OpOverload
    arguments: Callable[..., tuple]
    elements: int
    flops: int
    backward_flops: int
    dtypes: Sequence[torch.dtype] = field(default=tuple(TOLERANCE))

    def inputs(
        self, dtype: torch.dtype = torch.float32, requires_grad: bool = False, seed: int = 0
    ) -> tuple[Tensor, ...]:
        tensors = self.make(dtype, torch.Generator().manual_seed(seed))
        return tuple(t.requires_grad_(requires_grad and t.is_floating_point()) for t in tensors)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, floor), in float64; 0 / 0 is 0."""
    difference = (actual.double() - expected.double()).norm().item()
    size = max(expected.double().norm().item(), floor)
    return difference if size == 0 else difference / size


def relative_errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each tensor, of small ones on the scale of the largest: some gradients are zero in exact arithmetic (of a bias
    before a batch normalization) and hold the rounding of the others. The floor is a tenth of the largest norm."""
    floor = 0.1 * max((e.detach().double().norm().item() for e in expected), default=0.0)
    return [relative_error(a, e, floor) for a, e in zip(actual, expected, strict=True)]


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Standard normal values times ``scale``, drawn in float64: the same values in every dtype but for rounding."""
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)


def fm_interaction_case(B: int, F: int, D: int, reduce_sum: bool = True) -> OpCase:
    """Field embeddings [B, F, D]."""
    return OpCase(
        op="fm_interaction",
        id=f"fm_interaction-B{B}-F{F}-D{D}" + ("" if reduce_sum else "-keep_dim"),
        make=lambda dtype, generator: (randn((B, F, D), dtype, generator),),
        function=lambda x: ops.fm_interaction(x, reduce_sum),
        reference=lambda x: reference.fm_interaction(x, reduce_sum),
        overload=torch.ops.rankkernels.fm_interaction.default,
        arguments=lambda x: (x, reduce_sum),
        elements=B * F * D + B * (1 if reduce_sum else D),
        flops=3 * B * F * D,
        backward_flops=3 * B * F * D,
    )


def cross_network_case(B: int, D: int, layers: int) -> OpCase:
    """x [B, D], then a weight [1, D] and a bias [D] a layer. The dots are about 1, as those of trained layers are."""

    def make(dtype, generator):
        x = randn((B, D), dtype, generator)
        weights = [randn((1, D), dtype, generator, max(D, 1) ** -0.5) for _ in range(layers)]
        return x, *weights, *(randn((D,), dtype, generator) for _ in range(layers))

    def arguments(x, *params):
        return x, list(params[:layers]), list(params[layers:])

    return OpCase(
        op="cross_network",
        id=f"cross_network-B{B}-D{D}-{layers}_layers",
        make=make,
        function=lambda *inputs: ops.cross_network(*arguments(*inputs)),
        reference=lambda *inputs: reference.cross_network(*arguments(*inputs)),
        overload=torch.ops.rankkernels.cross_network.default,
        arguments=arguments,
        elements=2 * B * D,
        flops=(2 * layers + 2) * B * D,
        backward_flops=(4 * layers + 4) * B * D,
    )


def pairwise_dot_case(B: int, F: int, D: int, weighted: bool = False) -> OpCase:
    """Field embeddings [B, F, D], and a weight for each pair if ``weighted``."""
    pairs = F * (F - 1) // 2

    def make(dtype, generator):
        embeddings = randn((B, F, D), dtype, generator)
        return (embeddings, randn((pairs,), dtype, generator)) if weighted else (embeddings,)

    return OpCase(
        op="pairwise_dot",
        id=f"pairwise_dot-B{B}-F{F}-D{D}" + ("-weighted" if weighted else ""),
        make=make,
        function=ops.pairwise_dot,
        reference=reference.pairwise_dot,
        overload=torch.ops.rankkernels.pairwise_dot.default,
        arguments=lambda x, weights=None: (x, weights),
        elements=B * F * D + B * pairs,
        flops=2 * B * pairs * D,
        backward_flops=(6 if weighted else 4) * B * pairs * D,
    )


def cross_layer_case(B: int, D: int, has_bias: bool = True) -> OpCase:
    """x0, product and x [B, D], and a bias [D]."""

    def make(dtype, generator):
        matrices = [randn((B, D), dtype, generator) for _ in range(3)]
        return (*matrices, randn((D,), dtype, generator)) if has_bias else tuple(matrices)

    return OpCase(
        op="cross_layer",
        id=f"cross_layer-B{B}-D{D}" + ("" if has_bias else "-no_bias"),
        make=make,
        function=cross_layer,
        reference=reference.cross_layer,
        overload=torch.ops.rankkernels.cross_layer.default,
        arguments=lambda x0, product, x, bias=None: (x0, product, x, bias),
        elements=4 * B * D,
        flops=3 * B * D,
        backward_flops=3 * B * D,
    )


def mixed_experts_case(B: int, E: int, rank: int) -> OpCase:
    """projections [B, E rank + E] and a weight [rank, rank] an expert."""

    def make(dtype, generator):
        projections = randn((B, E * rank + E), dtype, generator)
        return projections, randn((E, rank, rank), dtype, generator, max(rank, 1) ** -0.5)

    return OpCase(
        op="mixed_experts",
        id=f"mixed_experts-B{B}-E{E}-rank{rank}",
        make=make,
        function=mixed_experts,
        reference=reference.mixed_experts,
        overload=torch.ops.rankkernels.mixed_experts.default,
        arguments=lambda projections, weight: (projections, weight),
        elements=B * (2 * E * rank + E),
        flops=2 * B * E * rank * rank,
        backward_flops=6 * B * E * rank * rank,
    )


def mixed_cross_layer_case(B: int, D: int, E: int, rank: int) -> OpCase:
    """x0 and x [B, D], u and v [E, D, rank], a weight [rank, rank] an expert, gates [E, D] and a bias [D]."""

    def make(dtype, generator):
        scale = max(D, 1) ** -0.5
        factors = [randn((E, D, rank), dtype, generator, scale) for _ in range(2)]
        weight = randn((E, rank, rank), dtype, generator, max(rank, 1) ** -0.5)
        gates, bias = randn((E, D), dtype, generator, scale), randn((D,), dtype, generator)
        return *(randn((B, D), dtype, generator) for _ in range(2)), *factors, weight, gates, bias

    flops = 2 * B * E * (2 * D * rank + rank * rank + D)
    return OpCase(
        op="mixed_cross_layer",
        id=f"mixed_cross_layer-B{B}-D{D}-E{E}-rank{rank}",
        make=make,
        function=mixed_cross_layer,
        reference=reference.mixed_cross_layer,
        overload=torch.ops.rankkernels.mixed_cross_layer.default,
        arguments=lambda *layer: (*layer, True),
        elements=4 * B * D,
        flops=flops,
        backward_flops=2 * flops + 2 * B * E * rank * rank,
    )


def ffm_interaction_case(B: int, F: int, D: int, reduce_sum: bool = True) -> OpCase:
    """Embeddings for each other field [B, F, F, D]."""
    pairs = F * (F - 1) // 2
    return OpCase(
        op="ffm_interaction",
        id=f"ffm_interaction-B{B}-F{F}-D{D}" + ("" if reduce_sum else "-keep_dim"),
        make=lambda dtype, generator: (randn((B, F, F, D), dtype, generator),),
        function=lambda x: ffm_interaction(x, reduce_sum),
        reference=lambda x: reference.ffm_interaction(x, reduce_sum),
        overload=torch.ops.rankkernels.ffm_interaction.default,
        arguments=lambda x: (x, reduce_sum),
        elements=B * (2 * pairs * D + pairs * (1 if reduce_sum else D)),
        flops=B * pairs * D * (2 if reduce_sum else 1),
        backward_flops=2 * B * pairs * D,
    )


def bilinear_interaction_case(B: int, F: int, D: int, kind: str = "field_interaction") -> OpCase:
    """Field embeddings [B, F, D], and as many weights [D, D] as ``kind`` has."""
    pairs = F * (F - 1) // 2
    n = (1, max(F - 1, 0), pairs)[KINDS.index(kind)]
    products = pairs if kind == "field_interaction" else max(F - 1, 0)

    def make(dtype, generator):
        weights = [randn((D, D), dtype, generator, max(D, 1) ** -0.5) for _ in range(n)]
        return randn((B, F, D), dtype, generator), *weights

    return OpCase(
        op="bilinear_interaction",
        id=f"bilinear_interaction-B{B}-F{F}-D{D}-{kind}",
        make=make,
        function=lambda x, *weights: bilinear_interaction(x, weights, kind),
        reference=lambda x, *weights: reference.bilinear_interaction(x, weights, kind),
        overload=torch.ops.rankkernels.bilinear_interaction.default,
        arguments=lambda x, *weights: (x, list(weights), KINDS.index(kind)),
        elements=B * (F + pairs) * D,
        flops=2 * B * products * D * D,
        backward_flops=6 * B * products * D * D,
    )


def din_attention_case(
    B: int,
    L: int,
    D: int,
    widths: Sequence[int],
    activation: str = "dice",
    batch_norm: bool = True,
    use_softmax: bool = False,
    training: bool = True,
    form: str = "padded",
    dropout: float = 0.0,
    count_padding: bool = False,
    return_scores: bool = False,
    users: int | None = None,
) -> OpCase:
    """``form`` is padded, lengths, mask or offsets. Unless padded, lengths are random, the first 0 and the last L. With
    ``users`` the samples share so many histories."""
    generator = torch.Generator().manual_seed(B * 1000 + L)
    U = B if users is None else users
    counts = torch.tensor(L).expand(U)  # without memory: huge cases are compiled, and never made
    if form != "padded" and U:
        counts = torch.randint(0, L + 1, (U,), generator=generator)
        counts[0] = 0
        counts[-1] = L
    index = () if users is None else (torch.arange(B).neg().remainder(max(U, 1)),)
    valid = None
    if form == "mask":
        valid = (torch.arange(L) < counts[:, None])[:, torch.randperm(L, generator=generator)]
    N, rows = int(counts.sum()), int((counts if users is None else counts[index[0]]).sum())
    norms = norms_per_layer(activation, batch_norm)
    running = [
        t.double()
        for w in widths
        for _ in range(norms)
        for t in (torch.linspace(-0.5, 0.5, w), torch.linspace(0.5, 2, w))
    ]
    flags = (list(ACTIVATIONS).index(activation), batch_norm, use_softmax, count_padding, return_scores, training, 1e-5,
             1e-3, dropout)  # fmt: skip

    def make(dtype, generator):
        history = randn((N, D) if form == "offsets" else (U, L, D), dtype, generator)
        params, width = [], 4 * D
        for w in widths:
            params += [randn((w, width), dtype, generator, max(width, 1) ** -0.5), randn((w,), dtype, generator)]
            vectors = [w] * (params_per_layer(activation, batch_norm) - 2)
            if activation in ("prelu", "dice"):
                vectors[-1] = 1
            params += [randn((n,), dtype, generator) for n in vectors]
            width = w
        params += [randn((1, width), dtype, generator, max(width, 1) ** -0.5), randn((1,), dtype, generator)]
        extra = {
            "padded": (),
            "lengths": (counts,),
            "mask": (valid,),
            "offsets": (torch.cat([counts.new_zeros(1), counts.cumsum(0)]),),
        }[form]
        seed = [torch.randint(-(2**63), 2**63 - 1, (), generator=generator)] if dropout else []
        return history, randn((B, D), dtype, generator), *extra, *index, *params, *seed

    def arguments(history, target, *rest):
        forms, rest = [None, None, None], list(rest)
        if form != "padded":
            forms[("lengths", "mask", "offsets").index(form)], *rest = rest
        forms.append(None if users is None else rest.pop(0))
        seed = rest.pop() if dropout else None
        stats_dtype = torch.float64 if history.dtype == torch.float64 else torch.float32
        stats = [] if training else [t.to(history.device, stats_dtype) for t in running]
        return history, target, *forms, rest, stats, *flags, seed, ""

    def run_reference(*inputs):
        history, target, lengths, mask, offsets, history_index, params, stats, *_, seed, _ = arguments(*inputs)
        hidden, weight, bias = unflatten(params, stats, activation, batch_norm, 1e-5, 1e-3)
        return reference.din_attention(
            history, target, hidden, weight, bias, lengths=lengths, mask=mask, offsets=offsets,
            history_index=history_index, use_softmax=use_softmax, count_padding=count_padding,
            return_scores=return_scores, training=training, dropout=dropout, seed=seed,
        )[0]  # fmt: skip

    mlp = sum(2 * rows * a * b for a, b in zip((D, *widths), (*widths, 1)))
    flags_id = "-bn" * batch_norm + "-softmax" * use_softmax + "-train" * training + "-dropout" * (dropout > 0)
    flags_id += "-counted" * count_padding + "-scores" * return_scores + f"-users{users}" * (users is not None)
    return OpCase(
        op="din_attention",
        id=f"din_attention-B{B}-L{L}-D{D}-{'x'.join(map(str, widths)) or 'linear'}-{activation}{flags_id}-{form}",
        make=make,
        function=lambda *inputs: torch.ops.rankkernels.din_attention.default(*arguments(*inputs))[0],
        reference=run_reference,
        overload=torch.ops.rankkernels.din_attention.default,
        arguments=arguments,
        elements=N * D + 2 * B * D,
        flops=mlp + 4 * rows * D,
        backward_flops=3 * mlp + 4 * rows * D,
    )


def norm_activation_case(
    N: int, H: int, activation: str = "dice", batch_norm: bool = True, affine: bool = True, training: bool = True
) -> OpCase:
    """``affine``: whether a normalization has weight and bias. The slope of prelu and dice is one for all units."""
    affine = affine and batch_norm
    running = torch.linspace(-0.5, 0.5, H).double(), torch.linspace(0.5, 2, H).double()
    flags = (list(ACTIVATIONS).index(activation), batch_norm, training, 1e-5, 1e-3)

    def make(dtype, generator):
        alpha = {"prelu": 1, "dice": 1, "dice_batch_norm": H}.get(activation)
        sizes = [H, H] * affine + ([] if alpha is None else [alpha])
        return randn((N, H), dtype, generator), *(randn((n,), dtype, generator) for n in sizes)

    def arguments(x, *params):
        params = list(params)
        weight, bias = (params.pop(0), params.pop(0)) if affine else (None, None)
        stats_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        stats = [t.to(x.device, stats_dtype) if batch_norm and not training else None for t in running]
        return x, weight, bias, params[0] if params else None, *stats, *flags

    def run_reference(*inputs):
        x, weight, bias, alpha, mean, var, *_ = arguments(*inputs)
        norm = reference.BatchNorm(weight, bias, mean, var, 1e-5) if batch_norm else None
        return reference.norm_activation(x, norm, activation, alpha, training)[0]

    norm_id = "" if not batch_norm else "-bn" if affine else "-bn_not_affine"
    return OpCase(
        op="norm_activation",
        id=f"norm_activation-N{N}-H{H}-{activation}{norm_id}" + ("-train" if training else ""),
        make=make,
        function=lambda *inputs: torch.ops.rankkernels.norm_activation.default(*arguments(*inputs))[0],
        reference=run_reference,
        overload=torch.ops.rankkernels.norm_activation.default,
        arguments=arguments,
        elements=2 * N * H,
        flops=(30 if activation.startswith("dice") else 10) * N * H,
        backward_flops=(60 if activation.startswith("dice") else 20) * N * H,
    )


def embedding_bag_case(
    rows: Sequence[int],
    dims: Sequence[int],
    tables: Sequence[int],
    modes: Sequence[str],
    B: int,
    L: int,
    padding_idx: int | None = None,
    weighted: bool = False,
    jagged: bool = False,
) -> OpCase:
    """One feature for each of ``tables``; pooled ones have ``L`` ids a bag, or 0 to L with ``jagged``."""

    def make(dtype, generator):
        weights = [randn((r, d), dtype, generator) for r, d in zip(rows, dims)]
        ids, offsets, factors = [], [], []
        for table, mode in zip(tables, modes):
            shape = (B,) if mode == "none" else (B, L)
            if jagged and mode != "none":
                counts = torch.randint(0, L + 1, (B,), generator=generator)
                offsets.append(counts.cumsum(0) - counts)
                shape = (int(counts.sum()),)
            ids.append(torch.randint(0, rows[table], shape, generator=generator))
            if weighted and mode in ("sum", "mean"):
                factors.append(randn(shape, dtype, generator))
        return *weights, *ids, *offsets, *factors

    def split(inputs):
        inputs, n = list(inputs), len(tables)
        pooled = [m != "none" for m in modes]
        take = [len(rows), n, sum(pooled) if jagged else 0, sum(m in ("sum", "mean") for m in modes) if weighted else 0]
        weights, ids, offsets, factors = (([inputs.pop(0) for _ in range(k)]) for k in take)
        offsets = [offsets.pop(0) if jagged and p else None for p in pooled]
        factors = [factors.pop(0) if weighted and m in ("sum", "mean") else None for m in modes]
        return weights, ids, offsets, factors

    def function(*inputs):
        weights, ids, offsets, factors = split(inputs)
        outs = ops.table_batched_embedding_bag(
            weights, ids, modes=modes, tables=tables, offsets=offsets, per_sample_weights=factors,
            padding_idx=[padding_idx] * len(tables), frozen_rows=[padding_idx] * len(rows),
        )  # fmt: skip
        return torch.cat(outs, 1)

    def run_reference(*inputs):
        weights, ids, offsets, factors = split(inputs)
        outs = []
        for f, table in enumerate(tables):
            if modes[f] == "none":
                outs.append(reference.embedding(weights[table], ids[f], padding_idx))
            else:
                settings = offsets[f], modes[f], factors[f], padding_idx, padding_idx
                outs.append(reference.embedding_bag(weights[table], ids[f], *settings))
        return torch.cat(outs, 1)

    def arguments(*inputs):
        weights, ids, offsets, factors = split(inputs)
        empty, n = weights[0].new_empty(0), len(tables)
        missing = -1 if padding_idx is None else padding_idx
        return (
            weights,
            ids,
            [empty if o is None else o for o in offsets],
            [empty if w is None else w for w in factors],
            list(tables),
            [MODES.index(m) for m in modes],
            [missing] * n,
            [missing] * len(rows),
            [],
            "\n".join(f"feature {f}" for f in range(n)),
        )

    lookups = sum(B * (1 if m == "none" else L) * dims[t] for t, m in zip(tables, modes))
    return OpCase(
        op="embedding_bag",
        id=f"embedding_bag-{len(rows)}x{max(rows)}x{max(dims)}-B{B}-L{L}-{'+'.join(sorted(set(modes)))}"
        + ("-padding" if padding_idx is not None else "")
        + ("-weighted" if weighted else "")
        + ("-jagged" if jagged else ""),
        make=make,
        function=function,
        reference=run_reference,
        overload=torch.ops.rankkernels.embedding_bag.default,
        arguments=arguments,
        elements=lookups + sum(B * dims[t] for t in tables),
        flops=lookups,
        backward_flops=lookups,
    )


def embedding_fm_case(
    rows: Sequence[int], D: int, tables: Sequence[int], modes: Sequence[str], B: int, L: int = 3, linear: bool = True,
    padding_idx: int | None = None, dense: int = 0,
) -> OpCase:  # fmt: skip
    """One feature for each of ``tables``; the result is the embeddings with ``dense`` more columns, the FM and the
    linear term side by side."""
    F, missing = len(tables), -1 if padding_idx is None else padding_idx

    def make(dtype, generator):
        weights = [randn((r, D), dtype, generator) for r in rows]
        a = [randn((1, F * D), dtype, generator)] if linear else []
        columns = [randn((dense, B), dtype, generator).t()] if dense else []
        ids = [
            torch.randint(0, rows[t], (B,) if m == "none" else (B, L), generator=generator)
            for t, m in zip(tables, modes)
        ]
        return *weights, *a, *columns, *ids

    def split(inputs):
        weights, rest = list(inputs[: len(rows)]), list(inputs[len(rows) :])
        a = rest.pop(0) if linear else None
        columns = rest.pop(0) if dense else None
        return weights, rest, a, columns

    def function(*inputs):
        weights, ids, a, columns = split(inputs)
        outs = ops.embedding_fm(
            weights, ids, a, columns, modes=modes, tables=tables, padding_idx=[padding_idx] * F,
            frozen_rows=[padding_idx] * len(rows),
        )  # fmt: skip
        return torch.cat([out for out in outs if out is not None], 1)

    lookups = embedding_bag_case(rows, [D] * len(rows), tables, modes, B, L, padding_idx)

    def run_reference(*inputs):
        weights, ids, a, columns = split(inputs)
        embeddings = lookups.reference(*weights, *ids)
        parts = embeddings, columns, *reference.fm_and_linear(embeddings, D, a)
        return torch.cat([t for t in parts if t is not None], 1)

    def arguments(*inputs):
        weights, ids, a, columns = split(inputs)
        numbers = list(tables), [MODES.index(m) for m in modes], [missing] * F, [missing] * len(rows), []
        return weights, ids, [], [], *numbers, "\n".join(f"feature {f}" for f in range(F)), a, columns

    return OpCase(
        op="embedding_fm",
        id=f"embedding_fm-{len(rows)}x{max(rows)}x{D}-B{B}-F{F}-{'+'.join(sorted(set(modes)))}"
        + ("-linear" if linear else "")
        + (f"-dense{dense}" if dense else "")
        + ("-padding" if padding_idx is not None else ""),
        make=make,
        function=function,
        reference=run_reference,
        overload=torch.ops.rankkernels.embedding_fm.default,
        arguments=arguments,
        elements=lookups.elements + 2 * B,
        flops=lookups.flops + 5 * B * F * D,
        backward_flops=lookups.flops + 8 * B * F * D,
    )


def augru_case(B: int, L: int, D: int, K: int, attention: bool = True, form: str = "lengths") -> OpCase:
    """K inputs a position. ``form`` is padded or lengths; those are random, the first 0 and the last L."""
    counts = torch.randint(0, L + 1, (B,), generator=torch.Generator().manual_seed(B * 1000 + L))
    counts[:1], counts[1:][-1:] = 0, L
    more = [counts] if form == "lengths" else []
    steps = B * L if form == "padded" else int(counts.sum())

    def make(dtype, generator):
        tensors = [randn((B, L, K), dtype, generator), randn((3 * D, K), dtype, generator, max(K, 1) ** -0.5)]
        tensors.append(randn((3 * D, D), dtype, generator, max(D, 1) ** -0.5))
        tensors.append(randn((4, D), dtype, generator))
        if attention:
            tensors.append(torch.rand((B, L), dtype=torch.float64, generator=generator).to(dtype))
        return *tensors, *more

    def arguments(x, input_weight, weight, bias, *rest):
        rest = list(rest)
        return x, input_weight, weight, bias, rest.pop(0) if attention else None, rest.pop(0) if rest else None

    return OpCase(
        op="augru",
        id=f"augru-B{B}-L{L}-D{D}-K{K}-{form}" + ("" if attention else "-gru"),
        make=make,
        function=lambda *inputs: ops.augru(*arguments(*inputs)),
        reference=lambda *inputs: reference.augru(*arguments(*inputs)),
        overload=torch.ops.rankkernels.augru.default,
        arguments=arguments,
        elements=steps * (K + attention) + B * L * D,
        flops=steps * 6 * D * (D + K),
        backward_flops=steps * 18 * D * (D + K),
    )


def target_attention_case(B: int, H: int, L: int, D: int, form: str = "padded", users: int | None = None) -> OpCase:
    """``form`` is padded, lengths, mask or offsets; lengths are random, the first 0 and the last L. With ``users`` the
    samples share so many histories."""
    generator = torch.Generator().manual_seed(B * 1000 + L)
    U = B if users is None else users
    counts = torch.full((U,), L)
    if form != "padded":
        counts = torch.randint(0, L + 1, (U,), generator=generator)
        counts[:1], counts[1:][-1:] = 0, L
    index = [] if users is None else [torch.arange(B).neg().remainder(max(U, 1))]
    extra = []
    if form == "lengths":
        extra = [counts]
    elif form == "mask":
        extra = [(torch.arange(L) < counts[:, None])[:, torch.randperm(L, generator=generator)]]
    elif form == "offsets":
        extra = [torch.cat([counts.new_zeros(1), counts.cumsum(0)])]
    rows = B * L if users is None else int(counts[index[0]].sum())

    def make(dtype, generator):
        query = randn((B, H, D), dtype, generator, max(D, 1) ** -0.5)
        history = randn((int(counts.sum()), D) if form == "offsets" else (U, L, D), dtype, generator)
        return query, history, *extra, *index

    def arguments(query, history, *rest):
        rest = list(rest)
        forms = [rest.pop(0) if form == name else None for name in ("lengths", "mask", "offsets")]
        return query, history, *forms, rest.pop(0) if rest else None

    return OpCase(
        op="target_attention",
        id=f"target_attention-B{B}-H{H}-L{L}-D{D}-{form}" + ("" if users is None else f"-U{users}"),
        make=make,
        function=lambda *inputs: ops.target_attention(*arguments(*inputs)),
        reference=lambda *inputs: reference.target_attention(*arguments(*inputs)),
        overload=torch.ops.rankkernels.target_attention.default,
        arguments=arguments,
        elements=U * L * D + 2 * B * H * D,
        flops=4 * rows * H * D,
        backward_flops=10 * rows * H * D,
    )


TEST_CASES = [
    target_attention_case(3, 2, 5, 4),
    target_attention_case(4, 3, 70, 17, "mask"),
    target_attention_case(5, 1, 67, 9, "lengths"),
    target_attention_case(4, 9, 6, 33, "offsets"),
    target_attention_case(7, 4, 66, 5, "offsets", users=3),
    target_attention_case(70, 2, 3, 4, "lengths", users=2),
    target_attention_case(6, 2, 5, 3, "mask", users=4),
    target_attention_case(2, 2, 0, 4),
    target_attention_case(0, 2, 3, 4),
    *(
        augru_case(B, L, D, K, attention, form)
        for B, L, D, K, attention, form in (
            (5, 4, 3, 4, True, "lengths"),
            (3, 5, 8, 8, False, "padded"),
            (35, 2, 9, 5, False, "lengths"),
            (2, 3, 1, 19, True, "padded"),
            (1, 2, 20, 33, True, "padded"),
            (0, 3, 4, 4, True, "lengths"),
            (3, 0, 4, 4, False, "lengths"),
            (2, 3, 4, 0, True, "padded"),
        )
    ),
    *(
        fm_interaction_case(B, F, D, reduce_sum)
        for B, F, D in ((5, 3, 10), (1, 1, 1), (3, 39, 16), (4, 2, 67), (2, 7, 130), (0, 3, 4), (3, 1, 8), (2, 5, 200))
        for reduce_sum in (True, False)
    ),
    *(cross_network_case(*s) for s in ((5, 7, 3), (1, 1, 1), (9, 33, 2), (4, 5, 0), (0, 6, 2), (2, 0, 2))),
    *(
        pairwise_dot_case(*s)
        for s in ((5, 3, 10), (1, 2, 1), (3, 13, 16), (2, 27, 33), (0, 3, 4), (3, 1, 8), (2, 4, 0))
    ),
    pairwise_dot_case(4, 5, 7, weighted=True),
    *(cross_layer_case(*s) for s in ((5, 7), (3, 65), (2, 1, False), (0, 6))),
    *(
        mixed_experts_case(*s)
        for s in ((5, 4, 32), (35, 3, 5), (67, 1, 17), (2, 2, 1), (3, 5, 50), (0, 2, 3), (2, 3, 0), (3, 0, 0))
    ),
    *(
        mixed_cross_layer_case(*s)
        for s in ((67, 13, 4, 32), (5, 37, 3, 5), (2, 1, 1, 1), (3, 20, 5, 7), (0, 5, 2, 3), (3, 0, 2, 3), (3, 4, 2, 0))
    ),
    *(ffm_interaction_case(*s) for s in ((3, 4, 5), (2, 3, 8, False), (2, 3, 19, False), (0, 2, 3), (2, 1, 4))),
    *(bilinear_interaction_case(*s) for s in ((3, 4, 5), (35, 3, 9), (0, 3, 4), (2, 1, 3))),
    *(bilinear_interaction_case(3, 4, 5, kind) for kind in KINDS[:2]),
    pairwise_dot_case(3, 18, 4, weighted=True),
    din_attention_case(4, 5, 6, [7]),
    din_attention_case(3, 9, 10, [5, 4], "sigmoid", batch_norm=False, training=False, form="lengths"),
    din_attention_case(4, 6, 7, [9, 3], "dice_batch_norm", batch_norm=False, use_softmax=True, form="mask"),
    din_attention_case(5, 4, 3, [6], "prelu", training=False, use_softmax=True, form="offsets"),
    din_attention_case(9, 14, 1, [3, 5, 4], "leakyrelu", batch_norm=False, form="lengths"),
    din_attention_case(2, 3, 4, [], batch_norm=False, training=False),
    din_attention_case(5, 9, 6, [17, 3], form="mask", dropout=0.3),
    din_attention_case(4, 7, 3, [5], "sigmoid", batch_norm=False, training=False, form="offsets", dropout=0.6),
    din_attention_case(7, 9, 6, [5], "dice_batch_norm", batch_norm=False, form="lengths", count_padding=True),
    din_attention_case(4, 9, 6, [7, 3], use_softmax=True, form="mask", count_padding=True, dropout=0.3),
    din_attention_case(4, 5, 6, [7], "sigmoid", False, True, False, form="lengths", count_padding=True),
    din_attention_case(4, 9, 5, [3], "relu", False, form="mask", return_scores=True),
    din_attention_case(
        5, 6, 7, [8], "dice_batch_norm", False, True, form="lengths", count_padding=True, return_scores=True
    ),
    din_attention_case(4, 6, 3, [5], use_softmax=True, training=False, form="offsets", return_scores=True),
    din_attention_case(2, 0, 4, [5], training=False),
    din_attention_case(0, 3, 4, [5], "relu", training=False),
    din_attention_case(7, 6, 5, [7], users=3),
    din_attention_case(5, 9, 6, [5, 4], "dice_batch_norm", False, True, form="lengths", dropout=0.3, users=4),
    din_attention_case(6, 5, 3, [6], "sigmoid", form="mask", count_padding=True, return_scores=True, users=2),
    din_attention_case(5, 4, 3, [6], "prelu", training=False, use_softmax=True, form="offsets", users=3),
    din_attention_case(0, 3, 4, [5], "relu", training=False, users=2),
    norm_activation_case(7, 10),
    norm_activation_case(5, 33, training=False),
    norm_activation_case(40, 7, "dice_batch_norm"),
    norm_activation_case(9, 20, "dice_batch_norm", affine=False),
    norm_activation_case(6, 5, "dice_batch_norm", training=False),
    norm_activation_case(12, 9, "sigmoid"),
    norm_activation_case(4, 17, "relu", training=False),
    norm_activation_case(30, 8, "prelu", affine=False),
    norm_activation_case(3, 65, "leakyrelu"),
    norm_activation_case(18, 4, "linear"),
    norm_activation_case(6, 130, batch_norm=False, training=False),
    norm_activation_case(1, 1, batch_norm=False),
    norm_activation_case(3, 6, "sigmoid", batch_norm=False),
    norm_activation_case(0, 4, "relu", training=False),
    embedding_bag_case([11], [5], [0], ["sum"], B=4, L=3),
    embedding_bag_case([11, 7], [5, 5], [0, 1, 0], ["mean", "none", "max"], B=4, L=3, padding_idx=0),
    embedding_bag_case([9], [3], [0, 0], ["sum", "mean"], B=3, L=4, weighted=True),
    embedding_bag_case([9, 4], [3, 8], [0, 1], ["mean", "max"], B=5, L=4, jagged=True, padding_idx=1),
    embedding_bag_case([9], [3], [0], ["sum"], B=5, L=4, jagged=True, weighted=True),
    embedding_bag_case([9], [3], [0, 0], ["none", "sum"], B=0, L=4),
    embedding_fm_case([11, 7, 5], 4, [0, 1, 2], ["none"] * 3, B=5),
    embedding_fm_case([11, 7], 5, [0, 1, 0], ["mean", "none", "max"], B=4, padding_idx=2),
    embedding_fm_case([11, 7], 5, [0, 1], ["mean", "none"], B=4, dense=3),
    embedding_fm_case([9], 19, [0, 0], ["none", "sum"], B=3, linear=False, dense=1),
    embedding_fm_case([9], 3, [0, 0], ["none", "sum"], B=0, dense=2),
]

BENCH_CASES = [
    target_attention_case(1024, 2, 51, 16, "mask"),
    target_attention_case(64, 4, 1000, 64, "mask"),
    target_attention_case(8, 4, 10000, 64),
    target_attention_case(256, 4, 1000, 64, "offsets", users=8),
    augru_case(1024, 50, 16, 16),
    augru_case(1024, 50, 64, 64, attention=False),
    fm_interaction_case(65536, 39, 16),
    fm_interaction_case(8192, 39, 64),
    fm_interaction_case(4096, 39, 10),
    fm_interaction_case(4096, 26, 16),
    norm_activation_case(4096, 256, "relu"),
    norm_activation_case(1024, 256, "dice"),
    norm_activation_case(65536, 256, "dice"),
    norm_activation_case(65536, 256, "dice_batch_norm"),
]
