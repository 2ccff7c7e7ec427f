"""GRU with an attention that scales its update gate, in Triton: forward and backward.

Of a sample, positions l = 0 .. length - 1, h_{-1} = 0, with h = h_{l-1} and x = x_l:

    u = sigmoid(W_u x + U_u h + b_u)    c = U_n h + b_c    g = W_n x + b_n
    r = sigmoid(W_r x + U_r h + b_r)    n = tanh(g + r c)
    h_l = h + a_l u (n - h);            beyond the length the results are zeros

Backward, e = dL/dh_l from above and from l + 1:

    da = <e, u (n - h)>                 p = a u e (1 - n^2)
    du = a e (n - h) u (1 - u)          dr = p c r (1 - r)          dc = p r          dg = p
    dh = e (1 - a u) + U_u^T du + U_r^T dr + U_n^T dc       dx = W_u^T du + W_r^T dr + W_n^T dg
    dU += [du, dr, dc] h^T              dW += [du, dr, dg] x^T      db += [du, dr, dc, dg]

A program takes BLOCK_B samples through all positions, their states in registers: one launch, where the reference has
twelve a position. What is of all positions at once is a library's: W x before, in the backward U h, too, because
``out`` keeps h, and dx, dU, dW and db behind it. Arrays of [B, L, D] moved: 8 forward, 35 backward, of the reference's
40 and 80. Bound by the latency of a position, three products of BLOCK_B rows and the gates' exponentials.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._products import precision_of, product

BLOCK_B = 16  # samples: as few as a tensor core takes


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _lengths(lengths_ptr, o_b, B, L):
    """Each sample's, and the largest."""
    if lengths_ptr is None:
        length = tl.where(o_b < B, L, 0)
    else:
        length = tl.minimum(tl.load(lengths_ptr + o_b, mask=o_b < B, other=0), L).to(tl.int32)
    return length, tl.maximum(tl.max(length, 0), 0)


@triton.jit
def _attention(attention_ptr, place, there):
    """[BLOCK_B, 1], ones without any."""
    if attention_ptr is None:
        return tl.full(there.shape, 1.0, tl.float32)
    else:
        return tl.load(attention_ptr + place, mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B", "L"])
def augru_kernel(
    gates_ptr, weight_ptr, bias_ptr, attention_ptr, lengths_ptr, out_ptr, B, L, D,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, L, D] of BLOCK_B samples; ``gates`` [B, L, 3 D] are W x and ``weight`` U^T [D, 3 D], all contiguous."""
    o_b, o_d = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)[None, :]
    length, steps = _lengths(lengths_ptr, o_b, B, L)
    columns, rows = o_d < D, o_b[:, None] * L
    o_k = tl.arange(0, BLOCK_D)[:, None]
    weight_tile, inside = weight_ptr + o_k * (3 * D) + o_d, (o_k < D) & columns
    weight_u = tl.load(weight_tile, mask=inside, other=0.0)
    weight_r = tl.load(weight_tile + D, mask=inside, other=0.0)
    weight_n = tl.load(weight_tile + 2 * D, mask=inside, other=0.0)
    b_u = tl.load(bias_ptr + o_d, mask=columns, other=0.0)
    b_r = tl.load(bias_ptr + D + o_d, mask=columns, other=0.0)
    b_c = tl.load(bias_ptr + 2 * D + o_d, mask=columns, other=0.0)
    b_n = tl.load(bias_ptr + 3 * D + o_d, mask=columns, other=0.0)
    zeros = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    h = zeros
    for step in range(steps):
        there = (step < length)[:, None]
        tile, shown = gates_ptr + (rows + step) * (3 * D) + o_d, there & columns
        u = tl.load(tile, mask=shown, other=0.0) + b_u
        r = tl.load(tile + D, mask=shown, other=0.0) + b_r
        g = tl.load(tile + 2 * D, mask=shown, other=0.0) + b_n
        u, r = product(h, weight_u, u, PRECISION), product(h, weight_r, r, PRECISION)
        n = _tanh(g + tl.sigmoid(r) * (product(h, weight_n, zeros, PRECISION) + b_c))
        h += _attention(attention_ptr, rows + step, there) * tl.sigmoid(u) * (n - h)
        stored = (o_b < B)[:, None] & columns
        tl.store(out_ptr + (rows + step) * D + o_d, tl.where(there, h, 0.0), mask=stored)
    for step in range(steps, L):
        tl.store(out_ptr + (rows + step) * D + o_d, zeros, mask=(o_b < B)[:, None] & columns)


@triton.jit(do_not_specialize=["B", "L"])
def augru_backward_kernel(
    grad_out_ptr, before_ptr, gates_ptr, states_ptr, weight_ptr, bias_ptr, attention_ptr, lengths_ptr, grads_ptr,
    grad_attention_ptr, B, L, D, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients [B, L, 4 D] of [u, r, c, g] before the activations, and the attention's [B, L], of BLOCK_B samples.
    ``before`` [B, L, D] is h, ``gates`` and ``states`` [B, L, 3 D] are W x and U h, ``weight`` U [3 D, D]."""
    o_b, o_d = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)[None, :]
    length, steps = _lengths(lengths_ptr, o_b, B, L)
    columns, rows, valid = o_d < D, o_b[:, None] * L, (o_b < B)[:, None]
    o_k = tl.arange(0, BLOCK_D)[:, None]
    weight_tile, inside = weight_ptr + o_k * D + o_d, (o_k < D) & columns
    weight_u = tl.load(weight_tile, mask=inside, other=0.0)
    weight_r = tl.load(weight_tile + D * D, mask=inside, other=0.0)
    weight_n = tl.load(weight_tile + 2 * D * D, mask=inside, other=0.0)
    b_u = tl.load(bias_ptr + o_d, mask=columns, other=0.0)
    b_r = tl.load(bias_ptr + D + o_d, mask=columns, other=0.0)
    b_c = tl.load(bias_ptr + 2 * D + o_d, mask=columns, other=0.0)
    b_n = tl.load(bias_ptr + 3 * D + o_d, mask=columns, other=0.0)
    zeros = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for step in range(steps, L):
        tile = grads_ptr + (rows + step) * (4 * D) + o_d
        for gate in tl.static_range(4):
            tl.store(tile + gate * D, zeros, mask=valid & columns)
        if grad_attention_ptr is not None:
            tl.store(grad_attention_ptr + rows + step, tl.zeros([BLOCK_B, 1], tl.float32), mask=valid)
    e = zeros
    for i in range(steps):
        step = steps - 1 - i
        there = (step < length)[:, None]
        tile, shown = (rows + step) * (3 * D) + o_d, there & columns
        e += tl.load(grad_out_ptr + (rows + step) * D + o_d, mask=shown, other=0.0).to(tl.float32)
        h = tl.load(before_ptr + (rows + step) * D + o_d, mask=shown, other=0.0).to(tl.float32)
        u = b_u + tl.load(gates_ptr + tile, mask=shown, other=0.0) + tl.load(states_ptr + tile, mask=shown, other=0.0)
        tile += D
        r = b_r + tl.load(gates_ptr + tile, mask=shown, other=0.0) + tl.load(states_ptr + tile, mask=shown, other=0.0)
        tile += D
        c = b_c + tl.load(states_ptr + tile, mask=shown, other=0.0)
        u, r = tl.sigmoid(u), tl.sigmoid(r)
        n = _tanh(b_n + tl.load(gates_ptr + tile, mask=shown, other=0.0) + r * c)
        a = _attention(attention_ptr, rows + step, there)
        moved = u * (n - h)
        if grad_attention_ptr is not None:
            grad_a = tl.sum(tl.where(shown, e * moved, 0.0), 1, keep_dims=True)
            tl.store(grad_attention_ptr + rows + step, grad_a, mask=valid)
        p = tl.where(shown, a * u * e * (1 - n * n), 0.0)
        grad_u = tl.where(shown, a * e * moved * (1 - u), 0.0)
        grad_r, grad_c = p * c * r * (1 - r), p * r
        tile = grads_ptr + (rows + step) * (4 * D) + o_d
        tl.store(tile, grad_u, mask=valid & columns)
        tl.store(tile + D, grad_r, mask=valid & columns)
        tl.store(tile + 2 * D, grad_c, mask=valid & columns)
        tl.store(tile + 3 * D, p, mask=valid & columns)
        e = tl.where(shown, e * (1 - a * u), 0.0)
        e = product(grad_u, weight_u, e, PRECISION)
        e = product(grad_r, weight_r, e, PRECISION)
        e = product(grad_c, weight_n, e, PRECISION)


def _options(D: int) -> dict:
    """The products have float32's precision for 16-bit inputs, too: a position waits for the one before it, not for
    tensor cores."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    options = {"PRECISION": precision_of(torch.float32), "BLOCK_B": BLOCK_B, "BLOCK_D": BLOCK_D}
    if torch.version.hip:
        return options | {"num_warps": min(BLOCK_D // 16, 4)}
    if BLOCK_D == 64:  # prefetched gates would take all of the shared memory
        return options | {"num_warps": 8, "num_stages": 1}
    return options | {"num_warps": BLOCK_D // 16, "maxnreg": 255}  # it spills at 128 unless told how many there are


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def augru(x, input_weight, weight, bias, attention, lengths) -> Tensor:
    """Arguments as the op's, any strides; D is 64 at most -> out [B, L, D]."""
    (B, L, _), D = x.shape, weight.size(1)
    out = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    gates, of_state = F.linear(x.float(), input_weight.float()), weight.t().float().contiguous()
    attention, lengths = _contiguous(attention, lengths)
    with torch.cuda.device_of(x):
        augru_kernel[(triton.cdiv(B, BLOCK_B),)](
            gates, of_state, bias.float().contiguous(), attention, lengths, out, B, L, D, **_options(D)
        )
    return out


def augru_backward(grad_out, out, x, input_weight, weight, bias, attention, lengths) -> tuple[Tensor, ...]:
    """grad_out and out [B, L, D] and the op's arguments -> the gradients of x, input_weight, weight, bias and
    attention, [0, L] without one."""
    (B, L, _), D = x.shape, weight.size(1)
    grads = torch.empty((B, L, 4 * D), dtype=torch.float32, device=x.device)
    grad_attention = torch.empty((0 if attention is None else B, L), dtype=torch.float32, device=x.device)
    before = F.pad(out.float()[:, :-1], (0, 0, 1, 0)) if L else out.float()
    wide_x, of_input, of_state = x.float(), input_weight.float(), weight.float().contiguous()
    if out.numel():
        gates, states = F.linear(wide_x, of_input), F.linear(before, of_state)
        attention = None if attention is None else attention.float()
        grad_out, attention, lengths = _contiguous(grad_out.float(), attention, lengths)
        with torch.cuda.device_of(x):
            augru_backward_kernel[(triton.cdiv(B, BLOCK_B),)](
                grad_out, before, gates, states, of_state, bias.float().contiguous(), attention, lengths, grads,
                None if attention is None else grad_attention, B, L, D, **_options(D),
            )  # fmt: skip
    else:
        grad_attention.zero_()
    flat = grads.flatten(0, 1)
    of_inputs = torch.cat([flat[:, : 2 * D], flat[:, 3 * D :]], 1)
    grad_x = (of_inputs @ of_input).view(x.shape)
    of_weights = of_inputs.t() @ wide_x.flatten(0, 1), flat[:, : 3 * D].t() @ before.flatten(0, 1)
    results = grad_x, *of_weights, flat.sum(0).view(4, D), grad_attention
    return tuple(t.to(x.dtype) for t in results)
