"""FM, LR, Dice and MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankkernels import ops, reference


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
        return reference.dice(x, self.alpha, self.epsilon)


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


class MLP(nn.Module):
    """Hidden layers of Linear, BatchNorm1d, activation and Dropout, then Linear(., 1) if ``output_layer``.

    torch-rechub's ``MLP``: x [N, input_dim] -> [N, 1] or [N, dims[-1]], all modules in ``mlp``.

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
        for width in dims or ():
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
        return self.mlp(x)
