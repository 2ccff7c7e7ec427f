"""A training step of DIN on TorchRec's tables: ``rankkernels.torchrec.DINArch`` beside torch-rechub's layers.

build/torchrec/bin/python -m bench.torchrec_step     in the venv that `make test-all` makes

The same tables, histories of full length, weights and losses; the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_rechub.basic.layers import MLP as RechubMLP
from torch_rechub.models.ranking.din import ActivationUnit as RechubUnit
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from rankkernels.torchrec import DINArch

WIDTHS, ROWS = [80, 40], 100_000


class RechubArch(nn.Module):
    """DIN's dense part from torch-rechub's layers, on padded histories."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.length = length
        self.attention_layers = nn.ModuleList([RechubUnit(dim, dims=WIDTHS, activation="dice", use_softmax=False)])
        self.mlp = RechubMLP(2 * dim, activation="dice", dims=[256, 128])

    def forward(self, sequences: dict[str, JaggedTensor]) -> Tensor:
        target, history = sequences["item"].values(), sequences["history"]
        padded = torch.ops.fbgemm.jagged_to_padded_dense(history.values(), [history.offsets()], [self.length], 0.0)
        pooled = self.attention_layers[0](padded, target)
        return torch.sigmoid(self.mlp(torch.cat([pooled, target], 1)).squeeze(1))


def stepper(arch: nn.Module, jagged: KeyedJaggedTensor, label: Tensor, dim: int) -> Callable[[], float]:
    torch.manual_seed(0)
    tables = EmbeddingCollection(
        tables=[EmbeddingConfig(name="item", embedding_dim=dim, num_embeddings=ROWS, feature_names=["history", "item"])]
    )
    optimizer = torch.optim.SGD([*arch.parameters(), *tables.parameters()], lr=0.1)

    def step() -> float:
        loss = nn.functional.binary_cross_entropy(arch(tables(jagged)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1024), ("length", 100), ("dim", 64), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    s = parser.parse_args(argv)
    torch.set_num_threads(s.threads)
    theirs = RechubArch(s.dim, s.length)
    ours = DINArch(s.dim, ["history"], ["item"], {"dims": [256, 128]}, {"dims": WIDTHS, "activation": "dice"})
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([s.length] * s.batch + [1] * s.batch)
    jagged = KeyedJaggedTensor.from_lengths_sync(
        ["history", "item"], torch.randint(ROWS, (int(lengths.sum()),)), lengths
    )
    label = torch.randint(2, (s.batch,)).float()
    steps = [stepper(arch, jagged, label, s.dim) for arch in (theirs, ours)]
    for _ in range(2):
        torch.testing.assert_close(*(torch.tensor(step()) for step in steps), rtol=1e-4, atol=1e-5)
    seconds: list[list[float]] = [[], []]
    for _ in range(s.rounds):
        for step, taken in zip(steps, seconds):
            begin = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begin)
    ratio = statistics.median(a / b for a, b in zip(*seconds))
    print(f"B {s.batch}, L {s.length}, D {s.dim}, attention {WIDTHS}, {s.threads} threads: torch-rechub's layers "
          f"{1e3 * statistics.median(seconds[0]):.1f} ms, ours {1e3 * statistics.median(seconds[1]):.1f} ms, ratio "
          f"{ratio:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
