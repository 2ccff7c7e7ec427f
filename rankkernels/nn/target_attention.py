"""Attention of one query a sample, by dot products: nothing is projected but the query and what is pooled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._transparency import are_plain, is_plain, is_untouched, nobody_follows
from rankkernels.ops._library import has_cpu_kernel
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.target_attention import is_faster


def of_heads(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, n] times each head's matrix of ``weight`` [H, n, m] -> [B, H, m]."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def attend(query: Tensor, rows: Tensor, dropout: float = 0.0, **form: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``rankkernels.target_attention``, and with ``dropout`` of its weights, on padded rows, also their sums [B, H, 1],
    which are 1 without. By torch's own products for a dropout, and where there is no kernel."""
    if not dropout and (is_faster(query) or any(t is not None for name, t in form.items() if name != "mask")):
        return ops.target_attention(query.to(rows.dtype), rows, **form), None  # autocast leaves embeddings as they are
    scores = torch.bmm(query, rows.transpose(1, 2))
    if (mask := form.get("mask")) is not None:
        scores = scores.masked_fill(~mask[:, None], max(-1e9, torch.finfo(scores.dtype).min))
    weights = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(weights, rows), weights.sum(-1, keepdim=True) if dropout else None


class TargetHeads:
    """What is common to ``MultiHeadTargetAttention`` and FuxiCTR's class of that name, whose namesake derives from this
    and from theirs.

    <q, K x> = <K^T q, x>, and the sum of w V x is V of the sum of w x: so rows are read as they are, and a row costs
    4 H D flops, where projecting it twice would cost 4 D times the heads' width.
    """

    def is_served(self) -> bool:
        """Whether ``of_rows`` does what the modules would, and nobody could tell."""
        dropout = self.dot_attention.dropout
        if not is_plain(self.dot_attention, type(self.dot_attention)) or not nobody_follows():
            return False
        if dropout is not None and not is_untouched(dropout, nn.Dropout):
            return False
        linears = (self.W_q, self.W_k, self.W_v, self.W_o) if self.use_qkvo else ()
        return all(is_untouched(m, nn.Linear) and m.bias is None and is_tensor(m.weight) for m in linears)

    def of_rows(self, target: Tensor, rows: Tensor, **form: Tensor | None) -> Tensor:
        """target [B, D] and its history, in a form of ``rankkernels.target_attention`` -> [B, D]."""
        H, n, D = self.num_heads, self.head_dim, target.shape[1]
        query = (self.W_q(target) if self.use_qkvo else target).view(-1, H, n)
        if self.scale:
            query = query / self.scale
        dropout = self.dot_attention.dropout
        p = dropout.p if dropout is not None and dropout.training else 0.0
        if self.use_qkvo:
            pooled, _ = attend(of_heads(query, self.W_k.weight.view(H, n, D)), rows, p, **form)
            pooled = of_heads(pooled, self.W_v.weight.view(H, n, D).transpose(1, 2))
            return self.W_o(pooled.flatten(1))
        # A head's part of a row: queries that are zero elsewhere.
        part = torch.eye(H, dtype=query.dtype, device=query.device)[:, :, None]
        pooled, _ = attend((query[:, :, None] * part).flatten(2), rows, p, **form)
        return (pooled.view(-1, H, H, n) * part).sum(2).flatten(1)


class ScaledDotProductAttention(nn.Module):
    """FuxiCTR's, which holds the dropout of the weights: Q [B, H, 1, n], K and V [B, H, L, n], mask [B, H, 1, L], zero
    at what is left out -> [B, H, 1, n] and the weights."""

    def __init__(self, dropout_rate: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate) if dropout_rate > 0 else None

    def forward(
        self, Q: Tensor, K: Tensor, V: Tensor, scale: float | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = Q @ K.transpose(-1, -2)
        if scale:
            scores = scores / scale
        if mask is not None:
            scores = scores.masked_fill(mask == 0, max(-1e9, torch.finfo(scores.dtype).min))
        attention = scores.softmax(-1)
        if self.dropout is not None:
            attention = self.dropout(attention)
        return attention @ V, attention


class MultiHeadTargetAttention(TargetHeads, nn.Module):
    """Attention of one target over a long history, by dot products in several heads: the second stage of SIM and TWIN.
    FuxiCTR's ``MultiHeadTargetAttention``, with its names, initial weights and numbers.

    Keys and values are never formed: see ``rankkernels.target_attention``.

    Args:
        input_dim: width of target and history.
        attention_dim: width of all heads together; ``input_dim`` without ``use_qkvo``.
        num_heads: of equal width.
        dropout_rate: probability of dropping a weight.
        use_scale: divide the scores by the root of a head's width.
        use_qkvo: project query, keys, values and output.

    Raises:
        ValueError: a width that is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        input_dim: int = 64,
        attention_dim: int = 64,
        num_heads: int = 1,
        dropout_rate: float = 0,
        use_scale: bool = True,
        use_qkvo: bool = True,
    ):
        super().__init__()
        attention_dim = attention_dim if use_qkvo else input_dim
        if attention_dim % num_heads:
            raise ValueError(
                f"MultiHeadTargetAttention: the width {attention_dim} must be a multiple of num_heads = {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = attention_dim // num_heads
        self.scale = self.head_dim**0.5 if use_scale else None
        self.use_qkvo = use_qkvo
        if use_qkvo:
            self.W_q = nn.Linear(input_dim, attention_dim, bias=False)
            self.W_k = nn.Linear(input_dim, attention_dim, bias=False)
            self.W_v = nn.Linear(input_dim, attention_dim, bias=False)
            self.W_o = nn.Linear(attention_dim, input_dim, bias=False)
        self.dot_attention = ScaledDotProductAttention(dropout_rate)

    def forward(
        self,
        target_item: Tensor,
        history_sequence: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        history_index: Tensor | None = None,
    ) -> Tensor:
        """target_item [B, D], history_sequence [B, L, D] or, with ``offsets`` [B + 1], [N, D] -> [B, D].

        ``mask`` [B, L] is zero at what is left out; ``lengths``, ``offsets`` and ``history_index`` are those of
        ``rankkernels.target_attention``. With a dropout, in training, and where a module's call may be seen, histories
        are padded ones with a mask or none.

        Raises:
            RuntimeError, ValueError, IndexError: see ``rankkernels.target_attention``.
        """
        form = {"lengths": lengths, "offsets": offsets, "history_index": history_index}
        given = {name: t for name, t in form.items() if t is not None}
        composed = self.training and self.dot_attention.dropout is not None
        if given and (composed or not self.is_served()):
            raise ValueError(
                f"MultiHeadTargetAttention: {' and '.join(given)} need all of its modules as they were built, and no "
                "dropout in training"
            )
        mask = None if mask is None else mask != 0
        if not self.is_served():
            return self._by_modules(target_item, history_sequence, mask)
        return self.of_rows(target_item, history_sequence, mask=mask, **given)

    def _by_modules(self, target: Tensor, history: Tensor, mask: Tensor | None) -> Tensor:
        """As FuxiCTR computes it."""
        query, key, value = target, history, history
        if self.use_qkvo:
            query, key, value = self.W_q(target), self.W_k(history), self.W_v(history)
        B, H, n = query.shape[0], self.num_heads, self.head_dim
        heads = [t.view(B, -1, H, n).transpose(1, 2) for t in (query, key, value)]
        if mask is not None:
            mask = mask.view(B, 1, 1, -1).expand(-1, H, -1, -1)
        out, _ = self.dot_attention(*heads, scale=self.scale, mask=mask)
        out = out.transpose(1, 2).reshape(B, H * n)
        return self.W_o(out) if self.use_qkvo else out


class InteractingLayer(nn.Module):
    """AutoInt's attention of a sample's fields to each other (Song et al. 2019): x [B, F, D] -> [B, F, D], relu of the
    heads' results and of a projection of x. torch-rechub's ``InteractingLayer``.

    A field and a head are a query to the sample's fields: see ``rankkernels.target_attention``. With a dropout, in
    training, and where there is no kernel, as torch-rechub computes it.

    Args:
        embed_dim: D, a multiple of ``num_heads``.
        num_heads: of equal width.
        dropout: probability of dropping a weight.
        residual: add the projection of x.

    Raises:
        ValueError: a width that is no multiple of ``num_heads``.
    """

    def __init__(self, embed_dim: int, num_heads: int = 2, dropout: float = 0.0, residual: bool = True):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"InteractingLayer: embed_dim = {embed_dim} must be a multiple of num_heads = {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.residual = residual
        self.W_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_V = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_Res = nn.Linear(embed_dim, embed_dim, bias=False) if residual else None
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or not (has_cpu_kernel(x) and self._is_served()):
            return self._by_modules(x)
        (B, fields, D), H, n = x.shape, self.num_heads, self.head_dim
        of_query, of_key, of_value = (m.weight.view(H, n, D) for m in (self.W_Q, self.W_K, self.W_V))
        rows = x.reshape(B * fields, D)
        query = rows @ (torch.bmm(of_query.transpose(1, 2), of_key) * self.scale).transpose(0, 1).reshape(D, H * D)
        pooled, _ = attend(query.view(B, fields * H, D), x)
        out = pooled.view(B * fields, H * D) @ torch.block_diag(*of_value).t()
        if self.residual and self.W_Res is not None:
            out = out + self.W_Res(rows)
        return torch.relu(out).view(B, fields, D)

    def _is_served(self) -> bool:
        """Whether ``forward`` does what the modules would, and nobody could tell."""
        if self.dropout is not None and (self.dropout.training or not is_plain(self.dropout, nn.Dropout)):
            return False
        linears = self.W_Q, self.W_K, self.W_V
        return are_plain(linears, [nn.Linear] * 3) and all(m.bias is None and is_tensor(m.weight) for m in linears)

    def _by_modules(self, x: Tensor) -> Tensor:
        """As torch-rechub computes it."""
        B, fields, D = x.shape
        heads = B, fields, self.num_heads, self.head_dim
        query, key, value = (m(x).view(heads).transpose(1, 2) for m in (self.W_Q, self.W_K, self.W_V))
        weights = (query @ key.transpose(-2, -1) * self.scale).softmax(-1)
        if self.dropout is not None:
            weights = self.dropout(weights)
        out = (weights @ value).transpose(1, 2).reshape(B, fields, D)
        if self.residual and self.W_Res is not None:
            out = out + self.W_Res(x)
        return torch.relu(out)


_PARTS = nn.MultiheadAttention, nn.Linear, nn.Linear, nn.LayerNorm, nn.LayerNorm


def is_last_position_enough(layer: nn.Module) -> bool:
    """Whether ``last_position`` does what calling this ``nn.TransformerEncoderLayer`` would, and nobody could tell."""
    if not is_plain(layer, nn.TransformerEncoderLayer) or layer.norm_first:
        return False
    attention = layer.self_attn
    parts = attention, layer.linear1, layer.linear2, layer.norm1, layer.norm2
    dropouts, activation = (layer.dropout, layer.dropout1, layer.dropout2), layer.activation
    if not (are_plain(parts, _PARTS) and are_plain(dropouts, [nn.Dropout] * 3)):
        return False
    if isinstance(activation, nn.Module) and not is_plain(activation, type(activation)):
        return False
    plain_output = is_untouched(attention.out_proj, nn.modules.linear.NonDynamicallyQuantizableLinear)
    whole = attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    tensors = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
    return plain_output and whole and attention.batch_first and all(map(is_tensor, tensors))


def last_position(layer: nn.TransformerEncoderLayer, x: Tensor, valid: Tensor) -> Tensor:
    """What ``layer`` gives at the last position of x [B, L, D], [B, D]: one query a sample, and one row of the feed
    forward. ``valid`` [B, L] is true at what has been there, the last position among it.

    In training with dropout the numbers drawn are fewer, those of the last position alone, and so others.
    """
    attention, last = layer.self_attn, x[:, -1]
    H, n, D = attention.num_heads, attention.head_dim, x.shape[2]
    of_query, of_key, of_value = attention.in_proj_weight.chunk(3)
    # The keys' bias adds the same to all of a query's scores.
    bias, _, of_value_bias = attention.in_proj_bias.chunk(3)
    query = F.linear(last, of_query, bias).view(-1, H, n)
    p = attention.dropout if attention.training else 0.0
    query = of_heads(query, of_key.view(H, n, D)) * n**-0.5
    pooled, total = attend(query, x, p, mask=valid)
    pooled = of_heads(pooled, of_value.view(H, n, D).transpose(1, 2))
    pooled = pooled + (1 if total is None else total) * of_value_bias.view(H, n)
    projection = attention.out_proj
    last = layer.norm1(last + layer.dropout1(F.linear(pooled.flatten(1), projection.weight, projection.bias)))
    forward = layer.linear2(layer.dropout(layer.activation(layer.linear1(last))))
    return layer.norm2(last + layer.dropout2(forward))
