"""DIEN's recurrent layers: torch's GRU over histories of any length, and AUGRU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rankkernels import ops
from rankkernels.nn._transparency import is_plain
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.augru import is_faster


def run_gru(gru: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """``gru``, of one layer and one direction and as wide as x [B, L, D], over the first ``lengths`` [B] positions of
    each sample -> [B, L, D], zeros beyond them."""
    if not (is_faster(x, x.size(2)) and _is_served(gru, x)):
        return _packed(gru, x, lengths)
    r, z, n = gru.weight_ih_l0.chunk(3)
    of_r, of_z, of_n = gru.weight_hh_l0.chunk(3)
    (r_bias, z_bias, n_bias), (of_r_bias, of_z_bias, of_n_bias) = gru.bias_ih_l0.chunk(3), gru.bias_hh_l0.chunk(3)
    # The op's gate is 1 - z: the sign of z's weights changes.
    bias = torch.stack([-z_bias - of_z_bias, r_bias + of_r_bias, of_n_bias, n_bias])
    return ops.augru(x, torch.cat([-z, r, n]), torch.cat([-of_z, of_r, of_n]), bias, None, lengths)


def _is_served(gru: nn.Module, x: Tensor) -> bool:
    """Whether the op does what calling ``gru`` would, and nobody could tell."""
    if not is_plain(gru, nn.GRU) or not all(map(is_tensor, gru._parameters.values())):
        return False
    one = gru.num_layers == 1 and not gru.bidirectional and gru.bias and gru.batch_first
    return one and gru.hidden_size == gru.input_size == x.size(2)


def _packed(gru: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """``run_gru`` by calling the module, as torch-rechub does."""
    out, some = torch.zeros_like(x), lengths > 0
    if some.any():
        packed = pack_padded_sequence(x[some], lengths[some].tolist(), batch_first=True, enforce_sorted=False)
        out[some], _ = pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=x.size(1))
    return out


def _xavier(*shape: int) -> nn.Parameter:
    return nn.init.xavier_uniform_(nn.Parameter(torch.empty(shape)))


class AUGRU_Cell(nn.Module):
    """One step of ``AUGRU``: x and h [B, D], attention a [B, 1] -> [B, D]. torch-rechub's ``AUGRU_Cell``."""

    def __init__(self, embed_dim: int):
        super().__init__()
        for gate in "urh":
            for name, rows in (("W", embed_dim), ("U", embed_dim), ("b", 1)):
                setattr(self, f"{name}{gate}", _xavier(rows, embed_dim))

    def forward(self, x: Tensor, h_1: Tensor, a: Tensor) -> Tensor:
        u = torch.sigmoid(x @ self.Wu + h_1 @ self.Uu + self.bu)
        r = torch.sigmoid(x @ self.Wr + h_1 @ self.Ur + self.br)
        h_hat = torch.tanh(x @ self.Wh + r * (h_1 @ self.Uh) + self.bh)
        return (1 - a * u) * h_1 + a * u * h_hat


class AUGRU(nn.Module):
    """GRU with an attentional update gate (Zhou et al. 2019): states x [B, L, D], target item [B, D], mask [B, L], true
    at what is there -> the states behind each position [B, L, D], and the last one [B, D]. torch-rechub's ``AUGRU``.

    The recurrence is one op (``rankkernels.augru``); the attention reads x as it is, because <W x, item> is
    <x, W^T item>.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.augru_cell = AUGRU_Cell(embed_dim)
        self.Wa = _xavier(embed_dim, embed_dim)

    def forward(self, x: Tensor, item: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        attention = self.attention(x, item, mask)
        if self.is_served():
            out = self.states(x, attention)
            return out, out[:, -1]
        h, out = x.new_zeros(x.size(0), self.embed_dim), []
        for i in range(x.size(1)):
            h = self.augru_cell(x[:, i], h, attention[:, i, None])
            out.append(h)
        return torch.stack(out, 1), h

    def is_served(self) -> bool:
        """Whether the op does what the cell would, and nobody could tell."""
        return is_plain(self.augru_cell, AUGRU_Cell) and all(map(is_tensor, self.augru_cell._parameters.values()))

    def attention(self, x: Tensor, item: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L], a softmax over each sample's positions; uniform where there is none."""
        scores = torch.bmm(x, (item @ self.Wa.t())[:, :, None]).squeeze(2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attention = scores.softmax(1)
        return torch.where(attention.isnan().any(1, keepdim=True), 1.0 / max(x.size(1), 1), attention)

    def states(self, x: Tensor, attention: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, L, D], zeros beyond the ``lengths``."""
        cell = self.augru_cell
        of_input = torch.cat([cell.Wu, cell.Wr, cell.Wh], 1).t()
        of_state = torch.cat([cell.Uu, cell.Ur, cell.Uh], 1).t()
        bias = torch.cat([cell.bu, cell.br, torch.zeros_like(cell.bh), cell.bh])
        return ops.augru(x, of_input, of_state, bias, attention.to(x.dtype), lengths)
