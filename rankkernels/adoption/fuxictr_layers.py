"""FuxiCTR's layers without tables, their classes as bases."""

from __future__ import annotations

import torch
from fuxictr.pytorch import layers
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._transparency import is_plain
from rankkernels.nn.attention import FusedMLP, HiddenLayer, first_layer, fused_mlp
from rankkernels.nn.layers import BatchNormDice, run_layers
from rankkernels.nn.target_attention import TargetHeads
from rankkernels.ops._tracing import is_tensor, is_traced


class InnerProductInteraction(layers.InnerProductInteraction):
    """``product_sum`` and ``bi_interaction`` as one op (``rankkernels.fm_interaction``)."""

    def forward(self, feature_emb: Tensor) -> Tensor:
        if not is_tensor(feature_emb) or feature_emb.dim() != 3 or not feature_emb.is_floating_point():
            return super().forward(feature_emb)
        return ops.fm_interaction(feature_emb, self._output_type == "product_sum")


class Dice(BatchNormDice, layers.Dice):
    """The normalization and what follows it as one op (``rankkernels.norm_activation``)."""

    def forward(self, X: Tensor) -> Tensor:
        if not (is_tensor(X) and X.dim() == 2 and self.is_served()):
            return super().forward(X)
        # Under autocast FuxiCTR's is of alpha's dtype.
        return self.of_rows(X).to(torch.promote_types(X.dtype, self.alpha.dtype))


class MLP_Block(layers.MLP_Block):
    """Normalizations and activations as one op each, linear layers by the faster library."""

    def forward(self, inputs: Tensor) -> Tensor:
        return run_layers(self.mlp, inputs) if is_plain(self.mlp, nn.Sequential) else super().forward(inputs)


class DIN_Attention(layers.DIN_Attention):
    """The attention as one op (``rankkernels.din_attention``), or the scores as one (before an output activation, or a
    mask that scales them), or where the op lacks something (dropout's numbers, layers that differ, a kernel for the
    device) the attention MLP without its concatenated input."""

    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        target, history, modules = target_item, history_sequence, self._modules_of_mlp()
        if not modules or not _are_rows(target, history, mask):
            return super().forward(target, history, mask)
        fused, behind = _fused(modules)
        if fused is None or fused.dropout:
            return self._pooled(self._scores(modules, target, history), history, mask)
        counts = {"use_softmax": self.use_softmax, "count_padding": mask is not None}
        if behind is None and _is_binary(mask) and fused.has_kernel(history, **counts):
            valid = None if mask is None else mask != 0
            return fused.attend(history, target, mask=valid, **counts)
        if not fused.has_kernel(history, return_scores=True):
            return self._pooled(self._scores(modules, target, history), history, mask)
        score = fused.attend(history, target, return_scores=True)
        if behind is not None:
            score = behind(score.reshape(-1, 1)).view(score.shape)  # of a column, as there
        return self._pooled(score, history, mask)

    def _modules_of_mlp(self) -> list[nn.Module]:
        """The attention MLP's modules, if nobody could tell that they are called without it, and its first layer not at
        all; else none."""
        block = self.attention_layer
        if type(block) not in (MLP_Block, layers.MLP_Block) or not is_plain(block, type(block)):
            return []
        modules = list(block.mlp) if is_plain(block.mlp, nn.Sequential) else []
        return modules if modules and is_plain(modules[0], nn.Linear) else []

    @staticmethod
    def _scores(modules: list[nn.Module], target: Tensor, history: Tensor) -> Tensor:
        """The scores [B, L], module by module; nothing is concatenated."""
        first, *rest = modules
        x = first_layer(first, history, target, lambda of_sample: of_sample[:, None])
        return run_layers(rest, x.flatten(0, 1)).view(history.shape[:2])

    def _pooled(self, score: Tensor, history: Tensor, mask: Tensor | None) -> Tensor:
        """The end of FuxiCTR's forward."""
        if mask is not None:
            score = score * mask.float()
        if self.use_softmax:
            if mask is not None:
                score = score + -1.0e9 * (1 - mask.float())
            score = score.softmax(dim=-1)
        if score.dtype != history.dtype or torch.is_autocast_enabled(history.device.type):
            return (score.unsqueeze(-1) * history).sum(dim=1)
        return torch.bmm(score[:, None], history).squeeze(1)


class MultiHeadTargetAttention(TargetHeads, layers.MultiHeadTargetAttention):
    """The rows of the history as keys and values both (``rankkernels.target_attention``), which theirs projects."""

    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        if not _are_rows(target_item, history_sequence, mask) or not self.is_served():
            return super().forward(target_item, history_sequence, mask)
        return self.of_rows(target_item, history_sequence, mask=None if mask is None else mask.float() != 0)


def _are_rows(target: Tensor, history: Tensor, mask: Tensor | None) -> bool:
    """Whether these are plain tensors [B, D], [B, L, D] and [B, L]."""
    return (
        is_tensor(target)
        and is_tensor(history)
        and target.dim() == 2
        and history.dim() == 3
        and target.dtype == history.dtype
        and (mask is None or (is_tensor(mask) and mask.shape == history.shape[:2]))
    )


def _is_binary(mask: Tensor | None) -> bool:
    """Whether ``mask`` has ones and zeros only, as FuxiCTR says it should: other numbers scale scores. No where reading
    the values would synchronize or break a graph."""
    if mask is None or mask.dtype == torch.bool:
        return True
    return mask.is_cpu and not is_traced() and bool(((mask == 0) | (mask == 1)).all())


def _fused(modules: list[nn.Module]) -> tuple[FusedMLP | None, nn.Module | None]:
    """The attention MLP for the op, None if it has other layers, and the output activation behind it, if any."""
    *starts, last = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)]
    parts = [_hidden_layer(modules[begin:end]) for begin, end in zip(starts, [*starts[1:], last])]
    behind = modules[last + 1 :]
    if None in parts or len(behind) > 1:
        return None, None
    return fused_mlp(parts, modules[last]), behind[0] if behind else None


def _hidden_layer(modules: list[nn.Module]) -> HiddenLayer | None:
    """A linear layer and what is behind it: a normalization, an activation and a dropout, each or none."""
    linear, *rest = modules
    norm = rest.pop(0) if rest and isinstance(rest[0], nn.BatchNorm1d) else None
    dropout = rest.pop() if rest and isinstance(rest[-1], nn.Dropout) else None
    return HiddenLayer(linear, norm, rest[0] if rest else None, dropout) if len(rest) < 2 else None
