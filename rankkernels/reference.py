"""The definition of correct: every op in plain eager PyTorch.

Tests and benchmarks compare with these functions, and they are what runs where no kernel does. They are written to be
checked by eye against the papers, not to be fast, and are differentiable twice. Tensors of 16-bit dtypes are computed
in float32 and the result is rounded once.

Shapes: B samples, F fields, L history positions, N rows in all, D embedding width, H hidden width, R table rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(x: Tensor) -> Tensor:
    """``x`` in the dtype it is accumulated in: float32 for 16-bit dtypes, its own otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def fm_interaction(x: Tensor, reduce_sum: bool = True) -> Tensor:
    """Second-order interactions of a factorization machine: x [B, F, D] -> [B, 1], or [B, D] without ``reduce_sum``.

    Rendle, "Factorization Machines" (2010), equation 5: the sum over pairs f < g of x_f * x_g is
    half of (sum_f x_f)^2 - sum_f x_f^2.
    """
    xa = accumulator(x)
    out = 0.5 * (xa.sum(1).square() - xa.square().sum(1))
    if reduce_sum:
        out = out.sum(1, keepdim=True)
    return out.to(x.dtype)


def cross_network(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """A cross network of as many layers as ``weights`` [1, D] and ``biases`` [D]: x [B, D] -> [B, D].

    Wang et al., "Deep & Cross Network for Ad Click Predictions" (2017), equation 3: x_{l+1} = x_0 (w_l . x_l) + b_l +
    x_l.
    """
    x0 = out = accumulator(x)
    for weight, bias in zip(weights, biases):
        out = x0 * F.linear(out, accumulator(weight)) + accumulator(bias) + out
    return out.to(x.dtype)


def cross_layer(x0: Tensor, product: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What follows the product W x of a layer of DCN v2, [B, D] each and bias [D]: x0 * product + bias + x.

    Wang et al., "DCN V2" (2021), equation 1, with the bias where torch-rechub has it.
    """
    out = accumulator(x0) * accumulator(product) + accumulator(x)
    return (out if bias is None else out + accumulator(bias)).to(x0.dtype)


def mixed_experts(projections: Tensor, weight: Tensor) -> Tensor:
    """The experts of a cross layer of low rank, each times its share: projections [B, E r + E] of x by all experts' V
    and by their gates, weight C [E, r, r] -> [B, E r], of expert e softmax(gates)_e tanh(C_e tanh(V_e^T x)).

    Wang et al., "DCN V2" (2021), equations 3 and 4, with torch-rechub's gates.
    """
    C, xa = accumulator(weight), accumulator(projections)
    E, rank, _ = C.shape
    h, gates = xa.split((E * rank, E), 1)
    h = torch.tanh(h).view(xa.size(0), E, rank).transpose(0, 1)
    q = torch.tanh(torch.bmm(h, C.transpose(1, 2))) * gates.softmax(1).t().unsqueeze(2)
    return q.transpose(0, 1).flatten(1).to(projections.dtype)


def mixed_cross_layer(
    x0: Tensor, x: Tensor, u: Tensor, v: Tensor, weight: Tensor, gates: Tensor, bias: Tensor
) -> Tensor:
    """A cross layer of low rank, x0 * (sum_e share_e U_e tanh(C_e tanh(V_e^T x)) + bias) + x: x0 and x [B, D], u and v
    [E, D, r], weight C [E, r, r], gates [E, D], bias [D] -> [B, D].

    Wang et al., "DCN V2" (2021), equations 3 and 4, with torch-rechub's gates, whose shares sum to 1.
    """
    product = mixture_product(mixture_projections(x, v, gates), u, weight, bias)
    return (accumulator(x0) * product + accumulator(x)).to(x0.dtype)


def mixture_projections(x: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """x by all experts' V and by the gates, [B, E r + E], in the accumulators' dtype."""
    return accumulator(x) @ accumulator(torch.cat([v.transpose(1, 2).flatten(0, 1), gates])).t()


def mixture_product(projections: Tensor, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What x0 is multiplied with, [B, D], in the dtype of ``projections``."""
    mixed = mixed_experts(projections, accumulator(weight))
    return mixed @ accumulator(u).transpose(1, 2).flatten(0, 1) + accumulator(bias)


def pairwise_dot(embeddings: Tensor, field_weights: Tensor | None = None) -> Tensor:
    """Dot products of the fields f < g: [B, F, D] -> [B, F (F - 1) / 2], each times its pair's weight, if any.

    The inner products of Qu et al., "Product-based Neural Networks" (2016), and of Naumov et al., "Deep Learning
    Recommendation Model" (2019); weighted, the terms of Pan et al., "Field-weighted Factorization Machines" (2018).
    """
    xa = accumulator(embeddings)
    f, g = torch.triu_indices(xa.size(1), xa.size(1), 1, device=xa.device)
    out = (xa @ xa.transpose(1, 2))[:, f, g]
    if field_weights is not None:
        out = out * accumulator(field_weights)
    return out.to(embeddings.dtype)


def ffm_interaction(x: Tensor, reduce_sum: bool = True) -> Tensor:
    """x[:, f, g] * x[:, g, f] of the fields f < g: x [B, F, F, D] -> [B, F (F - 1) / 2, D], or 1 with ``reduce_sum``.

    Juan et al., "Field-aware Factorization Machines for CTR Prediction" (2016), equation 4, without the sum over pairs.
    """
    xa = accumulator(x)
    f, g = torch.triu_indices(xa.size(1), xa.size(1), 1, device=xa.device)
    out = xa[:, f, g] * xa[:, g, f]
    return (out.sum(2, keepdim=True) if reduce_sum else out).to(x.dtype)


def bilinear_interaction(x: Tensor, weights: Sequence[Tensor], kind: str) -> Tensor:
    """(W x_f) * x_g of the fields f < g: x [B, F, D] -> [B, F (F - 1) / 2, D]. Of ``weights`` [D, D] there is one
    (``kind`` field_all), one a field but the last (field_each), or one a pair (field_interaction).

    Huang et al., "FiBiNET" (2019), section 3.3.
    """
    xa = accumulator(x)
    f, g = torch.triu_indices(xa.size(1), xa.size(1), 1, device=xa.device)
    matrices = torch.stack([accumulator(w) for w in weights]) if weights else xa.new_empty(0, xa.size(2), xa.size(2))
    which = {"field_all": torch.zeros_like(f), "field_each": f}.get(kind, torch.arange(len(f), device=xa.device))
    return (torch.einsum("bpd,ped->bpe", xa[:, f], matrices[which]) * xa[:, g]).to(x.dtype)


def fm_and_linear(embeddings: Tensor, dim: int, linear_weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The FM interaction of embeddings [B, F * dim] and their linear term with F * dim weights, if any: each [B, 1].

    The two parts beside the MLP in Guo et al., "DeepFM" (2017), equation 2, the linear one over the embeddings'
    columns, as torch-rechub has it.
    """
    fm = fm_interaction(embeddings.view(embeddings.size(0), embeddings.size(1) // dim, dim))
    if linear_weight is None:
        return fm, None
    linear = F.linear(accumulator(embeddings), accumulator(linear_weight).reshape(1, -1))
    return fm, linear.to(embeddings.dtype)


def augru(
    x: Tensor,
    input_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    attention: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """A GRU whose update gate is scaled by an attention: x [B, L, K], input_weight [3 D, K], weight [3 D, D], bias
    [4, D], attention [B, L], lengths [B] -> [B, L, D], zeros beyond the lengths.

    Zhou et al., "Deep Interest Evolution Network" (2019), equations 3 to 6 and 14 to 16. Without attention
    torch.nn.GRU's, whose z is 1 - u.
    """
    xa, W, U, b, a = (None if t is None else accumulator(t) for t in (x, input_weight, weight, bias, attention))
    B, L, D = *x.shape[:2], weight.shape[1]
    b_u, b_r, b_c, b_n = b
    g = F.linear(xa, W)
    h, states = g.new_zeros(B, D), [g[:, :0, :D]]
    for step in range(L):
        of_u, of_r, of_n = F.linear(h, U).split(D, 1)
        g_u, g_r, g_n = g[:, step].split(D, 1)
        u, r = torch.sigmoid(g_u + of_u + b_u), torch.sigmoid(g_r + of_r + b_r)
        n = torch.tanh(g_n + b_n + r * (of_n + b_c))
        h = h + (u if a is None else a[:, step, None] * u) * (n - h)
        states.append(h[:, None])
    out = torch.cat(states, 1)
    if lengths is not None:
        out = out.masked_fill(torch.arange(L, device=out.device)[:, None] >= lengths[:, None, None], 0.0)
    return out.to(x.dtype)


def dice(x: Tensor, alpha: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Dice with the statistics of a row's units, as torch-rechub has it: x [N, H], alpha [1] or [H] -> [N, H].

    The denominator is a sum over the units and not their mean.
    """
    xa = accumulator(x)
    centred = xa - xa.mean(1, keepdim=True)
    p = torch.sigmoid(centred / (centred.square() + epsilon).sum(1, keepdim=True).sqrt())
    return (p * xa + (1 - p) * alpha * xa).to(x.dtype)


class BatchNorm(NamedTuple):
    """A batch normalization over rows: ``weight``, ``bias``, ``running_mean`` and ``running_var`` are [H]."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float


class BatchStats(NamedTuple):
    """What training learnt of one batch: the mean and the unbiased variance, [H] each, for the running statistics."""

    mean: Tensor
    unbiased_var: Tensor


def batch_norm(x: Tensor, norm: BatchNorm, training: bool) -> tuple[Tensor, BatchStats | None]:
    """Ioffe and Szegedy (2015) over the rows of x [N, H].

    In training the batch's own statistics are used and returned; the running ones are never written here. Of no rows
    the running ones are returned (zeros without), so that an update leaves them as they are, as torch does.
    """
    xa, stats = accumulator(x), None
    if training and x.size(0) == 1:
        raise ValueError("batch_norm: training needs more than one valid row to take statistics of, got 1")
    if training and x.size(0) == 0:
        mean, var = (xa.new_zeros(x.size(1)) if t is None else t for t in (norm.running_mean, norm.running_var))
        stats = BatchStats(mean.detach(), var.detach())
    elif training:
        mean, var = xa.mean(0), xa.var(0, correction=0)
        stats = BatchStats(mean.detach(), xa.detach().var(0, correction=1))
    else:
        mean, var = norm.running_mean, norm.running_var
    y = (xa - mean) * torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        y = y * norm.weight + norm.bias
    return y.to(x.dtype), stats


def dice_batch_norm(x: Tensor, alpha: Tensor, norm: BatchNorm, training: bool) -> tuple[Tensor, BatchStats | None]:
    """Dice with batch statistics, as in Zhou et al., "Deep Interest Network" (2018), equation 3: x [N, H], alpha [H].

    DeepCTR-Torch's has an affine normalization, FuxiCTR's has none.
    """
    y, stats = batch_norm(x, norm, training)
    p = torch.sigmoid(y)
    return p * x + (1 - p) * alpha * x, stats


def activate(x: Tensor, activation: str, alpha: Tensor | None = None, dice_epsilon: float = 1e-3) -> Tensor:
    """x [N, H] through linear, sigmoid, relu, leakyrelu, prelu or dice, the last two with ``alpha`` [1] or [H]."""
    if activation == "sigmoid":
        return torch.sigmoid(x)
    if activation == "relu":
        return torch.relu(x)
    if activation == "leakyrelu":
        return F.leaky_relu(x)
    if activation == "prelu":
        return F.prelu(x, alpha)
    if activation == "dice":
        return dice(x, alpha, dice_epsilon)
    if activation != "linear":
        raise ValueError(f"unknown activation {activation!r}")
    return x


def norm_activation(
    x: Tensor,
    norm: BatchNorm | None,
    activation: str,
    alpha: Tensor | None = None,
    training: bool = False,
    dice_epsilon: float = 1e-3,
) -> tuple[Tensor, BatchStats | None]:
    """A hidden layer behind its product: x [N, H] normalized if there is a ``norm``, then activated -> [N, H].

    The ``norm`` of dice_batch_norm is the one inside that activation.
    """
    xa, stats = accumulator(x), None
    if activation == "dice_batch_norm":
        y, stats = dice_batch_norm(xa, alpha, norm, training)
    else:
        if norm is not None:
            xa, stats = batch_norm(xa, norm, training)
        y = activate(xa, activation, alpha, dice_epsilon)
    return y.to(x.dtype), stats


class Hidden(NamedTuple):
    """A hidden layer of the attention MLP: linear, then an optional normalization, then the activation.

    ``activation`` is one of sigmoid, relu, leakyrelu, prelu, dice, dice_batch_norm and linear. ``alpha`` [1] or [H] is
    the slope of prelu and of both kinds of Dice; ``dice_norm`` belongs to dice_batch_norm, ``dice_epsilon`` to
    dice.
    """

    weight: Tensor
    bias: Tensor
    norm: BatchNorm | None
    activation: str
    alpha: Tensor | None = None
    dice_norm: BatchNorm | None = None
    dice_epsilon: float = 1e-3

    def __call__(self, x: Tensor, training: bool) -> tuple[Tensor, list[BatchStats]]:
        all_stats = []
        x = F.linear(x, self.weight, self.bias)
        if self.norm is not None:
            x, stats = batch_norm(x, self.norm, training)
            all_stats.append(stats)
        if self.activation == "dice_batch_norm":
            x, stats = dice_batch_norm(x, self.alpha, self.dice_norm, training)
            all_stats.append(stats)
        else:
            x = activate(x, self.activation, self.alpha, self.dice_epsilon)
        return x, all_stats


def valid_rows(
    history: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of ``history`` that are no padding, [N, D], the sample each belongs to and its position there, [N] each.

    ``history`` is [B, L, D], its valid rows told by ``lengths`` [B] (the first ones) or ``mask`` [B, L] (where true),
    all of them without either; or it is [N, D] and sample b's rows are ``offsets[b]:offsets[b + 1]``, offsets [B + 1].
    """
    device = history.device
    if offsets is not None:
        offsets, row = offsets.long(), torch.arange(history.size(0), device=device)
        # repeat_interleave, told its size, writes beyond it where the offsets are wrong.
        sample = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        return history, sample, row - offsets[sample]
    B, L, _ = history.shape
    if lengths is not None:
        mask = torch.arange(L, device=device) < lengths[:, None]
    if mask is None:
        sample, position = torch.arange(B, device=device), torch.arange(L, device=device)
        return history.flatten(0, 1), sample.repeat_interleave(L), position.repeat(B)
    return history[mask], *mask.nonzero().unbind(1)


def expand_histories(
    history: Tensor, history_index: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The batch [B] in which sample b has a copy of history ``history_index[b]``, in the form they are given in."""
    if offsets is None:
        return (*(x if x is None else x.index_select(0, history_index) for x in (history, lengths, mask)), None)
    counts, starts = offsets.diff().index_select(0, history_index), offsets.index_select(0, history_index)
    ends = counts.cumsum(0)
    sample = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    rows = torch.arange(sample.numel(), device=counts.device) + (starts - (ends - counts))[sample]
    return history.index_select(0, rows), None, None, torch.cat([ends.new_zeros(1), ends])


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).

    Four 32-bit words of the counter and two of the key, in int64, broadcast -> four 32-bit words.
    """
    c, k = list(counter), list(key)
    word = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2^64: their bits are those of the unsigned products
        c = [(b >> 32 & word) ^ c[1] ^ k[0], b & word, (a >> 32 & word) ^ c[3] ^ k[1], a & word]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    return c


def rounding_bits(key: int, step: int, rows: Tensor, D: int) -> Tensor:
    """The 16 random bits for each element of ``rows`` [n] of a table [R, D] in a step: [n, D] int64.

    Philox4x32-10 with the counter (column // 8, row mod 2^32, row // 2^32, step) and the halves of ``key`` as key, the
    low one first, has those of eight columns: its words in their order, of each the low half first.
    """
    block, row, word = torch.arange((D + 7) // 8, device=rows.device), rows[:, None], 0xFFFFFFFF
    counter = block, row & word, row >> 32, torch.full_like(block, step)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (key & word, key >> 32))), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :D]


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """``x`` float32 in a 16-bit ``dtype``: with ``bits``, 16 random ones in int64, x is rounded up as often as it lies
    near the number above, so that the mean is x.

    The magnitude becomes the larger of the two numbers next to it where it lies more than bits / 2^16 of their distance
    above the smaller, else that. Where it is the largest finite number or more, and a NaN, to the nearest.
    """
    info, exact = torch.finfo(dtype), x.double()
    magnitude = exact.abs()
    power = magnitude / torch.frexp(magnitude).mantissa / 2  # of two, not above it
    spacing = torch.where(magnitude < info.smallest_normal, info.smallest_normal, power) * info.eps
    below = (magnitude / spacing).floor()
    up = (magnitude / spacing - below) * 2**16 > bits
    rounded = ((below + up) * spacing).copysign(exact)
    return torch.where(magnitude < info.max, rounded, exact).to(dtype)


def dropout_factor(p: float, seed: Tensor, layer: int, sample: Tensor, position: Tensor, H: int) -> Tensor:
    """What the H units behind hidden layer ``layer`` are multiplied with: 0 with probability ``p``, else 1 / (1 - p).

    ``sample`` and ``position`` are the rows' [N] -> [N, H] float64. Unit h of the row at position l of sample b takes
    word l % 4 of Philox4x32-10 with the counter (h, l // 4, b, layer) and the halves of ``seed`` as key, the low one
    first, and is dropped where the word's upper 24 bits are below p 2^24, rounded.
    """
    seed = seed.reshape(())
    unit = torch.arange(H, device=sample.device)
    counter = unit, position[:, None] // 4, sample[:, None], torch.full_like(unit, layer)
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))), -1)
    word = words.gather(-1, (position % 4)[:, None, None].expand(-1, H, 1)).squeeze(-1)
    return (word >> 8 >= round(p * 2**24)).double() * (1 / (1 - p) if p < 1 else 0.0)


def segment_softmax(score: Tensor, sample: Tensor, B: int) -> Tensor:
    """The softmax of ``score`` [N] among the rows of each sample."""
    peak = score.new_full((B,), -torch.inf).scatter_reduce(0, sample, score.detach(), "amax")
    e = torch.exp(score - peak[sample])
    return e / e.new_zeros(B).index_add(0, sample, e)[sample]


def attention_input(rows: Tensor, target: Tensor, sample: Tensor) -> Tensor:
    """The input of the attention MLP for each row: [t, h, t - h, t * h], [N, 4 D]."""
    t = target[sample]
    return torch.cat([t, rows, t - rows, t * rows], -1)


def attention_pool(score: Tensor, rows: Tensor, sample: Tensor, B: int, use_softmax: bool) -> Tensor:
    """The rows of each sample, summed with their scores [N] or the softmax of these: [B, D]."""
    if use_softmax:
        score = segment_softmax(score, sample, B)
    return weighted_sum(score, rows, sample, B)


def weighted_sum(weight: Tensor, rows: Tensor, sample: Tensor, B: int) -> Tensor:
    """The rows [N, D] of each sample, summed with their weights [N]: [B, D]."""
    return rows.new_zeros(B, rows.size(1)).index_add(0, sample, weight[:, None] * rows)


def target_attention(
    query: Tensor,
    history: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    history_index: Tensor | None = None,
) -> Tensor:
    """Each sample's history pooled by the softmax of its rows' dot products with each query: query [B, H, D], history
    as in ``valid_rows`` -> [B, H, D].

    FuxiCTR's MultiHeadTargetAttention between its projections, and the second stage of SIM (Pi et al. 2020) and TWIN
    (Chang et al. 2023). Rows that a mask leaves out score -1e9, as there: a sample without any other gets their mean.
    """
    q, h = accumulator(query), accumulator(history)
    if history_index is not None:
        h, lengths, mask, offsets = expand_histories(h, history_index, lengths, mask, offsets)
    if lengths is None and offsets is None:
        scores = torch.einsum("bhd,bld->bhl", q, h)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1e9)
        return torch.einsum("bhl,bld->bhd", scores.softmax(-1), h).to(query.dtype)
    rows, sample, _ = valid_rows(h, lengths, None, offsets)
    scores = (q[sample] * rows[:, None]).sum(-1)
    heads = [attention_pool(score, rows, sample, q.size(0), True) for score in scores.unbind(1)]
    return torch.stack(heads, 1).to(query.dtype) if heads else q.new_zeros(q.shape).to(query.dtype)


def din_attention(
    history: Tensor,
    target: Tensor,
    hidden: Sequence[Hidden],
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    history_index: Tensor | None = None,
    use_softmax: bool = False,
    count_padding: bool = False,
    return_scores: bool = False,
    training: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, list[BatchStats]]:
    """DIN's local activation unit (Zhou et al. 2018, figure 2): target [B, D] attends to its history -> [B, D].

    Row l of sample b scores MLP([t, h, t - h, t * h]), by a softmax over the sample's rows if ``use_softmax``; the
    output is the score-weighted sum of the rows. ``out_weight`` is [1, H] and ``out_bias`` [1]. Padding (see
    ``valid_rows``) has no score, no gradient and no part in batch statistics; a sample without rows gives zeros.
    With ``count_padding`` it is rows like others, but for their score: 0, or under a softmax the lowest number. With
    ``return_scores`` the result is what the rows are multiplied with, [B, L] (0 at padding that has no score) or [N].
    ``dropout`` follows each hidden layer's activation (``dropout_factor``), as in torch-rechub, DeepCTR-Torch, FuxiCTR.
    With ``history_index`` [B] the histories are those of U users, and everything is as on the batch in which sample b
    has a copy of history ``history_index[b]``.
    """
    if history_index is not None:
        history, lengths, mask, offsets = expand_histories(history, history_index, lengths, mask, offsets)
    dtype = history.dtype
    history, target, B = accumulator(history), accumulator(target), target.size(0)
    rows, sample, position = valid_rows(history, lengths, mask, offsets)
    padding = None
    if count_padding and (lengths is not None or mask is not None):
        valid = history.new_zeros(history.shape[:2], dtype=torch.bool).index_put((sample, position), sample >= 0)
        rows, sample, position = valid_rows(history)
        padding = ~valid.flatten()
    x, all_stats = attention_input(rows, target, sample), []
    for i, layer in enumerate(hidden):
        x, stats = layer(x, training)
        if dropout > 0:
            x = x * dropout_factor(dropout, seed, i, sample, position, x.size(1)).to(x.dtype)
        all_stats += stats
    score = F.linear(x, out_weight, out_bias).squeeze(1)
    if padding is not None:
        score = score.masked_fill(padding, torch.finfo(score.dtype).min if use_softmax else 0.0)
    if use_softmax:
        score = segment_softmax(score, sample, B)
    if not return_scores:
        score = weighted_sum(score, rows, sample, B)
    elif offsets is None:
        score = score.new_zeros(history.shape[:2]).index_put((sample, position), score)
    return score.to(dtype), all_stats


def _first_maximum(rows: Tensor, bag: Tensor, B: int) -> Tensor:
    """The largest of each bag's ``rows`` [N, D], column by column, zeros for an empty bag: [B, D].

    A NaN is larger than any number. Of equal values the first is taken and gets the gradient, as in ``torch.max``.
    """
    N, D = rows.shape
    if N == 0:
        return rows.new_zeros(B, D)
    bags, values = bag[:, None].expand(N, D), rows.detach()
    largest = values.new_full((B, D), -torch.inf).scatter_reduce(0, bags, values, "amax")
    position = torch.arange(N, device=rows.device)[:, None].expand(N, D)
    position = torch.where((values == largest[bag]) | values.isnan(), position, N)
    first = position.new_full((B, D), N).scatter_reduce(0, bags, position, "amin")
    return torch.where(first < N, rows.gather(0, first.clamp(max=N - 1)), 0.0)


def known_rows(ids: Tensor, size: int, hashed: bool, padding_idx: int = -1) -> Tensor:
    """Ids as they come -> rows of a table: those of 0 .. size - 1 as they are, the others ``size - 1``, or a hash of
    the id into all rows but ``padding_idx``, -1: none.

    Knuth, "The Art of Computer Programming", volume 3, section 6.4: Fibonacci hashing. The product's high bits depend
    on all of the id's, so they are mixed into the low ones; the remainder has no sign.
    """
    unknown = (ids < 0) | (ids >= size)
    if not hashed:
        return ids.masked_fill(unknown, size - 1)
    mixed = ids.long() * -7046029254386353131
    rows = mixed.bitwise_xor(mixed >> 32).remainder(max(size - (padding_idx >= 0), 1))
    if padding_idx >= 0:
        rows = rows + (rows >= padding_idx)
    return torch.where(unknown, rows, ids.long()).to(ids.dtype)


def embedding(weight: Tensor, indices: Tensor, frozen_row: int | None = None) -> Tensor:
    """Rows of a table: weight [R, D], indices of any shape -> indices.shape + [D].

    ``frozen_row`` is the row that gets no gradient: ``nn.Embedding``'s padding_idx.
    """
    if frozen_row is not None:
        return F.embedding(indices, weight, padding_idx=frozen_row)
    rows = weight.index_select(0, indices.flatten())  # weight[-1] would be a row
    return rows.view(*indices.shape, weight.size(1))


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    frozen_row: int | None = None,
) -> Tensor:
    """Pooled rows of a table: weight [R, D] -> [B, D]. ``torch.nn.functional.embedding_bag`` has the same semantics.

    ``indices`` are [B, L], or [N] with bag b at ``offsets[b]:offsets[b + 1]`` (offsets [B], the last bag ends at N).
    ``mode`` is sum, mean or max; ``per_sample_weights`` scale the rows of a sum or a mean, whose count stays
    unweighted. An index equal to ``padding_idx`` is as if it were not there. An empty bag gives zeros. A maximum's
    gradient goes to the first row that attains it; ``frozen_row`` gets none (``embedding``).
    """
    if indices.dim() == 2:
        B = indices.size(0)
        bag = torch.arange(B, device=indices.device).repeat_interleave(indices.size(1))
        indices = indices.flatten()
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.flatten()
    else:
        B = offsets.numel()
        ends = torch.cat([offsets, offsets.new_tensor([indices.numel()])])
        bag = torch.arange(B, device=indices.device).repeat_interleave(ends.diff())
    if padding_idx is not None:
        keep = indices != padding_idx
        indices, bag = indices[keep], bag[keep]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[keep]
    rows = embedding(accumulator(weight), indices, frozen_row)
    if mode == "max":
        if per_sample_weights is not None:
            raise ValueError("embedding_bag: per_sample_weights cannot be combined with mode 'max'")
        return _first_maximum(rows, bag, B).to(weight.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    out = rows.new_zeros(B, rows.size(1)).index_add(0, bag, rows)
    if mode == "mean":
        count = out.new_zeros(B).index_add(0, bag, out.new_ones(bag.numel()))
        out = out / count.clamp(min=1)[:, None]
    elif mode != "sum":
        raise ValueError(f"embedding_bag: unknown mode {mode!r}, expected 'sum', 'mean' or 'max'")
    return out.to(weight.dtype)


def clip_rows(grad: Tensor, max_norm: float) -> Tensor:
    """Each row of ``grad`` [n, D], scaled down to the norm ``max_norm`` where it has a larger one; 0 clips none.

    The norm is taken of the row over its largest value: squares alone have half of the exponent's range.
    """
    if not max_norm or not grad.numel():
        return grad
    largest = grad.abs().amax(1, keepdim=True)
    scaled = largest * (grad / largest.clamp(min=torch.finfo(grad.dtype).tiny)).norm(dim=1, keepdim=True)
    norm = torch.where(largest.isinf(), largest, scaled)
    return torch.where(norm <= max_norm, grad, grad * (max_norm / norm))


def ftrl_step(
    w: Tensor, g: Tensor, z: Tensor, n: Tensor, *, lr: float, lr_power: float, beta: float, l1: float, l2: float
) -> tuple[Tensor, list[Tensor]]:
    """FTRL-proximal of McMahan et al., "Ad Click Prediction: a View from the Trenches" (2013), algorithm 1.

    z += g - ((n + g^2)^p - n^p) / lr w,    n += g^2,    p = -lr_power
    w = -(z - sign(z) l1) / ((beta + n^p) / lr + l2), 0 where abs(z) <= l1
    """
    root, n = n**-lr_power, n + g * g
    z = z + g - (n**-lr_power - root) / lr * w
    w = -(z - z.sign() * l1) / ((beta + n**-lr_power) / lr + l2)
    return torch.where(z.abs() <= l1, 0.0, w), [z, n]


def rowwise_rmsprop_step(
    w: Tensor, g: Tensor, v: Tensor, last: Tensor, *, lr: float, beta2: float, eps: float, ar_alpha: float,
    min_shrinkage: float, step: float,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """FBGEMM's ROWWISE_RMSPROP_AR, after Li and Lyu, "Adaptive Regularization for Large-Scale Sparse Feature Embedding
    Models" (arXiv 2511.06374). v and the number of the step that touched a row last are [n].

        v += (1 - beta2) (mean over D of g^2 - v)
        w -= min(lr ar_alpha (step - last), 1 - min_shrinkage) w, step - last = 1 where last = 0;    last = step
        w -= lr g / (sqrt(v) + eps)
    """
    v = v + (1 - beta2) * ((g * g).mean(1) - v)
    elapsed = torch.where(last == 0, 1.0, step - last)
    w = w - (lr * ar_alpha * elapsed).clamp(max=1 - min_shrinkage)[:, None] * w
    return w - (lr / (v.sqrt() + eps))[:, None] * g, [v, torch.full_like(last, step)]


def optimizer_step(
    optimizer: str, weight: Tensor, grad: Tensor, state: Sequence[Tensor], *, lr: float, beta1: float = 0.0,
    beta2: float = 0.0, eps: float = 0.0, weight_decay: float = 0.0, step: float = 1.0, grad_factor: float = 1.0,
    max_norm: float = 0.0, **own: float,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """One step on rows w [n, D] with the gradient g [n, D], in the dtype of the state -> the new rows and state.

    First g is multiplied by ``grad_factor`` (1 over the loss scale) and clipped (``clip_rows``). sgd, adam and the
    adagrads then add weight decay to it, g += weight_decay w; adamw and rowwise_adam decay w by lr weight_decay w. With
    t = ``step``, from 1:

        sgd               w -= lr g
        adagrad           s += g^2                              w -= lr g / (sqrt(s) + eps)
        rowwise_adagrad   s += mean over D of g^2, s is [n]     w -= lr g / (sqrt(s) + eps)
        adam, adamw       m += (1 - beta1) (g - m),             v += (1 - beta2) (g^2 - v)
        adam              w -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)
        adamw             w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
        rowwise_adam      adamw with v += (1 - beta2) (mean over D of g^2 - v), v is [n]
        ftrl              ``ftrl_step``, and ``own`` are its settings
        rowwise_rmsprop   ``rowwise_rmsprop_step``, likewise

    adam is ``torch.optim.SparseAdam``, adamw ``torch.optim.AdamW``, sgd and adagrad torch's of their names;
    rowwise_adagrad is FBGEMM's EXACT_ROWWISE_ADAGRAD, rowwise_adam its PARTIAL_ROWWISE_ADAM.
    """
    w, g = weight, clip_rows(grad * grad_factor, max_norm)
    if optimizer in ("adamw", "rowwise_adam"):
        w = w - lr * weight_decay * w
    elif optimizer in ("sgd", "adagrad", "rowwise_adagrad", "adam"):
        g = g + weight_decay * w
    if optimizer == "sgd":
        return w - lr * g, []
    if optimizer == "adagrad":
        s = state[0] + g * g
        return w - lr * g / (s.sqrt() + eps), [s]
    if optimizer == "rowwise_adagrad":
        s = state[0] + (g * g).mean(1)
        return w - (lr / (s.sqrt() + eps))[:, None] * g, [s]
    if optimizer == "ftrl":
        return ftrl_step(w, g, *state, lr=lr, **own)
    if optimizer == "rowwise_rmsprop":
        return rowwise_rmsprop_step(w, g, *state, lr=lr, beta2=beta2, eps=eps, step=step, **own)
    m, v = state
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * ((g * g if v.dim() == 2 else (g * g).mean(1)) - v)
    correction1, root2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    if optimizer == "adam":
        return w - lr * root2 / correction1 * m / (v.sqrt() + eps), [m, v]
    if optimizer == "adamw":
        return w - lr / correction1 * m / (v.sqrt() / root2 + eps), [m, v]
    if optimizer == "rowwise_adam":
        return w - (lr / correction1 / (v.sqrt() / root2 + eps))[:, None] * m, [m, v]
    raise ValueError(f"unknown optimizer {optimizer!r}")
