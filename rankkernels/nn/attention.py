"""DIN's activation unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops, reference
from rankkernels.nn._transparency import is_plain
from rankkernels.nn.layers import MLP, activation_of, is_served, update_running_stats
from rankkernels.ops._attention_checks import check_history, check_positions
from rankkernels.ops._jagged import jagged
from rankkernels.ops._tracing import is_exporting_to_onnx, is_tensor, is_traced, is_transformed
from rankkernels.ops.attention_params import Inputs


class _FusedMLP(NamedTuple):
    """What the fused op needs of an attention MLP."""

    params: list[Tensor]
    norms: list[nn.BatchNorm1d]
    activation: str
    training: bool
    norm_eps: float
    dice_eps: float
    dropout: float


def _fused(attention: nn.Module) -> _FusedMLP | None:
    """``attention`` for the op, or None where it is not the ``MLP`` that was built: a layer was replaced, wrapped or
    re-configured since or may see its call, or norms, activations or dropouts differ among themselves."""
    if not (is_plain(attention, MLP) and is_plain(attention.mlp, nn.Sequential)):
        return None
    *hidden, last = attention.mlp
    if len(hidden) % 4 or not _is_served(last):
        return None
    params, norms, kinds = [], [], set()
    for linear, norm, act, dropout in zip(*[iter(hidden)] * 4):
        name, learnt, dice_eps = activation_of(act)
        if not (name and _is_served(linear) and is_served(norm) and is_plain(dropout, nn.Dropout)):
            return None
        if norm.weight is None:
            return None
        params += [linear.weight, linear.bias, norm.weight, norm.bias, *learnt]
        norms.append(norm)
        kinds.add((name, dice_eps, norm.eps, norm.training, dropout.p if dropout.training else 0.0))
    if len(kinds) > 1:
        return None
    name, dice_eps, norm_eps, training, p = kinds.pop() if kinds else ("linear", 0.0, 0.0, False, 0.0)
    return _FusedMLP([*params, last.weight, last.bias], norms, name, training, norm_eps, dice_eps, p)


def _is_served(linear: nn.Module) -> bool:
    return is_plain(linear, nn.Linear) and is_tensor(linear.weight) and is_tensor(linear.bias)


def _score(attention: nn.Module, rows: Tensor, target: Tensor, sample: Tensor) -> Tensor:
    """``attention`` of [t, h, t - h, t h] for every row h [N, D] and its sample's target t [B, D], module by module,
    and where nobody could tell without concatenating:

    W_t t + W_h h + W_d (t - h) + W_p (t h) + b = (W_h - W_d) h + W_p (t h) + [(W_t + W_d) t + b]
    """
    modules = attention.mlp if is_plain(attention, MLP) and is_plain(attention.mlp, nn.Sequential) else ()
    first, *rest = modules or (None,)
    if not is_plain(first, nn.Linear):
        return attention(reference.attention_input(rows, target, sample))
    w_target, w_history, w_difference, w_product = first.weight.chunk(4, dim=1)
    of_target = F.linear(target, w_target + w_difference, first.bias)
    score = F.linear(rows, w_history - w_difference) + F.linear(rows * target[sample], w_product) + of_target[sample]
    for module in rest:
        score = module(score)
    return score


def _check(inputs: Inputs) -> None:
    """What the op would refuse, where it is not called."""
    check_history("ActivationUnit", inputs)
    positions = inputs.lengths if inputs.lengths is not None else inputs.offsets
    if type(positions) is Tensor and positions.device.type == "cpu" and not (is_traced() or is_transformed()):
        check_positions("ActivationUnit", inputs)


class ActivationUnit(nn.Module):
    """DIN's local activation unit: a history of embeddings, pooled with weights that depend on the target.

    torch-rechub's ``ActivationUnit``. It knows no padding, and by default neither does this: padded rows count like
    any other, in the softmax and in the batch statistics too. With ``lengths``, ``mask``, ``offsets`` or a nested
    ``history`` only the valid rows do.

    The attention MLP runs fused (``rankkernels.din_attention``). Where a layer was replaced or has a hook, or for an
    activation that the op lacks, the modules are called one after the other; a first layer that nobody changed is still
    spared the concatenation.

    Args:
        emb_dim: width D of history and target.
        dims: widths of the hidden layers, [36] by default.
        activation: as in ``MLP``.
        use_softmax: whether the scores go through a softmax over the history.
        dropout: probability of dropping a hidden unit (torch-rechub's unit has none).
    """

    def __init__(
        self,
        emb_dim: int,
        dims: Sequence[int] | None = None,
        activation: str | type[nn.Module] = "dice",
        use_softmax: bool = False,
        dropout: float = 0,
    ):
        super().__init__()
        self.emb_dim = emb_dim
        self.use_softmax = use_softmax
        self.attention = MLP(4 * emb_dim, dims=[36] if dims is None else dims, dropout=dropout, activation=activation)

    def _padded(self, history: Tensor, target: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        """The inference of ``forward`` with no shape that depends on values, on padded rows too."""
        B, L, D = history.shape
        t = target[:, None].expand(B, L, D)
        score = self.attention(torch.cat([t, history, t - history, t * history], -1).reshape(B * L, 4 * D))
        score = score.reshape(B, L, 1)
        if lengths is not None:
            mask = torch.arange(L, device=history.device) < lengths[:, None]
        valid = None if mask is None else mask[..., None]
        if self.use_softmax:
            score = (score if valid is None else score.masked_fill(~valid, -torch.inf)).softmax(1)
        if valid is not None:
            score = torch.where(valid, score, 0.0)
        return (score * history).sum(1)

    def forward(
        self,
        history: Tensor,
        target: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """history [B, L, D] or, with ``offsets`` [B + 1], [N, D]; target [B, D] -> [B, D].

        ``lengths`` [B] says how many rows of each sample are valid, ``mask`` [B, L] which. See
        ``rankkernels.din_attention`` for dtypes and errors.
        """
        if target.size(-1) != self.emb_dim:
            raise ValueError(f"ActivationUnit: target must be [B, {self.emb_dim}], got {list(target.shape)}")
        history, offsets = jagged(history, offsets)
        fused = _fused(self.attention)
        if fused is None:
            _check(Inputs(history, target, lengths, mask, offsets, [], []))
            if offsets is None and is_exporting_to_onnx():
                return self._padded(history, target, lengths, mask)
            rows, sample, _ = reference.valid_rows(history, lengths, mask, offsets)
            score = _score(self.attention, rows, target, sample).squeeze(1)
            return reference.attention_pool(score, rows, sample, target.size(0), self.use_softmax)
        # Drawn from torch's generator, which torch.manual_seed and checkpointing govern.
        seed = torch.randint(2**63 - 1, (), device=history.device) if fused.dropout else None
        out, batch_stats = ops.din_attention(
            history,
            target,
            fused.params,
            [] if fused.training else [t for n in fused.norms for t in (n.running_mean, n.running_var)],
            lengths=lengths,
            mask=mask,
            offsets=offsets,
            activation=fused.activation,
            batch_norm=bool(fused.norms),
            use_softmax=self.use_softmax,
            training=fused.training,
            norm_eps=fused.norm_eps,
            dice_eps=fused.dice_eps,
            dropout=fused.dropout,
            seed=seed,
        )
        if fused.training:
            update_running_stats(fused.norms, batch_stats)
        return out
