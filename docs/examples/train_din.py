"""Trains DIN on made-up clicks with a fused table optimizer, saves it, loads it and scores candidates for one user.

python docs/examples/train_din.py --steps 200
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from rankkernels import DIN, SequenceFeature, SparseFeature, optim

USERS, ITEMS, LENGTH = 500, 1000, 20


def build() -> DIN:
    item = SparseFeature("item", ITEMS, 16, padding_idx=0)
    clicks = SequenceFeature("clicks", ITEMS, 16, pooling="concat", shared_with="item", padding_idx=0)
    user = SparseFeature("user", USERS, 16)
    return DIN([user], [clicks], [item], {"dims": [64, 32]}, {"dims": [36]}, mask_padding=True)


def clicks_of(batch_size: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Users like items of the parity of their last click."""
    item = torch.randint(1, ITEMS, (batch_size,), generator=generator)
    clicks = torch.randint(1, ITEMS, (batch_size, LENGTH), generator=generator)
    length = torch.randint(1, LENGTH + 1, (batch_size, 1), generator=generator)
    clicks = 2 * (clicks // 2) + clicks[:, :1] % 2  # one parity a user
    clicks = clicks.clamp(1, ITEMS - 1).masked_fill(torch.arange(LENGTH) >= length, 0)
    user = torch.randint(0, USERS, (batch_size,), generator=generator)
    return {"user": user, "item": item, "clicks": clicks}, (item % 2 == clicks[:, 0] % 2).float()


def train(model: DIN, steps: int, generator: torch.Generator) -> list[float]:
    tables = optim.Adam(model.embedding.parameters(), lr=3e-2)
    optim.fuse(model, tables)
    rest = torch.optim.Adam([p for n, p in model.named_parameters() if not n.startswith("embedding.")], lr=5e-3)
    losses = []
    for _ in range(steps):
        batch, label = clicks_of(512, generator)
        rest.zero_grad()
        loss = F.binary_cross_entropy(model(batch), label)
        loss.backward()  # the tables have stepped
        rest.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = build()
    losses = train(model, steps, torch.Generator().manual_seed(0))
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {steps} steps")

    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "din.pt")
        served = build().eval()
        served.load_state_dict(torch.load(Path(folder) / "din.pt"))

    candidates = torch.arange(1, 101)
    history = torch.tensor([3, 7, 11] + [0] * (LENGTH - 3))  # odd items, padded
    request = {
        "user": torch.full((100,), 42),
        "item": candidates,
        "clicks": history.expand(100, LENGTH),
    }
    with torch.inference_mode():
        best = candidates[served(request).topk(10).indices]
    print(f"best of 100 candidates: {best.tolist()}")


if __name__ == "__main__":
    main()
