"""DIN's activation unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops, reference
from rankkernels.nn._tables import raise_unscriptable
from rankkernels.nn._transparency import is_plain, is_untouched, nobody_follows
from rankkernels.nn.batch_norm import group_name_of, is_served, update_running_stats
from rankkernels.nn.layers import MLP, BatchNormDice, activation_of, run_layers
from rankkernels.ops._attention_checks import check_history, check_positions_at_hand
from rankkernels.ops._checks import check_strided
from rankkernels.ops._jagged import jagged
from rankkernels.ops._tracing import is_exporting, is_tensor
from rankkernels.ops.attention_params import Inputs
from rankkernels.ops.din_attention import has_joint_kernel, has_kernel


class HiddenLayer(NamedTuple):
    """The modules of a hidden layer, None for those that it has not."""

    linear: nn.Module
    norm: nn.Module | None
    activation: nn.Module | None
    dropout: nn.Module | None


class FusedMLP(NamedTuple):
    """An attention MLP as ``rankkernels.din_attention`` takes it. ``norms`` are those whose running statistics training
    updates, a layer's own before its Dice's; ``batch_norm``: whether the layers have their own. ``group``: the name
    of that whose rows give their statistics, none for those of this process."""

    params: list[Tensor]
    norms: list[nn.Module]
    activation: str
    batch_norm: bool
    training: bool
    norm_eps: float
    dice_eps: float
    dropout: float
    group: str

    def attend(self, history: Tensor, target: Tensor, **options) -> Tensor:
        """The op with these modules and its ``options`` (lengths, mask, offsets, history_index, use_softmax,
        count_padding, return_scores), as if they had been called: seeds are drawn and running statistics updated."""
        # Drawn from torch's generator, which torch.manual_seed and checkpointing govern.
        seed = torch.randint(2**63 - 1, (), device=history.device) if self.dropout else None
        out, batch_stats = ops.din_attention(
            history,
            target,
            self.params,
            [n._buffers[name] for n in self.norms for name in ("running_mean", "running_var")],
            activation=self.activation,
            batch_norm=self.batch_norm,
            training=self.training,
            norm_eps=self.norm_eps,
            dice_eps=self.dice_eps,
            dropout=self.dropout,
            seed=seed,
            group=self.group,
            **options,
        )
        if self.training:
            update_running_stats(self.norms, batch_stats)
        return out

    def has_kernel(
        self, history: Tensor, *, use_softmax: bool = False, count_padding: bool = False, return_scores: bool = False
    ) -> bool:
        """Whether ``attend`` with these options runs in a kernel on the history's device."""
        return has_kernel(history, self.training, use_softmax, count_padding, return_scores)


def fused_mlp(hidden: Iterable[HiddenLayer], last: nn.Module) -> FusedMLP | None:
    """These modules, called one after the other, for the op; None where a module is none that it knows, was replaced,
    wrapped or re-configured since or may see its call, norms, activations or dropouts differ among themselves, or norms
    take statistics of other processes' rows where no kernel does."""
    output = _served_linear(last)
    if output is None or not nobody_follows():
        return None
    params, norms, kinds = [], [], set()
    for linear, norm, activation, dropout in hidden:
        affine = _served_linear(linear)
        if affine is None or not (dropout is None or is_untouched(dropout, nn.Dropout)):
            return None
        params += affine
        if norm is not None:
            if not is_served(norm) or norm._parameters["weight"] is None:
                return None
            params += norm._parameters["weight"], norm._parameters["bias"]
            norms.append(norm)
        if isinstance(activation, BatchNormDice):
            if not (is_untouched(activation, type(activation)) and activation.is_served()):
                return None
            name, learnt, dice_eps = "dice_batch_norm", activation.learnt(), activation.bn.eps
            norms.append(activation.bn)
        else:
            name, learnt, dice_eps = ("linear", [], 0.0) if activation is None else activation_of(activation)
        if not name:
            return None
        params += learnt
        p = dropout.p if dropout is not None and dropout.training else 0.0
        kinds.add((name, norm is not None, 0.0 if norm is None else norm.eps, dice_eps, p))
    trainings, groups = {norm.training for norm in norms}, set(map(group_name_of, norms))
    if len(kinds) > 1 or len(trainings) > 1 or len(groups) > 1:
        return None
    group = groups.pop() if groups else ""
    if group and not has_joint_kernel(output[0]):
        return None
    name, batch_norm, norm_eps, dice_eps, p = kinds.pop() if kinds else ("linear", False, 0.0, 0.0, 0.0)
    params += output
    return FusedMLP(params, norms, name, batch_norm, True in trainings, norm_eps, dice_eps, p, group)


def _served_linear(linear: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a layer that the op may stand for (given ``nobody_follows``), zeros where it has no bias."""
    if not is_untouched(linear, nn.Linear):
        return None
    parameters = linear._parameters  # ten times as fast as attributes
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not is_tensor(weight) or "bias" not in parameters or not (bias is None or is_tensor(bias)):
        return None
    return weight, weight.new_zeros(weight.shape[:1]) if bias is None else bias


def _fused(attention: nn.Module) -> FusedMLP | None:
    """``attention`` for the op, if it is the ``MLP`` that was built."""
    if not (is_untouched(attention, MLP) and is_untouched(attention.mlp, nn.Sequential)):
        return None
    *hidden, last = attention.mlp._modules.values()
    layers = [hidden[i : i + 4] for i in range(0, len(hidden) - 3, 4)]
    return None if len(hidden) % 4 else fused_mlp(layers, last)


def first_layer(linear: nn.Linear, history: Tensor, target: Tensor, to_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """``linear`` of [t, h, t - h, t h] for every row h of ``history`` and its sample's target t [B, D], without
    concatenating. ``to_rows`` gives each row what its sample has, [B, n] -> as ``history``.

    W_t t + W_h h + W_d (t - h) + W_p (t h) + b = (W_h - W_d) h + W_p (t h) + [(W_t + W_d) t + b]
    """
    w_target, w_history, w_difference, w_product = linear.weight.chunk(4, dim=1)
    of_target = to_rows(F.linear(target, w_target + w_difference, linear.bias))
    return F.linear(history, w_history - w_difference) + F.linear(history * to_rows(target), w_product) + of_target


def _score(attention: nn.Module, rows: Tensor, target: Tensor, sample: Tensor) -> Tensor:
    """``attention`` of [t, h, t - h, t h] for every row h [N, D] and its sample's target t [B, D], layer by layer, and
    where nobody could tell without concatenating."""
    modules = attention.mlp if is_plain(attention, MLP) and is_plain(attention.mlp, nn.Sequential) else ()
    first, *rest = modules or (None,)
    if not is_plain(first, nn.Linear):
        return attention(reference.attention_input(rows, target, sample))
    return run_layers(rest, first_layer(first, rows, target, lambda x: x[sample]))


def _check(inputs: Inputs) -> None:
    """What the op would refuse, where it is not called. A tracer's sizes are tensors, which say nothing."""
    if not torch.jit.is_tracing():
        check_strided("ActivationUnit", inputs.tensors())
        check_history("ActivationUnit", inputs)
        check_positions_at_hand("ActivationUnit", inputs)


class ActivationUnit(nn.Module):
    """DIN's local activation unit: a history of embeddings, pooled with weights that depend on the target.

    torch-rechub's ``ActivationUnit``. It knows no padding, and by default neither does this: padded rows count like
    any other, in the softmax and in the batch statistics too. With ``lengths``, ``mask``, ``offsets`` or a nested
    ``history`` only the valid rows do.

    The attention MLP runs fused (``rankkernels.din_attention``). Where a layer was replaced or has a hook, or for an
    activation that the op lacks, the modules are called one after the other; a first layer that nobody changed is still
    spared the concatenation. In training with synchronized normalizations, whose sums go over the network between two
    passes, it is fused on a CPU; on a GPU products are a library's, and each normalization one op with its activation.

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

    def __prepare_scriptable__(self):
        raise_unscriptable(self)

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
        history_index: Tensor | None = None,
    ) -> Tensor:
        """history [B, L, D] or, with ``offsets`` [B + 1], [N, D]; target [B, D] -> [B, D].

        ``lengths`` [B] says how many rows of each sample are valid, ``mask`` [B, L] which. With ``history_index`` [B]
        the histories (and lengths, mask, offsets) are those of U users, and sample b has that of user
        ``history_index[b]``. See ``rankkernels.din_attention`` for dtypes and errors.
        """
        if target.size(-1) != self.emb_dim:
            raise ValueError(f"ActivationUnit: target must be [B, {self.emb_dim}], got {list(target.shape)}")
        history, offsets = jagged(history, offsets)
        fused = _fused(self.attention)
        if fused is None:
            _check(Inputs(history, target, lengths, mask, offsets, history_index, [], []))
            if history_index is not None:
                rows = reference.expand_histories(history, history_index, lengths, mask, offsets)
                history, lengths, mask, offsets = rows
            if offsets is None and is_exporting():
                return self._padded(history, target, lengths, mask)
            rows, sample, _ = reference.valid_rows(history, lengths, mask, offsets)
            score = _score(self.attention, rows, target, sample).squeeze(1)
            return reference.attention_pool(score, rows, sample, target.size(0), self.use_softmax)
        return fused.attend(
            history,
            target,
            lengths=lengths,
            mask=mask,
            offsets=offsets,
            history_index=history_index,
            use_softmax=self.use_softmax,
        )
