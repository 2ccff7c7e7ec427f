"""Attention by dot products of a few queries to one history, in Triton: forward and backward.

Queries q_c [D], scaled already, and rows x_l [D] that are keys and values both:

    s_lc = <q_c, x_l>      w_lc = exp(s_lc - m_c) / sum_l exp(s_lc - m_c)      out_c = sum_l w_lc x_l

A row that is not valid scores -1e9: it weighs nothing beside a valid one, and as much as the others where there is
none. Backward, g_c = dL/dout_c:

    ds_lc = w_lc (<g_c, x_l> - <g_c, out_c>), zero where l is not valid
    dx_l  = sum_c w_lc g_c + ds_lc q_c          dq_c = sum_l ds_lc x_l

A program has a sample, a block of its queries and a share of its rows; shares, of few samples with long histories, are
joined in their order. dx is summed by programs of a history's rows over the samples that share it, in their order. Of
a row forward reads D values, backward twice as many, and writes D; 4 D and 16 D flops for each query. Two products and
a softmax by PyTorch's operators read a row twice forward, and pass over rows and their gradients seven times backward;
jagged histories they would first copy, once for each query.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels._triton._products import precision_of, product
from rankkernels._triton._programs import programs_of

PROGRAMS: int | None = None  # other than twice what ``programs_of`` says, for tests
SHARE = 128  # rows of a share at least
BLOCK_H = 16  # queries; 32 spill
HIDDEN, LOWEST = map(tl.constexpr, (-1e9, -3e38))
VARYING = ["B", "L", "splits", "stride_hb", "stride_mb"]  # from batch to batch: compiled once


@triton.jit
def _rows_of(u, split, splits, rows_ptr, L, stride_hb, FORM: tl.constexpr, BLOCK_L: tl.constexpr):
    """A history's first row's place, its valid rows' number, and the first and the end of the share of its rows.
    ``rows_ptr``: lengths, a mask or offsets, as FORM says."""
    start, end = tl.cast(u, tl.int64) * stride_hb, tl.cast(L, tl.int32)
    valid = end
    if FORM == "lengths":
        valid = tl.maximum(tl.minimum(tl.load(rows_ptr + u), L), 0).to(tl.int32)
    if FORM == "offsets":
        start = tl.maximum(tl.load(rows_ptr + u).to(tl.int64), 0)
        end = (tl.minimum(tl.load(rows_ptr + u + 1).to(tl.int64), L) - start).to(tl.int32)
        valid = end
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_L) * BLOCK_L
    return start, valid, split * share, tl.minimum((split + 1) * share, end)


@triton.jit
def _user_of(index_ptr, b, users):
    """The history of sample ``b``, and whether there is one."""
    if index_ptr is None:
        return b, b >= 0
    else:
        u = tl.load(index_ptr + b).to(tl.int64)
        known = (u >= 0) & (u < users)
        return tl.where(known, u, 0), known


@triton.jit
def _share_of_sample(
    index_ptr, rows_ptr, L, users, splits, stride_hb, stride_hl, FORM: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """The program's sample, its share, the history, its first row's place, its valid rows' number, and the first and
    the end of the valid ones of the share, none of a history that is not there."""
    task = tl.program_id(0).to(tl.int64)
    b, split = task // splits, (task % splits).to(tl.int32)
    u, known = _user_of(index_ptr, b, users)
    start, valid, first, end = _rows_of(u, split, splits, rows_ptr, L, stride_hb, FORM, BLOCK_L)
    if FORM == "offsets":
        start *= stride_hl
    return b, split, u, start, valid, first, tl.where(known, tl.minimum(end, valid), 0)


@triton.jit
def _shown(rows_ptr, u, o_l, valid, stride_mb, stride_ml, FORM: tl.constexpr):
    """Which rows of a history there are, and which of them a mask shows."""
    there = o_l < valid
    if FORM == "mask":
        mask = rows_ptr + u * stride_mb + o_l * tl.cast(stride_ml, tl.int64)
        return there, there & (tl.load(mask, mask=there, other=0) != 0)
    else:
        return there, there


@triton.jit
def _tile(ptr, o_r, rows, stride_r, o_d, D, stride_d):
    """Rows o_r below ``rows`` of D columns, zeros beyond."""
    inside = (o_r < rows)[:, None] & (o_d < D)[None, :]
    return tl.load(ptr + o_r[:, None] * stride_r + o_d[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def target_attention_kernel(
    query_ptr, history_ptr, rows_ptr, index_ptr, out_ptr, stats_ptr, B, H, D, L, users, splits,
    stride_qb, stride_qh, stride_qd, stride_hb, stride_hl, stride_hd, stride_mb, stride_ml,
    FORM: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, splits, H, D] and stats [B, splits, H, 2], contiguous, of a share of a sample's rows: peaks and 1 over
    the sums of exponentials or, where shares are yet to be JOINED, the sums, and ``out`` as much."""
    stride_qb, stride_qh = aligned(stride_qb, ALIGN), aligned(stride_qh, ALIGN)
    stride_hb, stride_hl, D = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN), aligned(D, ALIGN)
    b, split, u, start, valid, first, end = _share_of_sample(
        index_ptr, rows_ptr, L, users, splits, stride_hb, stride_hl, FORM, BLOCK_L
    )
    o_h, o_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    b_query = _tile(query_ptr + b * stride_qb, o_h, H, stride_qh, o_d, D, stride_qd)
    peak, total = tl.full([BLOCK_H], LOWEST, tl.float32), tl.zeros([BLOCK_H], tl.float32)
    pooled = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for row in range(first, end, BLOCK_L):
        o_l = row + tl.arange(0, BLOCK_L)
        b_rows = _tile(history_ptr + start, o_l, valid, stride_hl, o_d, D, stride_hd)
        there, shown = _shown(rows_ptr, u, o_l, valid, stride_mb, stride_ml, FORM)
        score = product(b_query, tl.trans(b_rows), tl.zeros([BLOCK_H, BLOCK_L], tl.float32), PRECISION)
        score = tl.where(shown[None, :], score, tl.where(there, HIDDEN, -float("inf"))[None, :])
        highest = tl.maximum(peak, tl.max(score, 1))
        weight, scale = tl.exp(score - highest[:, None]), tl.exp(peak - highest)
        total, peak = total * scale + tl.sum(weight, 1), highest
        pooled = product(weight, b_rows, pooled * scale[:, None], PRECISION)
    if not JOINED:
        total = tl.where(total == 0, 0.0, 1 / total)
        pooled *= total[:, None]
    place = (b * splits + split) * H + o_h
    tl.store(stats_ptr + 2 * place, peak, mask=o_h < H)
    tl.store(stats_ptr + 2 * place + 1, total, mask=o_h < H)
    tl.store(out_ptr + place[:, None] * D + o_d[None, :], pooled, mask=(o_h < H)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def target_attention_join_kernel(
    parts_ptr, part_stats_ptr, out_ptr, stats_ptr, H, D, splits,
    ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, H, D] and stats [B, H, 2] of a sample's shares [B, splits, H, D] and [B, splits, H, 2]; contiguous."""
    D = aligned(D, ALIGN)
    b = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    peak, total = tl.full([BLOCK_H], LOWEST, tl.float32), tl.zeros([BLOCK_H], tl.float32)
    pooled = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for split in range(splits):
        place = (b * splits + split) * H + o_h
        b_peak = tl.load(part_stats_ptr + 2 * place, mask=o_h < H, other=LOWEST)
        highest = tl.maximum(peak, b_peak)
        before, scale = tl.exp(peak - highest), tl.exp(b_peak - highest)
        total = total * before + scale * tl.load(part_stats_ptr + 2 * place + 1, mask=o_h < H, other=0.0)
        b_pooled = _tile(parts_ptr + (b * splits + split) * H * D, o_h, H, D, o_d, D, 1)
        pooled, peak = pooled * before[:, None] + scale[:, None] * b_pooled, highest
    total = tl.where(total == 0, 0.0, 1 / total)
    place = b * H + o_h
    tl.store(stats_ptr + 2 * place, peak, mask=o_h < H)
    tl.store(stats_ptr + 2 * place + 1, total, mask=o_h < H)
    inside = (o_h < H)[:, None] & (o_d < D)[None, :]
    tl.store(out_ptr + place[:, None] * D + o_d[None, :], pooled * total[:, None], mask=inside)


@triton.jit
def _of_queries(b, o_h, o_d, grad_out_ptr, stats_ptr, query_ptr, H, D, stride_gb, stride_gh, stride_gd, stride_qb,
                stride_qh, stride_qd):  # fmt: skip
    """A sample's queries, their gradients g, peaks and 1 over the sums of exponentials; zeros beyond H."""
    b_query = _tile(query_ptr + b * stride_qb, o_h, H, stride_qh, o_d, D, stride_qd)
    b_grad = _tile(grad_out_ptr + b * stride_gb, o_h, H, stride_gh, o_d, D, stride_gd)
    place = 2 * (b * H + o_h)
    peak = tl.load(stats_ptr + place, mask=o_h < H, other=0.0)
    return b_query, b_grad, peak, tl.load(stats_ptr + place + 1, mask=o_h < H, other=0.0)


@triton.jit
def _weights_of(b_rows, there, shown, b_query, b_grad, along, peak, inverse, PRECISION: tl.constexpr):
    """A block's weights and the gradients of its scores [BLOCK_L, BLOCK_H]."""
    zeros = tl.zeros([b_rows.shape[0], b_query.shape[0]], tl.float32)
    score = product(b_rows, tl.trans(b_query), zeros, PRECISION)
    score = tl.where(shown[:, None], score, tl.where(there, HIDDEN, -float("inf"))[:, None])
    weight = tl.exp(score - peak[None, :]) * inverse[None, :]
    grad = product(b_rows, tl.trans(b_grad), zeros, PRECISION)
    return weight, tl.where(shown[:, None], weight * (grad - along[None, :]), 0.0)


@triton.jit(do_not_specialize=VARYING)
def target_attention_queries_kernel(
    grad_out_ptr, stats_ptr, query_ptr, history_ptr, rows_ptr, along_ptr, out_ptr, index_ptr, grad_query_ptr,
    B, H, D, L, users, splits, stride_gb, stride_gh, stride_gd, stride_qb, stride_qh, stride_qd,
    stride_hb, stride_hl, stride_hd, stride_mb, stride_ml,
    FORM: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries' gradients [splits, B, H, D], contiguous, by a share of a sample's rows, and <g, out> [B, H]."""
    stride_gb, stride_gh = aligned(stride_gb, ALIGN), aligned(stride_gh, ALIGN)
    stride_qb, stride_qh = aligned(stride_qb, ALIGN), aligned(stride_qh, ALIGN)
    stride_hb, stride_hl, D = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN), aligned(D, ALIGN)
    b, split, u, start, valid, first, end = _share_of_sample(
        index_ptr, rows_ptr, L, users, splits, stride_hb, stride_hl, FORM, BLOCK_L
    )
    o_h, o_d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    b_query, b_grad, peak, inverse = _of_queries(
        b, o_h, o_d, grad_out_ptr, stats_ptr, query_ptr, H, D, stride_gb, stride_gh, stride_gd, stride_qb, stride_qh,
        stride_qd,
    )  # fmt: skip
    along = tl.sum(b_grad.to(tl.float32) * _tile(out_ptr + b * H * D, o_h, H, D, o_d, D, 1).to(tl.float32), 1)
    if split == 0:
        tl.store(along_ptr + b * H + o_h, along, mask=o_h < H)
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for row in range(first, end, BLOCK_L):
        o_l = row + tl.arange(0, BLOCK_L)
        b_rows = _tile(history_ptr + start, o_l, valid, stride_hl, o_d, D, stride_hd)
        there, shown = _shown(rows_ptr, u, o_l, valid, stride_mb, stride_ml, FORM)
        _, grad_score = _weights_of(b_rows, there, shown, b_query, b_grad, along, peak, inverse, PRECISION)
        total = product(tl.trans(grad_score), b_rows, total, PRECISION)
    inside = (o_h < H)[:, None] & (o_d < D)[None, :]
    place = (split * tl.cast(B, tl.int64) + b) * H + o_h
    tl.store(grad_query_ptr + place[:, None] * D + o_d[None, :], total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def target_attention_rows_kernel(
    grad_out_ptr, stats_ptr, query_ptr, history_ptr, rows_ptr, along_ptr, order_ptr, samples_ptr, grad_history_ptr,
    B, H, D, L, splits, stride_gb, stride_gh, stride_gd, stride_qb, stride_qh, stride_qd,
    stride_hb, stride_hl, stride_hd, stride_mb, stride_ml,
    FORM: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a share of a history's rows, contiguous. History u is that of the samples ``order`` from
    ``samples[u]`` to ``samples[u + 1]``, without an order that of sample u."""
    stride_gb, stride_gh = aligned(stride_gb, ALIGN), aligned(stride_gh, ALIGN)
    stride_qb, stride_qh = aligned(stride_qb, ALIGN), aligned(stride_qh, ALIGN)
    stride_hb, stride_hl, D = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN), aligned(D, ALIGN)
    task = tl.program_id(0).to(tl.int64)
    u, split = task // splits, (task % splits).to(tl.int32)
    start, valid, first, end = _rows_of(u, split, splits, rows_ptr, L, stride_hb, FORM, BLOCK_L)
    grad_start = u * L * D
    if FORM == "offsets":
        start, grad_start = start * stride_hl, start * D
    o_d = tl.arange(0, BLOCK_D)
    begin, past = u, u + 1
    if order_ptr is not None:
        begin, past = tl.load(samples_ptr + u), tl.load(samples_ptr + u + 1)
    for row in range(first, end, BLOCK_L):
        o_l = row + tl.arange(0, BLOCK_L)
        b_rows = _tile(history_ptr + start, o_l, valid, stride_hl, o_d, D, stride_hd)
        there, shown = _shown(rows_ptr, u, o_l, valid, stride_mb, stride_ml, FORM)
        total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for i in range(begin, tl.where(row < valid, past, begin)):
            b = tl.cast(i, tl.int64)
            if order_ptr is not None:
                b = tl.load(order_ptr + i)
            for h in range(0, H, BLOCK_H):
                o_h = h + tl.arange(0, BLOCK_H)
                b_query, b_grad, peak, inverse = _of_queries(
                    b, o_h, o_d, grad_out_ptr, stats_ptr, query_ptr, H, D, stride_gb, stride_gh, stride_gd, stride_qb,
                    stride_qh, stride_qd,
                )  # fmt: skip
                along = tl.load(along_ptr + b * H + o_h, mask=o_h < H, other=0.0)
                weight, grad_score = _weights_of(b_rows, there, shown, b_query, b_grad, along, peak, inverse, PRECISION)
                total = product(weight, b_grad, total, PRECISION)
                total = product(grad_score, b_query, total, PRECISION)
        inside = (o_l < end)[:, None] & (o_d < D)[None, :]
        tl.store(grad_history_ptr + grad_start + o_l[:, None] * D + o_d[None, :], total, mask=inside)


class _Call:
    """What the launches of one call have in common."""

    def __init__(self, query: Tensor, history: Tensor, lengths, mask, offsets, index, *others: Tensor):
        self.query, self.history, self.mask = query, history, mask
        (_, H, D), rows = query.shape, history.shape[:-1].numel()
        given = {"lengths": lengths, "mask": mask, "offsets": offsets}
        self.form = next((form for form, t in given.items() if t is not None), "all")
        self.rows = given.get(self.form)
        if self.form in ("lengths", "offsets"):
            self.rows = self.rows.contiguous()
        self.index = None if index is None else index.contiguous()
        self.users = history.size(0) if offsets is None else offsets.size(0) - 1
        self.BLOCK_D = max(16, triton.next_power_of_2(D))
        self.head_blocks = triton.cdiv(H, BLOCK_H)
        self.L = history.size(-2)
        self.average = rows // max(self.users, 1)
        self.constants = {
            "FORM": self.form, "PRECISION": precision_of(query.dtype),
            "ALIGN": math.gcd(*map(alignment, (query, history, *others))), "BLOCK_H": BLOCK_H,
            "BLOCK_L": {64: 32, 128: 16}.get(self.BLOCK_D, 64), "BLOCK_D": self.BLOCK_D, "num_stages": 1,
        }  # fmt: skip
        self.constants |= self.registers(8 if self.BLOCK_D == 128 else 4)

    @staticmethod
    def registers(warps: int) -> dict[str, int]:
        """NVIDIA's compiler spills at few registers unless told how many there are, AMD's with more warps."""
        return {"num_warps": 4} if torch.version.hip else {"num_warps": warps, "maxnreg": 255}

    def splits(self, tasks: int) -> int:
        """Shares of a history, where so many tasks are fewer than the programs that fill the GPU."""
        programs = PROGRAMS or 2 * programs_of(self.query)
        return max(1, min(programs // max(tasks, 1), self.average // SHARE))

    @property
    def strides(self) -> tuple[int, ...]:
        of_history = self.history.stride() if self.history.dim() == 3 else (0, *self.history.stride())
        return *self.query.stride(), *of_history, *(self.mask.stride() if self.mask is not None else (0, 0))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)


def target_attention(query, history, lengths, mask, offsets, history_index) -> tuple[Tensor, Tensor]:
    """Arguments as the op's, any strides; D is 128 at most -> out [B, H, D], and each query's peak and 1 over its sum
    of exponentials [B, H, 2]."""
    call = _Call(query, history, lengths, mask, offsets, history_index)
    B, H, D = query.shape
    out, stats = call.empty(B, H, D, dtype=query.dtype), call.empty(B, H, 2)
    if query.numel() == 0 or history.numel() == 0:
        return out.zero_(), stats.zero_()
    splits = call.splits(B * call.head_blocks)
    parts, part_stats = (out, stats) if splits == 1 else (call.empty(B, splits, H, D), call.empty(B, splits, H, 2))
    with torch.cuda.device_of(query):
        target_attention_kernel[B * splits, call.head_blocks](
            query, history, call.rows, call.index, parts, part_stats, B, H, D, call.L, call.users, splits,
            *call.strides, JOINED=splits > 1, **call.constants,
        )  # fmt: skip
        if splits > 1:
            target_attention_join_kernel[B, call.head_blocks](
                parts, part_stats, out, stats, H, D, splits, ALIGN=alignment(parts), BLOCK_H=BLOCK_H,
                BLOCK_D=call.BLOCK_D, **call.registers(4),
            )  # fmt: skip
    return out, stats


def target_attention_backward(
    grad_out, out, stats, query, history, lengths, mask, offsets, history_index
) -> tuple[Tensor, Tensor]:
    """grad_out and out [B, H, D], stats [B, H, 2] and the op's arguments -> the gradients of query and history."""
    out, stats = out.contiguous(), stats.contiguous()
    call = _Call(query, history, lengths, mask, offsets, history_index, grad_out)
    B, H, D = query.shape
    grad_history = call.empty(*history.shape, dtype=history.dtype)
    if query.numel() == 0 or history.numel() == 0:
        return call.empty(B, H, D, dtype=query.dtype).zero_(), grad_history.zero_()
    order = samples = None
    if call.index is not None:
        sorted_index, order = call.index.sort(stable=True)
        samples = torch.searchsorted(sorted_index, torch.arange(call.users + 1, device=query.device).to(sorted_index))
    splits = call.splits(B * call.head_blocks)
    grads = call.empty(splits, B, H, D, dtype=query.dtype if splits == 1 else torch.float32)
    inputs = grad_out, stats, query, history, call.rows, call.empty(B, H)
    strides = *grad_out.stride(), *call.strides
    with torch.cuda.device_of(query):
        target_attention_queries_kernel[B * splits, call.head_blocks](
            *inputs, out, call.index, grads, B, H, D, call.L, call.users, splits, *strides, **call.constants
        )
        splits = call.splits(call.users)
        target_attention_rows_kernel[(call.users * splits,)](
            *inputs, order, samples, grad_history, B, H, D, call.L, splits, *strides, **call.constants
        )
    return grads[0] if len(grads) == 1 else grads.sum(0).to(query.dtype), grad_history
