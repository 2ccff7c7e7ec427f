"""FM, LR, Dice and MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops, reference
from rankkernels.nn._transparency import are_plain, is_plain, is_untouched, nobody_follows
from rankkernels.nn.batch_norm import BATCH_NORMS, group_of, is_served, normalized
from rankkernels.ops._tracing import is_tensor, is_traced
from rankkernels.ops.linear import folded, folded_linear, is_faster_folded, is_torchs, linear
from rankkernels.ops.norm_activation import is_faster


class FM(nn.Module):
    """Second-order interactions of field embeddings: x [B, F, D] -> [B, 1], or [B, D] without ``reduce_sum``.

    torch-rechub's ``FM``. No parameters. See ``rankkernels.fm_interaction``.
    """

    def __init__(self, reduce_sum: bool = True):
        super().__init__()
        self.reduce_sum = reduce_sum

    def forward(self, x: Tensor) -> Tensor:
        return ops.fm_interaction(x, self.reduce_sum)


class LR(nn.Module):
    """Logistic regression: x [B, input_dim] -> [B, 1], through a sigmoid if ``sigmoid``. torch-rechub's ``LR``."""

    def __init__(self, input_dim: int, sigmoid: bool = False):
        super().__init__()
        self.sigmoid = sigmoid
        self.fc = nn.Linear(input_dim, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return torch.sigmoid(y) if self.sigmoid else y


class Dice(nn.Module):
    """Dice with the statistics of a row's units, in training and in eval alike: x [N, H] -> [N, H].

    torch-rechub's ``Dice``: p x + (1 - p) alpha x with p = sigmoid((x - mean) / sqrt(sum((x - mean)^2 + epsilon))),
    ``alpha`` [1] drawn from a standard normal.
    """

    def __init__(self, epsilon: float = 1e-3):
        super().__init__()
        self.epsilon = epsilon
        self.alpha = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:  # the statistics are of dimension 1, whatever the others are
            return reference.dice(x, self.alpha, self.epsilon)
        return ops.norm_activation(x, alpha=self.alpha, activation="dice", dice_eps=self.epsilon)[0]


class BatchNormDice(nn.Module):
    """What is common to DeepCTR-Torch's and FuxiCTR's ``Dice``, p x + (1 - p) alpha x with p = sigmoid(bn(x)): a
    ``BatchNorm1d`` named ``bn`` and ``alpha``, [H] or [H, 1]. Their namesakes derive from this and from theirs."""

    def is_served(self) -> bool:
        """Whether the ops do what the modules would, and nobody could tell."""
        alpha = self._parameters.get("alpha")
        return is_served(self.bn) and is_tensor(alpha) and alpha.numel() == self.bn.num_features

    def learnt(self) -> list[Tensor]:
        """alpha, weight and bias [H]: ones and zeros for a normalization that learns nothing."""
        norm = self.bn
        if norm.weight is None:
            return [self.alpha.flatten(), torch.ones_like(norm.running_var), torch.zeros_like(norm.running_var)]
        return [self.alpha.flatten(), norm.weight, norm.bias]

    def of_rows(self, x: Tensor) -> Tensor:
        """x [N, H] -> [N, H] by the op, where ``is_served``, running statistics included."""
        return normalized(self.bn, x, "dice_batch_norm", self.alpha.flatten())


_ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "relu": lambda: nn.ReLU(inplace=True),
    "dice": Dice,
    "prelu": nn.PReLU,
    "softmax": lambda: nn.Softmax(dim=1),
    "leakyrelu": nn.LeakyReLU,
}


def activation_layer(activation: str | type[nn.Module]) -> nn.Module:
    """An activation by torch-rechub's name for it, in any case, or of an ``nn.Module`` class without arguments."""
    if isinstance(activation, str) and activation.lower() in _ACTIVATIONS:
        return _ACTIVATIONS[activation.lower()]()
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation()
    raise ValueError(
        f"MLP: unknown activation {activation!r}, expected one of {', '.join(_ACTIVATIONS)} or an nn.Module class"
    )


def activation_of(module: nn.Module) -> tuple[str, list[Tensor], float]:
    """The ops' name for an activation module, its parameters, and Dice's epsilon; no name where the ops have none or
    where the module's call may be seen."""
    kind = type(module)
    if not is_plain(module, kind):
        return "", [], 0.0
    if kind is Dice:
        return ("dice" if is_tensor(module.alpha) else ""), [module.alpha], module.epsilon
    if kind is nn.PReLU:
        return ("prelu" if is_tensor(module.weight) else ""), [module.weight], 0.0
    if kind is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leakyrelu", [], 0.0
    return {nn.Sigmoid: "sigmoid", nn.ReLU: "relu", nn.Identity: "linear"}.get(kind, ""), [], 0.0


def _fused_activation(norm: nn.Module, activation: nn.Module, x: Tensor) -> tuple[str, Tensor | None, float] | None:
    """What ``normalized`` takes for ``activation(norm(x))``, where the op has both, is the faster one, and nobody could
    tell. Processes that exchange statistics do it in one way, whatever their parts of the batch are."""
    if x.dim() != 2 or not (is_faster(x, "dice" if type(activation) is Dice else "") or group_of(norm)):
        return None
    name, learnt, dice_eps = activation_of(activation)
    return (name, learnt[0] if learnt else None, dice_eps) if name and is_served(norm) else None


def run_layers(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """``modules`` one after the other: a normalization and the activation behind it as one op, a linear layer by the
    faster library, wherever nobody could tell. Without gradients only a layer's input and output are alive: the next
    one's output then lies in the caches still."""
    modules, at, followed = [*modules], 0, is_traced() or not nobody_follows()
    N = 0 if followed or x.dim() != 2 else x.shape[0]
    while at < len(modules):
        module, kind, at = modules[at], type(modules[at]), at + 1
        if kind in BATCH_NORMS and at < len(modules) and type(modules[at]) is not nn.Linear:
            if fused := _fused_activation(module, modules[at], x):
                x, at = normalized(module, x, *fused), at + 1
            else:
                x = module(x)
        elif followed or kind not in (nn.Linear, nn.Dropout) or not is_untouched(module, kind):
            x = module(x)
        elif kind is nn.Dropout:
            p = module.p  # of 0, torch gives its input back, and draws no numbers
            x = x if p == 0 or (not module.training and 0 <= p <= 1) else module(x)
        else:
            weight, bias = _weight_and_bias(module)
            if is_torchs(N, module.in_features, module.out_features):
                x = F.linear(x, weight, bias)
            elif (y := _normalized_linear(weight, bias, modules[at : at + 1], x)) is None:
                x = linear(x, weight, bias)
            else:
                x, at = y, at + 1
    return x


class MLP(nn.Module):
    """Hidden layers of Linear, BatchNorm1d, activation and Dropout, then Linear(., 1) if ``output_layer``.

    torch-rechub's ``MLP``: x [N, input_dim] -> [N, 1] or [N, dims[-1]], all modules in ``mlp``. A normalization and the
    activation behind it run as one op (``rankkernels.norm_activation``).

    Args:
        input_dim: width of the input.
        output_layer: whether to end with a linear layer of one unit.
        dims: widths of the hidden layers.
        dropout: probability of dropping a unit.
        activation: sigmoid, relu, dice, prelu, softmax, leakyrelu, or an ``nn.Module`` class.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        input_dim: int,
        output_layer: bool = True,
        dims: Sequence[int] | None = None,
        dropout: float = 0,
        activation: str | type[nn.Module] = "relu",
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width in () if dims is None else dims:
            layers += [
                nn.Linear(input_dim, width),
                nn.BatchNorm1d(width),
                activation_layer(activation),
                nn.Dropout(p=dropout),
            ]
            input_dim = width
        if output_layer:
            layers.append(nn.Linear(input_dim, 1))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        return run_layers(mlp._modules.values(), x) if is_plain(mlp, nn.Sequential) else mlp(x)

    def relu_layers(self) -> Iterator[Tensor] | None:
        """Weight and bias of each layer with batch norm folded in, for inference; relu between two layers.

        None if ``forward`` does anything else: another activation, no hidden or no output layer, a module that was
        replaced, is in training, or whose call may be seen.
        """
        if not is_plain(self.mlp, nn.Sequential) or not self.mlp:
            return None
        *hidden, last = self.mlp
        layers = [hidden[i : i + 4] for i in range(0, len(hidden), 4)]
        if not layers or len(hidden) % 4 or not is_plain(last, nn.Linear) or last.bias is None:
            return None
        if last.out_features != 1:
            return None
        for module, norm, activation, dropout in layers:
            if not are_plain((module, activation, dropout), (nn.Linear, nn.ReLU, nn.Dropout)) or not is_served(norm):
                return None
            if norm.training or dropout.training:
                return None
        folded_layers = (folded(module.weight, module.bias, _settings(norm)) for module, norm, *_ in layers)
        return chain(chain.from_iterable(folded_layers), (last.weight, last.bias))


def _settings(norm: nn.BatchNorm1d) -> reference.BatchNorm:
    return reference.BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _weight_and_bias(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    own = module._parameters  # ten times as fast as attributes
    return (own["weight"], own["bias"]) if len(own) == 2 else (module.weight, module.bias)


def _normalized_linear(weight: Tensor, bias: Tensor | None, behind: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """A linear layer and the normalization behind it as one product, where that is faster and nobody could tell."""
    if not behind or not is_faster_folded(x, weight, bias) or not is_served(behind[0]) or behind[0].training:
        return None
    return folded_linear(x, weight, bias, _settings(behind[0]))
