"""The arguments of DIN's attention: the parts of its schema, and the list of its MLP's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS, NAMES
from rankkernels.ops._checks import wide


class Inputs(NamedTuple):
    """The tensors of the schema.

    ``params``: for each hidden layer its weight [H, in] and bias [H]; with ``batch_norm`` the norm's weight and bias
    [H]; what the activation learns (ACTIVATIONS); and at the end the output layer's weight [1, H] and bias [1].
    ``running_stats``: the running mean and variance [H] of every normalization, in the order the layers meet them; a
    layer's own comes before its Dice's. Of no normalization it may hold an empty tensor.
    ``history_index``: which history each sample has, [B], where histories are those of U users; without it history b
    is sample b's.
    """

    history: Tensor
    target: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    offsets: Tensor | None
    history_index: Tensor | None
    params: list[Tensor]
    running_stats: list[Tensor]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, one by one."""
        history, target, lengths, mask, offsets, history_index, params, running_stats = self
        return history, target, lengths, mask, offsets, history_index, *params, *running_stats


class Flags(NamedTuple):
    """The rest of the schema, behind the tensors.

    ``activation``: its number in ``_activations``. ``count_padding``: whether padding has a part in batch statistics,
    and in the softmax of a sample that has nothing else. ``return_scores``: whether the result is the scores, not the
    pooled rows. ``dropout``: the probability of dropping a unit behind each hidden layer's activation. ``seed``: an
    int64 scalar that chooses which (``reference.dropout_factor``), drawn by the caller, so that the same call gives the
    same bits and the backward draws the same units again. ``group``: the name of the process group whose rows give the
    statistics of training, none for those of this process.
    """

    activation: int
    batch_norm: bool
    use_softmax: bool
    count_padding: bool
    return_scores: bool
    training: bool
    norm_eps: float
    dice_eps: float
    dropout: float
    seed: Tensor | None
    group: str = ""

    @property
    def name(self) -> str:
        return NAMES[self.activation]


#: Of history rows and of hidden layers: the widest that a GPU's kernels have.
MAX_WIDTH = 128
#: What a GPU's kernels take of a layer beside its weight, [.., H] in float32: the slope of prelu and of Dice; a Dice's
#: normalization v = v_scale x + v_shift; its bias; the output layer's weight; and with normalizations in training,
#: where x is normalized, y = y_scale x + y_shift, 1 / sqrt(variance + eps), the variance and the number of rows.
VECTORS = ("alpha", "v_scale", "v_shift", "bias", "out_weight", "y_scale", "y_shift", "r", "var", "count")


def block_of(width: int) -> int:
    """The power of two from 32 to MAX_WIDTH that holds ``width``: what the kernels pad it to."""
    return 32 if width <= 32 else 64 if width <= 64 else 128


def folded_size(D: int, widths: Sequence[int]) -> int:
    """The values of the layers as a GPU's kernels take them, 0 where none serves such widths: of the first three
    weights, since [t, h, t - h, t * h] takes three, of the second one, and each one's VECTORS."""
    if not 1 <= len(widths) <= 2 or max(D, *widths) > MAX_WIDTH:
        return 0
    size, width = 0, 3 * block_of(D)
    for H in widths:
        size, width = size + block_of(H) * (width + len(VECTORS)), block_of(H)
    return size


def saved_size_on_gpu(B: int, D: int, widths: Sequence[int], rows: int, use_softmax: bool) -> int:
    """The values that a GPU's kernels keep for the backward: the layers as they take them, and a row's score; with a
    softmax also a sample's sum in float32 and its scores' peak and total."""
    return folded_size(D, widths) + rows + (B * (D + 2) if use_softmax else 0)


def has_gpu_kernel(statistics: bool, use_softmax: bool, count_padding: bool, return_scores: bool) -> bool:
    """Whether a GPU's kernels have these options; ``statistics``: the batch's are taken. Not scores alone, nor padding
    where it counts."""
    return not (return_scores or (count_padding and (statistics or use_softmax)))


def params_per_layer(activation: str, batch_norm: bool) -> int:
    return 2 + 2 * batch_norm + ACTIVATIONS[activation]


def norms_per_layer(activation: str, batch_norm: bool) -> int:
    return batch_norm + (activation == "dice_batch_norm")


def hidden_widths(params: Sequence[Tensor], flags: Flags) -> list[int]:
    """The units of each hidden layer."""
    return [p.size(0) for p in params[: -2 : params_per_layer(flags.name, flags.batch_norm)]]


def unflatten_wide(inputs: Inputs, flags: Flags) -> tuple[list[reference.Hidden], Tensor, Tensor]:
    """``unflatten`` of the schema's parameters, in the dtype that the history is accumulated in."""
    params, running_stats = (
        [t.to(wide(inputs.history.dtype)) for t in tensors] for tensors in (inputs.params, inputs.running_stats)
    )
    return unflatten(params, running_stats, flags.name, flags.batch_norm, flags.norm_eps, flags.dice_eps)


def unflatten(
    params: Sequence[Tensor],
    running_stats: Sequence[Tensor],
    activation: str,
    batch_norm: bool,
    norm_eps: float,
    dice_eps: float,
) -> tuple[list[reference.Hidden], Tensor, Tensor]:
    """The flat lists of the schema as the reference's hidden layers, output weight and output bias."""
    *params, out_weight, out_bias = params
    stats, hidden = list(running_stats), []

    def norm(weight: Tensor, bias: Tensor, eps: float) -> reference.BatchNorm:
        mean, var = (stats.pop(0), stats.pop(0)) if len(stats) > 1 else (None, None)
        return reference.BatchNorm(weight, bias, mean, var, eps)

    per_layer = params_per_layer(activation, batch_norm)
    while params:
        layer, params = params[:per_layer], params[per_layer:]
        weight, bias = layer.pop(0), layer.pop(0)
        layer_norm = norm(layer.pop(0), layer.pop(0), norm_eps) if batch_norm else None
        alpha = layer.pop(0) if layer else None
        dice_norm = norm(layer.pop(0), layer.pop(0), dice_eps) if layer else None
        hidden.append(reference.Hidden(weight, bias, layer_norm, activation, alpha, dice_norm, dice_eps))
    return hidden, out_weight, out_bias
