"""DIN attention in Triton: forward and backward, one or two hidden layers, scores and pooling in one kernel.

Sample b has target t [D] and history rows h_l [D]. The first layer W = [Wt | Wh | Wd | Wp] takes [t, h, t - h, t * h]:

    z_l = Wt t + Wh h_l + Wd (t - h_l) + Wp (t * h_l) + bias = c + M h_l
    c   = (Wt + Wd) t + bias,    M = (Wh - Wd) + Wp diag(t)        M is [H, D], one a sample, built on chip

    a_l = act(z_l)  [and z2_l = W2 a_l + bias2, a2_l = act(z2_l)],    s_l = <out_weight, a_l> + out_bias
    w_l = s_l, or softmax_l(s),    out = sum_l w_l h_l

Backward, with dw_l = <dout, h_l>, ds_l = dw_l or w_l (dw_l - sum_k w_k dw_k) = w_l (dw_l - <dout, out>),
G_l = dL/dz_l, dM = sum_l G_l h_l^T and dc = sum_l G_l:

    dh_l = w_l dout + M^T G_l             dt = (Wt + Wd)^T dc + sum_H Wp * dM
    d(Wh - Wd) = sum_b dM_b               dWp = sum_b dM_b diag(t_b)               d(Wt + Wd) = sum_b dc_b t_b^T

Normalizations are folded into the products before them (din_attention_layers.py), in training with statistics of a
pass over the rows for each layer, and the sums that their backward needs come from a launch of its own.

Launches: forward one and one for each layer, in training two more a layer; backward as ``_launches`` says, 1 to 5, one
more a layer for its vectors' gradients and one for its weight's, and three products of a library without rows of
history: c, d(Wt + Wd) and (Wt + Wd)^T dc. Beside its inputs the backward keeps the folded layers, the scores and, with
a softmax, out in float32 and its peak and total. The forward computes c itself. Lengths cost whole blocks of BLOCK_L
rows, and so does a mask, up to its last valid row. A batch of few samples is split over their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rankkernels._triton._alignment import alignment
from rankkernels._triton._launch import launch
from rankkernels._triton._products import precision_of
from rankkernels._triton._programs import programs_of
from rankkernels._triton.din_attention_backward import din_attention_backward_kernel
from rankkernels._triton.din_attention_forward import (
    din_attention_join_kernel,
    din_attention_kernel,
    din_attention_statistics_kernel,
)
from rankkernels._triton.din_attention_layers import (
    din_attention_fold_kernel,
    din_attention_sums_kernel,
    din_attention_unfold_kernel,
)
from rankkernels.ops.attention_params import (
    MAX_WIDTH,
    VECTORS,
    Flags,
    block_of,
    folded_size,
    has_gpu_kernel,
    hidden_widths,
    norms_per_layer,
    saved_size_on_gpu,
    unflatten,
)

PROGRAMS: int | None = None  # other than ``programs_of`` says, for tests
UNITS = 8  # of a layer, that a program folds or unfolds: a sector of 32 bytes of each row


def supports(history: Tensor, params: Sequence[Tensor], flags: Flags) -> bool:
    """Whether the kernels serve these arguments; a library's products do the others.

    One or two hidden layers, in training with a normalization one, D and hidden widths from 1 to MAX_WIDTH, float32,
    float16 and bfloat16. Not more layers or wider ones, and not float64, which has no tensor cores to speak of. Two
    normalized ones need five launches that compute the products again, for which keeping them is cheaper. Not the
    scores alone, nor padding where it counts.
    """
    widths = hidden_widths(params, flags)
    statistics = flags.training and norms_per_layer(flags.name, flags.batch_norm)
    layers, widths = len(widths), [history.size(-1), *widths]
    return (
        has_gpu_kernel(statistics, flags.use_softmax, flags.count_padding, flags.return_scores)
        and 1 <= layers <= (1 if statistics else 2)
        and 0 < min(widths) <= max(widths) <= MAX_WIDTH
        and history.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def _registers() -> dict[str, int]:
    """256 threads, of 32 or 64 a warp."""
    return {"num_stages": 1} | ({"num_warps": 4} if torch.version.hip else {"num_warps": 8, "maxnreg": 255})


class Partials(NamedTuple):
    """Where the sums of a program of the backward are in its row of ``size``: first those for M's and Wp's gradients
    [2, BLOCK_D, BLOCK_H], then for the second layer's weight [BLOCK_H2, BLOCK_H] and bias, for each layer's vectors
    [5, BLOCK] as ``_plus_sums`` has them, for the first layer's bias, and for the output layer's weight and bias."""

    weight2: int
    sums: int
    sums2: int
    bias: int
    output: int
    size: int


@functools.cache
def _partials(BLOCK_D: int, BLOCK_H: int, BLOCK_H2: int) -> Partials:
    """BLOCK_H2 is 0 where there is no second layer."""
    weight2 = 2 * BLOCK_D * BLOCK_H
    sums = weight2 + BLOCK_H2 * (BLOCK_H + 1)
    sums2 = sums + 5 * BLOCK_H
    bias = sums2 + 5 * BLOCK_H2
    output = bias + BLOCK_H
    return Partials(weight2, sums, sums2, bias, output, output + (BLOCK_H2 or BLOCK_H) + 32)


class _Call:
    """The arguments of the op, and what they are to the kernels."""

    def __init__(self, history, target, lengths, mask, offsets, params, running_stats, flags: Flags):
        self.history, self.target, self.lengths, self.mask, self.offsets = history, target, lengths, mask, offsets
        self.flags, (self.B, self.D) = flags, target.shape
        layers = [p.contiguous() for p in params], running_stats, flags.name, flags.batch_norm
        self.hidden, self.out_weight, self.out_bias = unflatten(*layers, flags.norm_eps, flags.dice_eps)
        self.statistics = flags.training and norms_per_layer(flags.name, flags.batch_norm) > 0
        self.widths = [hidden.bias.numel() for hidden in self.hidden]
        self.blocks = [block_of(self.D), *map(block_of, self.widths)]
        self.programs = PROGRAMS or programs_of(history)
        rows = history.shape[:-1].numel()
        #: Tasks a sample, so that few samples make as many programs, each with 64 rows and more.
        self.splits = max(1, min(self.programs // self.B, rows // self.B // 64)) if self.B else 1
        self.tasks = self.B * self.splits
        self.size = saved_size_on_gpu(self.B, self.D, self.widths, rows, flags.use_softmax)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.history.device)

    def layer_at(self, i: int) -> int:
        return folded_size(self.D, self.widths[:i])

    def vectors_at(self, i: int) -> int:
        return self.layer_at(i) + (1 if i else 3) * self.blocks[i] * self.blocks[i + 1]

    def launch(self, kernel, grid, saved: Tensor, own: Sequence, first: tuple, last: tuple, layers: int) -> None:
        """A kernel over rows of history: with its ``own`` pointers, the numbers ``first`` before and the constants
        ``last`` behind what all have; of so many layers."""
        history, target, lengths, mask, offsets = self.history, self.target, self.lengths, self.mask, self.offsets
        if offsets is not None:
            form, rows, (stride_hb, stride_hl, stride_hd) = "offsets", offsets.contiguous(), (0, *history.stride())
        else:
            form = "all" if lengths is None and mask is None else "lengths" if mask is None else "mask"
            stride_hb, stride_hl, stride_hd = history.stride()
            rows = mask if lengths is None else lengths.contiguous()
        stride_mb, stride_ml = (0, 0) if mask is None else mask.stride()
        flags, D, p, (BLOCK_D, BLOCK_H, *_) = self.flags, self.D, self.flags.dropout, self.blocks
        H, H2 = self.widths[0], self.widths[1] if layers > 1 else 0
        BLOCK_H2 = self.blocks[2] if layers > 1 else 32
        numbers = (
            self.splits, history.size(-2), BLOCK_D // 32, BLOCK_H // 32, BLOCK_H2 // 32, flags.dice_eps,
            round(p * 2**24), 1 / (1 - p) if p < 1 else 0.0, stride_hb, stride_hl, stride_hd, *target.stride(),
            stride_mb, stride_ml,
        )  # fmt: skip
        constants = (
            D, H, H2, flags.name, self.statistics, p > 0, form, flags.use_softmax, precision_of(history.dtype),
            alignment(history), stride_hd == 1, BLOCK_D, BLOCK_H, BLOCK_H2,
        )  # fmt: skip
        pointers = (history, target, rows, saved, flags.seed if p > 0 else None, *own)
        launch(kernel, grid, pointers, (*first, *numbers), (*constants, *last), **_registers())

    def fold(self, i: int, saved: Tensor, statistics: str, partials: Tensor | None = None, stats=None) -> None:
        """Layer i into ``saved``; of the batch also its statistics into ``stats``."""
        weight, bias, norm, _, alpha, dice_norm, _ = self.hidden[i]
        norm, dice = ((None,) * 5 if n is None else n for n in (norm, dice_norm))
        running = (*norm[2:4], *dice[2:4]) if statistics == "running" else (None,) * 4
        out_weight = self.out_weight if i == len(self.hidden) - 1 else None
        BLOCK_K, BLOCK_H = self.blocks[i : i + 2]
        norms = norms_per_layer(self.flags.name, self.flags.batch_norm)
        one_alpha = alpha is not None and alpha.numel() == 1
        launch(
            din_attention_fold_kernel,
            (BLOCK_H // UNITS,),
            (weight, bias, *norm[:2], alpha, *dice[:2], *running, out_weight, partials, stats, saved),
            (0 if partials is None else partials.size(0), norm[4] or 0.0, dice[4] or 0.0),
            (
                self.layer_at(i), 2 * norms * sum(self.widths[:i]), statistics, one_alpha,
                self.widths[i - 1] if i else self.D, self.widths[i], BLOCK_K, BLOCK_H,
                triton.next_power_of_2(self.programs), UNITS,
            ),
            num_warps=4,
        )  # fmt: skip


def din_attention(
    history: Tensor, target: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None,
    params: Sequence[Tensor], running_stats: Sequence[Tensor], flags: Flags,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as the op's, those that ``supports`` allows -> out [B, D], batch_stats and what the backward needs."""
    call = _Call(history, target, lengths, mask, offsets, params, running_stats, flags)
    B, D, layers = call.B, call.D, len(call.hidden)
    out = torch.empty((B, D), dtype=history.dtype, device=history.device)
    saved = call.empty(call.size)
    rows = history.shape[:-1].numel()
    if call.statistics and rows < 2:
        raise ValueError(f"din_attention: training needs more than one valid row to take statistics of, got {rows}")
    if B == 0:
        return out, call.empty(0), saved
    norms = norms_per_layer(flags.name, flags.batch_norm)
    with torch.cuda.device_of(history):
        batch_stats = call.empty(2 * norms * sum(call.widths) if call.statistics else 0)
        programs = min(call.tasks, call.programs)
        for i in range(layers):
            call.fold(i, saved, "running" if norms and not call.statistics else "none")
            if call.statistics:
                partials = call.empty(programs, 2 * call.blocks[i + 1] + 1)
                call.launch(
                    din_attention_statistics_kernel, (programs,), saved, (partials,), (call.tasks,), (), layers=i + 1
                )
                call.fold(i, saved, "batch", partials, batch_stats)
        split = call.splits > 1
        shares = call.empty(call.tasks, D + 2) if split else None
        own = call.out_bias, out, shares
        call.launch(din_attention_kernel, (call.tasks,), saved, own, (), (split,), layers)
        if split:
            BLOCK_H2, H2 = (call.blocks[2], call.widths[1]) if layers > 1 else (32, 0)
            constants = D, H2, flags.use_softmax, call.blocks[0], call.blocks[1], BLOCK_H2
            launch(din_attention_join_kernel, (B,), (saved, shares, out), (call.splits,), constants, num_warps=4)
    return out, batch_stats, saved


def _of_samples(x: Tensor, B: int) -> Tensor:
    """Sums over each sample's tasks."""
    return x if x.size(0) == B else x.view(B, -1, x.size(1)).sum(1)


def _launches(call: _Call) -> list[list[str]]:
    """What each launch of the backward is for, as much as there are registers for. In training, sums come before what
    needs their means."""
    BLOCK_D, BLOCK_H, *BLOCK_H2 = call.blocks
    rows = [["ROWS", "WEIGHT"]] if BLOCK_D == 32 and BLOCK_H <= 64 else [["ROWS"], ["WEIGHT"]]
    if call.statistics and BLOCK_H2:
        sums = [["WEIGHT2", "FIRST"]] if BLOCK_H * BLOCK_H2[0] <= 64 * 128 else [["FIRST"], ["WEIGHT2"]]
        return [["LAST"], *sums, *rows]
    if call.statistics:
        return [["LAST", "FIRST"], *rows]
    rows[0] = ["FIRST", *rows[0]]
    return [["LAST", "WEIGHT2"], *rows] if BLOCK_H2 else [["LAST", *rows[0]], *rows[1:]]


def _new_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Of each of the params, in one piece of memory where they have one dtype: four of torch's ops for any number of
    them. The larger ones come first, so that those of one value leave the others aligned."""
    first = params[0]
    if any(p.dtype != first.dtype for p in params):
        return [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in params]
    order = sorted(range(len(params)), key=lambda i: -params[i].numel())
    sizes = [params[i].numel() for i in order]
    parts = torch.empty(sum(sizes), dtype=first.dtype, device=first.device).split_with_sizes(sizes)
    of = dict(zip(order, parts))
    return [of[i] if p.dim() == 1 else of[i].view(p.shape) for i, p in enumerate(params)]


class _Backward:
    """The gradients of a call."""

    def __init__(self, call: _Call, saved: Tensor, params: Sequence[Tensor]):
        self.call, self.saved = call, saved
        (BLOCK_D, BLOCK_H, *BLOCK_H2), D = call.blocks, call.D
        self.at = _partials(BLOCK_D, BLOCK_H, BLOCK_H2[0] if BLOCK_H2 else 0)
        self.programs = min(call.tasks, call.programs)
        self.partials = call.empty(self.programs, self.at.size)
        self.grad_history = torch.empty(call.history.shape, dtype=call.history.dtype, device=call.history.device)
        self.grad_target, self.grad_c = call.empty(call.tasks, D), call.empty(call.tasks, BLOCK_H)
        self.means = call.empty(2 * sum(call.blocks[1:])) if call.statistics else None
        H, at = call.widths[0], call.vectors_at(0) + VECTORS.index("bias") * BLOCK_H
        self.target = call.target if call.target.dtype == torch.float32 else call.target.float()
        self.weight_t = saved.as_strided((H, D), (BLOCK_D, 1))
        self.c = F.linear(self.target, self.weight_t, saved[at : at + H])
        self.grads = _new_gradients(params)
        *of_layers, self.grad_out_weight, self.grad_out_bias = self.grads
        n = len(of_layers) // len(call.hidden)
        self.of_layers = [of_layers[i * n : (i + 1) * n] for i in range(len(call.hidden))]

    def launch(self, grad_out: Tensor, parts: Sequence[str]) -> None:
        call, blocks = self.call, self.call.blocks
        BLOCK_L = 32 if max(blocks) <= (32 if torch.version.hip else 64) else 16
        rows, weight = ((name in parts) for name in ("ROWS", "WEIGHT"))
        own = (
            grad_out, self.c, self.means, self.grad_history if rows else None, self.grad_target if weight else None,
            self.grad_c if rows else None, self.partials,
        )  # fmt: skip
        call.launch(
            din_attention_backward_kernel,
            (self.programs, blocks[0] // 32 if weight else 1),
            self.saved,
            own,
            (call.tasks, *grad_out.stride()),
            (*self.at, BLOCK_L, *(name in parts for name in ("LAST", "WEIGHT2", "FIRST", "ROWS", "WEIGHT"))),
            len(call.hidden),
        )

    def sums(self, i: int) -> None:
        """Gradients of layer i's vectors, but for its bias, and the means that its product's gradient needs."""
        call, hidden, training = self.call, self.call.hidden[i], self.call.statistics
        (norm, dice), last = ((n or (None,) * 5) for n in (hidden.norm, hidden.dice_norm)), i == len(call.hidden) - 1
        _, _, *grads = self.of_layers[i]
        of_norm = [grads.pop(0), grads.pop(0)] if hidden.norm is not None else [None, None]
        grads = [*grads, None, None, None][:3]
        if not (last or training or hidden.alpha is not None):
            return
        norm, of_norm = (norm, of_norm) if training else ((None,) * 5, [None, None])
        launch(
            din_attention_sums_kernel,
            (1,),
            (
                self.partials, self.saved, norm[0], dice[0], *((None, None) if training else dice[2:4]), self.means,
                *of_norm, *grads, *((self.grad_out_weight, self.grad_out_bias) if last else (None, None)),
            ),
            (self.programs, dice[4] or 0.0),
            (
                training, hidden.alpha is not None and hidden.alpha.numel() == 1, call.vectors_at(i),
                2 * sum(call.blocks[1 : i + 1]), self.at.sums2 if i else self.at.sums, self.at.output, self.at.size,
                call.widths[i], call.blocks[i + 1],
            ),
            num_warps=8,
        )  # fmt: skip

    def unfold(self, i: int, grad_wt: Tensor | None) -> None:
        """Gradients of layer i's weight and bias and, in eval, of its normalization."""
        call, hidden, training, at = self.call, self.call.hidden[i], self.call.statistics, self.at
        of_weight, of_bias = self.of_layers[i][:2]
        norm, grads = (None,) * 5, [None, None]
        if hidden.norm is not None and not training:
            norm, grads = hidden.norm, self.of_layers[i][2:4]
        BLOCK_K, BLOCK_H = call.blocks[i : i + 2]
        columns = BLOCK_K if norm[0] is not None else 16
        launch(
            din_attention_unfold_kernel,
            (BLOCK_H // UNITS, BLOCK_K // columns),
            (
                self.partials, grad_wt, self.saved, hidden.weight, hidden.bias, norm[0], *norm[2:4], of_weight, of_bias,
                *grads,
            ),
            (self.programs, norm[4] or 0.0),
            (
                training, call.vectors_at(i), at.weight2 if i else 0,
                at.weight2 + BLOCK_H * BLOCK_K if i else at.bias, at.size, call.widths[i - 1] if i else call.D,
                call.widths[i], BLOCK_K, BLOCK_H, columns, UNITS, 512 // columns,
            ),
            num_warps=4,
        )  # fmt: skip


def din_attention_backward(
    grad_out: Tensor, batch_stats: Tensor, saved: Tensor, history: Tensor, target: Tensor, lengths: Tensor | None,
    mask: Tensor | None, offsets: Tensor | None, params: Sequence[Tensor], running_stats: Sequence[Tensor],
    flags: Flags,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """grad_out [B, D], what the forward returned and its arguments -> gradients of history (contiguous), target and
    params."""
    B, D = target.shape
    if B == 0:
        return torch.zeros_like(history), torch.zeros_like(target), [torch.zeros_like(p) for p in params]
    call = _Call(history, target, lengths, mask, offsets, params, running_stats, flags)
    last = len(call.hidden) - 1
    with torch.cuda.device_of(history):
        backward = _Backward(call, saved, params)
        for parts in _launches(call):
            backward.launch(grad_out, parts)
            if "LAST" in parts:
                backward.sums(last)
            if "FIRST" in parts and last:
                backward.sums(0)
        grad_c = _of_samples(backward.grad_c, B)[:, : call.widths[0]]
        backward.unfold(0, grad_c.t() @ backward.target)
        if last:
            backward.unfold(1, None)
        grad_target = torch.addmm(_of_samples(backward.grad_target, B), grad_c, backward.weight_t)
    if target.dtype != torch.float32:
        grad_target = grad_target.to(target.dtype)
    return backward.grad_history, grad_target, backward.grads
