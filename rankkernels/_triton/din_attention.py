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

Launches: forward 1, in training one more a layer; backward as ``_launches`` says, 1 to 5. One layer in eval has 5 of
PyTorch's before the forward and 17 around the backward, of the weights' size and c's. Beside its inputs the backward
keeps the scores and, with a softmax, out in float32 and its peak and total. The forward computes c itself; the
backward's products without rows of history (c, d(Wt + Wd), (Wt + Wd)^T dc) are left to the library. Lengths cost whole
blocks of BLOCK_L rows, and so does a mask, up to its last valid row. A batch of few samples is split over their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rankkernels._triton._alignment import alignment
from rankkernels._triton._programs import programs_of
from rankkernels._triton.din_attention_backward import din_attention_backward_kernel
from rankkernels._triton.din_attention_blocks import VECTORS
from rankkernels._triton.din_attention_forward import din_attention_kernel, din_attention_statistics_kernel
from rankkernels._triton.din_attention_layers import Layer, folded, means, normalized, plain, unfolded
from rankkernels.ops.attention_params import Flags, has_gpu_kernel, hidden_widths, norms_per_layer, unflatten
from rankkernels.reference import Hidden

PROGRAMS: int | None = None  # other than ``programs_of`` says, for tests
MAX_WIDTH = 128  # of history rows and of hidden layers


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


def _block(width: int) -> int:
    """The power of two, 32 at least, that holds ``width``."""
    return max(32, triton.next_power_of_2(width))


def _precision(dtype: torch.dtype) -> str:
    """Of products: ``product`` in din_attention_blocks.py."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _padded(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    padding = (0, _block(columns) - columns, 0, _block(rows) - rows)
    return (torch.nn.functional.pad(weight, padding) if any(padding) else weight).contiguous()


def _vectors(layer: Layer) -> Tensor:
    """The vectors of a layer as the kernels take them; what the layer has not, no kernel reads."""
    vectors = {"bias": layer.bias, **layer.vectors}
    rows, H = torch.stack([vectors.get(name, layer.bias) for name in VECTORS]), layer.bias.numel()
    return torch.nn.functional.pad(rows, (0, _block(H) - H))


class _Rows(NamedTuple):
    """History, target and which rows are valid, and what both are to the kernels."""

    history: Tensor
    target: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    offsets: Tensor | None

    @property
    def total(self) -> int:
        return self.history.shape[:-1].numel()

    @property
    def programs(self) -> int:
        """That a launch should have, and at most those that leave partial sums."""
        return PROGRAMS or programs_of(self.history)

    @property
    def splits(self) -> int:
        """Tasks a sample, so that few samples make as many programs, each with 64 rows and more."""
        B = self.target.size(0)
        return max(1, min(self.programs // B, self.total // B // 64))

    def valid(self) -> Tensor | int:
        """The number of valid rows."""
        if self.mask is not None:
            return self.mask.sum()
        return self.total if self.lengths is None else self.lengths.clamp(0, self.history.size(1)).sum()

    def arguments(self) -> dict:
        history, target, lengths, mask, offsets = self
        if offsets is not None:
            form, rows, (stride_hb, stride_hl, stride_hd) = "offsets", offsets.contiguous(), (0, *history.stride())
        else:
            form = "all" if lengths is None and mask is None else "lengths" if mask is None else "mask"
            stride_hb, stride_hl, stride_hd = history.stride()
            rows = None if lengths is None else lengths.contiguous()
        stride_mb, stride_ml = (0, 0) if mask is None else mask.stride()
        D = target.size(1)
        return dict(
            history_ptr=history, target_ptr=target, rows_ptr=rows, mask_ptr=mask, splits=self.splits,
            L=history.size(-2), stride_hb=stride_hb, stride_hl=stride_hl, stride_hd=stride_hd,
            stride_tb=target.stride(0), stride_td=target.stride(1), stride_mb=stride_mb, stride_ml=stride_ml, D=D,
            FORM=form, ALIGN=alignment(history), BLOCK_D=_block(D), BLOCK_K=32, parts_d=triton.cdiv(D, 32),
            num_stages=1, **({"num_warps": 4} if torch.version.hip else {"num_warps": 8, "maxnreg": 255}),
        )  # fmt: skip  # 256 threads, of 32 or 64 a warp


class _Network(NamedTuple):
    """The attention MLP, its layers as far as they are known."""

    hidden: Sequence[Hidden]
    out_weight: Tensor
    out_bias: Tensor
    flags: Flags

    def arguments(self, rows: _Rows, layers: Sequence[Layer]) -> dict:
        """What the kernels take of ``layers``, the first ones."""
        first, D, flags, p = layers[0], rows.target.size(1), self.flags, self.flags.dropout
        H = first.weight.size(0)
        BLOCK_H, BLOCK_D = _block(H), _block(D)
        padding = (0, BLOCK_D - D, 0, BLOCK_H - H)
        weight = torch.nn.functional.pad(first.weight.view(H, 4, D).transpose(0, 1), padding).contiguous()
        if len(layers) == len(self.hidden):
            layers[-1].vectors["out_weight"] = self.out_weight[0].float()
        arguments = rows.arguments() | dict(
            PRECISION=_precision(rows.history.dtype),
            wt_ptr=weight[0] + weight[2], wm_ptr=weight[1] - weight[2], wp_ptr=weight[3], vectors_ptr=_vectors(first),
            weight2_ptr=None, vectors2_ptr=None, dice_eps=flags.dice_eps, seed_ptr=flags.seed, DROPOUT=p > 0,
            threshold=round(p * 2**24), kept_scale=1 / (1 - p) if p < 1 else 0.0,
            H=H, H2=0, BLOCK_H=BLOCK_H, BLOCK_H2=32, parts_h=triton.cdiv(H, 32), parts_h2=0,
            ACTIVATION=self.hidden[0].activation, TRAINING=first.r is not None,
        )  # fmt: skip
        if len(layers) > 1:
            H2 = layers[1].bias.numel()
            arguments |= dict(
                weight2_ptr=_padded(layers[1].weight), vectors2_ptr=_vectors(layers[1]), H2=H2,
                BLOCK_H2=_block(H2), parts_h2=triton.cdiv(H2, 32),
            )  # fmt: skip
        return arguments


def _network(params: Sequence[Tensor], running_stats: Sequence[Tensor], flags: Flags) -> _Network:
    layers = unflatten(params, running_stats, flags.name, flags.batch_norm, flags.norm_eps, flags.dice_eps)
    return _Network(*layers, flags)


def _tasks(rows: _Rows) -> tuple[int, int]:
    tasks = rows.target.size(0) * rows.splits
    return tasks, min(tasks, rows.programs)


def _statistics(rows: _Rows, network: _Network) -> Tensor:
    """Mean and unbiased variance of each normalization over the batch, as the op returns them."""
    layers, batch_stats, n = [], [], rows.valid()
    for hidden in network.hidden:
        arguments = network.arguments(rows, [*layers, plain(hidden)])
        LAST = arguments["BLOCK_H2"] if arguments["H2"] else arguments["BLOCK_H"]
        tasks, programs = _tasks(rows)
        partials = rows.history.new_empty((programs, 2 * LAST + 1), dtype=torch.float32)
        din_attention_statistics_kernel[(programs,)](partials_ptr=partials, tasks=tasks, BLOCK_L=32, **arguments)
        means, squares, counts = partials.split([LAST, LAST, 1], 1)
        H, total = hidden.bias.numel(), counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / total
        var = ((squares + counts * (means - mean) ** 2).sum(0) / total)[:H]
        mean, unbiased = mean[:H], n / (n - 1) if isinstance(n, int) else n / (n - 1).clamp(min=1)
        layers.append(normalized(hidden, mean, var))
        batch_stats += [mean, var * unbiased]
        if hidden.norm is not None and hidden.dice_norm is not None:
            y_var = (hidden.norm.weight * layers[-1].r) ** 2 * var
            batch_stats += [hidden.norm.bias.float(), y_var * unbiased]
    return torch.cat(batch_stats)


def _layers(network: _Network, batch_stats: Tensor, n: Tensor | int) -> list[Layer]:
    """The layers with their normalizations folded: those of the batch, if there are any."""
    if batch_stats.numel() == 0:
        return [folded(hidden) for hidden in network.hidden]
    layers, biased = [], (n - 1) / n if isinstance(n, int) else (n - 1) / n.clamp(min=1)
    for hidden in network.hidden:
        H = hidden.bias.numel()
        mean, var, batch_stats = batch_stats[:H], batch_stats[H : 2 * H], batch_stats[2 * H :]
        layers.append(normalized(hidden, mean, var * biased))
        if hidden.norm is not None and hidden.dice_norm is not None:
            batch_stats = batch_stats[2 * H :]
    return layers


def _saved(saved: Tensor, rows: _Rows, use_softmax: bool) -> dict:
    """The scores; with a softmax also out [B, D], its peak and its total [B], in float32."""
    total, (B, D) = rows.total, rows.target.shape
    if not use_softmax:
        return dict(score_ptr=saved, sum_ptr=None, peak_ptr=None, total_ptr=None)
    out, peak, total, score = saved.split([B * D, B, B, total])
    return dict(score_ptr=score, sum_ptr=out.view(B, D), peak_ptr=peak, total_ptr=total)


def din_attention(
    history: Tensor, target: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None,
    params: Sequence[Tensor], running_stats: Sequence[Tensor], flags: Flags,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments as the op's, those that ``supports`` allows -> out [B, D], batch_stats and what the backward needs."""
    (B, D), rows = target.shape, _Rows(history, target, lengths, mask, offsets)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=history.device)
    out = torch.empty((B, D), dtype=history.dtype, device=history.device)
    size = rows.total + (B * (D + 2) if flags.use_softmax else 0)
    saved = empty(size)
    statistics = flags.training and norms_per_layer(flags.name, flags.batch_norm)
    if statistics and rows.total < 2:
        raise ValueError(
            f"din_attention: training needs more than one valid row to take statistics of, got {rows.total}"
        )
    if B == 0:
        return out, empty(0), saved
    network = _network(params, running_stats, flags)
    with torch.cuda.device_of(history):
        batch_stats = _statistics(rows, network) if statistics else empty(0)
        arguments = network.arguments(rows, _layers(network, batch_stats, rows.valid() if statistics else 0))
        (tasks, _), split, kept = _tasks(rows), rows.splits > 1, _saved(saved, rows, flags.use_softmax)
        if split:
            sums, peak, total = empty(tasks, D), empty(tasks), empty(tasks)
            kept |= dict(sum_ptr=sums, peak_ptr=peak, total_ptr=total)
        din_attention_kernel[(tasks,)](
            out_bias_ptr=network.out_bias,
            out_ptr=out,
            SOFTMAX=flags.use_softmax,
            SPLIT=split,
            BLOCK_L=32,
            **kept,
            **arguments,
        )
        if split:
            sums = sums.view(B, -1, D)
            if flags.use_softmax:
                peak, total = peak.view(B, -1), total.view(B, -1)
                top = peak.amax(1)
                share = torch.exp(peak - top.clamp(min=torch.finfo(torch.float32).min)[:, None])
                kept = _saved(saved, rows, flags.use_softmax)
                kept["peak_ptr"].copy_(top)
                total = kept["total_ptr"].copy_((total * share).sum(1))
                sums = sums * (share / total.where(total > 0, 1)[:, None])[..., None]
                torch.sum(sums, 1, out=kept["sum_ptr"])
                out.copy_(kept["sum_ptr"])
            else:
                out.copy_(sums.sum(1))
    return out, batch_stats, saved


def _of_samples(x: Tensor, B: int) -> Tensor:
    """Sums over each sample's tasks."""
    return x if x.size(0) == B else x.view(B, -1, x.size(1)).sum(1)


def _launches(arguments: dict) -> list[list[str]]:
    """What each launch of the backward is for, as much as there are registers for. In training, sums come before what
    needs their means."""
    BLOCK_D, BLOCK_H, BLOCK_H2 = (arguments[k] for k in ("BLOCK_D", "BLOCK_H", "BLOCK_H2"))
    two, training = arguments["H2"] > 0, arguments["TRAINING"]
    rows = [["ROWS", "WEIGHT"]] if BLOCK_D == 32 and BLOCK_H <= 64 else [["ROWS"], ["WEIGHT"]]
    if training and two:
        sums = [["WEIGHT2", "FIRST"]] if BLOCK_H * BLOCK_H2 <= 64 * 128 else [["FIRST"], ["WEIGHT2"]]
        return [["LAST"], *sums, *rows]
    if training:
        return [["LAST", "FIRST"], *rows]
    rows[0] = ["FIRST", *rows[0]]
    return [["LAST", "WEIGHT2"], *rows] if two else [["LAST", *rows[0]], *rows[1:]]


def _launch(rows: _Rows, arguments: dict, parts: Sequence[str]) -> dict[str, Tensor]:
    """Gradients, summed over programs."""
    history, (B, D), (tasks, programs) = rows.history, rows.target.shape, _tasks(rows)
    BLOCK_D, BLOCK_H, BLOCK_H2 = (arguments[k] for k in ("BLOCK_D", "BLOCK_H", "BLOCK_H2"))
    H, H2, LAST = arguments["H"], arguments["H2"], BLOCK_H2 if arguments["H2"] else BLOCK_H
    empty = functools.partial(torch.empty, dtype=torch.float32, device=history.device)
    shapes = {
        "grad_output": (LAST + 1,) * ("LAST" in parts),
        "sums0": (5, BLOCK_H) * ("FIRST" in parts),
        "sums1": (5, BLOCK_H2) * ("LAST" in parts and H2 > 0),
        "grad_weight": (2, BLOCK_D, BLOCK_H) * ("WEIGHT" in parts),
        "grad_weight2": (BLOCK_H2 * (BLOCK_H + 1),) * ("WEIGHT2" in parts),
    }
    partials = {name: empty(programs, *shape) if shape else None for name, shape in shapes.items()}
    grad_history = torch.empty(history.shape, dtype=history.dtype, device=history.device) if "ROWS" in parts else None
    grad_c = empty(tasks, BLOCK_H) if "ROWS" in parts else None
    grad_target = empty(tasks, D) if "WEIGHT" in parts else None
    BLOCK_S, BLOCK_L = 32, 32 if max(BLOCK_D, BLOCK_H, BLOCK_H2) <= (32 if torch.version.hip else 64) else 16
    din_attention_backward_kernel[(programs, BLOCK_D // BLOCK_S if "WEIGHT" in parts else 1)](
        grad_history_ptr=grad_history, grad_target_ptr=grad_target, grad_c_ptr=grad_c,
        grad_output_ptr=partials["grad_output"], sums_ptr=partials["sums0"], sums2_ptr=partials["sums1"],
        grad_weight_ptr=partials["grad_weight"], grad_weight2_ptr=partials["grad_weight2"], tasks=tasks,
        **{name: name in parts for name in ("LAST", "WEIGHT2", "FIRST", "ROWS", "WEIGHT")},
        BLOCK_L=BLOCK_L, BLOCK_S=BLOCK_S, **arguments,
    )  # fmt: skip
    got = {name: partial.sum(0) for name, partial in partials.items() if partial is not None}
    if "sums0" in got:
        got["sums0"] = got["sums0"][:, :H]
    if "sums1" in got:
        got["sums1"] = got["sums1"][:, :H2]
    if "LAST" in parts:
        got["grad_out_weight"], got["grad_out_bias"] = got.pop("grad_output").split([LAST, 1])
    if "WEIGHT2" in parts:
        weight2, got["grad_bias2"] = got["grad_weight2"].split([BLOCK_H2 * BLOCK_H, BLOCK_H2])
        got["grad_weight2"] = weight2.view(BLOCK_H2, BLOCK_H)
    if "ROWS" in parts:
        got |= {"grad_history": grad_history, "grad_c": _of_samples(grad_c, B)[:, :H]}
    if "WEIGHT" in parts:
        got["grad_target"] = _of_samples(grad_target, B)
    return got


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
    rows = _Rows(history, target, lengths, mask, offsets)
    network = _network(params, running_stats, flags)
    hidden = network.hidden
    with torch.cuda.device_of(history):
        training = batch_stats.numel() > 0
        n = rows.valid() if training else 0
        layers, kept = _layers(network, batch_stats, n), _saved(saved, rows, flags.use_softmax)
        arguments = network.arguments(rows, layers)
        sums, H = kept.pop("sum_ptr"), layers[0].bias.numel()
        weight_t = arguments.pop("wt_ptr")[:H, :D]
        arguments |= kept | dict(
            grad_out_ptr=grad_out, stride_gb=grad_out.stride(0), stride_gd=grad_out.stride(1),
            SOFTMAX=flags.use_softmax, c_ptr=torch.addmm(layers[0].bias, target.float(), weight_t.t()),
            mean_ptr=(grad_out.float() * sums).sum(1) if flags.use_softmax else None,
        )  # fmt: skip
        got, normalizations = {}, [[], []]
        for parts in _launches(arguments):
            got |= _launch(rows, arguments, parts)
            for i, (part, vectors) in enumerate((("FIRST", "vectors_ptr"), ("LAST", "vectors2_ptr"))[: len(layers)]):
                if training and part in parts:
                    u_and_w, normalizations[i] = means(hidden[i], layers[i], got[f"sums{i}"], n)
                    arguments[vectors][-2:, : u_and_w.size(1)] = u_and_w
        grad_c = got["grad_c"]
        grad_wm, grad_wp = got["grad_weight"][:, :D, :H].transpose(1, 2)
        grad_wt = grad_c.t() @ target.float()
        products = [(torch.cat([grad_wt, grad_wm, grad_wt - grad_wm, grad_wp], 1), grad_c.sum(0))]
        if len(layers) > 1:
            H2 = layers[1].bias.numel()
            products.append((got["grad_weight2"][:H2, :H], got["grad_bias2"][:H2]))
        grads = []
        for i, (layer, (weight, bias)) in enumerate(zip(layers, products)):
            if training:
                grads += [weight * layer.r[:, None], bias * layer.r, *normalizations[i]]
            else:
                grads += unfolded(hidden[i], weight, bias, got[f"sums{i}"])
        grads += [got["grad_out_weight"][None, : layers[-1].bias.numel()], got["grad_out_bias"]]
        grad_target = torch.addmm(got["grad_target"], grad_c, weight_t).to(target.dtype)
    return got["grad_history"], grad_target, [g.to(p.dtype).contiguous() for g, p in zip(grads, params)]
