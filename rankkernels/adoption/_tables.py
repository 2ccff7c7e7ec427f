"""What dense gradients of a model's tables cost, and what an optimizer of the rows looked up would move instead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

#: The samples of the batch that a report counts with.
SAMPLES = 4096


@dataclass(frozen=True)
class Table:
    """A table that gets dense gradients, and the bytes that Adam moves of it, by count.

    Attributes:
        path: the name of the parameter.
        rows, width: its shape.
        value_bytes: of one value.
        can_be_fused: whether its layer is one of those that ``optim.fuse`` takes, or is given such a class by
            ``accelerate``.
    """

    path: str
    rows: int
    width: int
    value_bytes: int
    can_be_fused: bool

    @property
    def bytes(self) -> int:
        return self.rows * self.width * self.value_bytes

    @property
    def dense_bytes(self) -> int:
        """Of a step of dense Adam in one pass, which is the least: the gradient is written and read, weights and both
        moments are read and written, whatever the batch."""
        return 8 * self.bytes

    @property
    def exact_bytes_a_row(self) -> int:
        """Of each row that a batch looks up, with ``Adam(exact=True)``: weights, both moments and the number of the
        row's last step are read by the lookup, and read and written by the step. The state has 32 bits or more."""
        return self.width * 3 * (self.value_bytes + 2 * max(4, self.value_bytes)) + 3 * 4


def tables_of(model: nn.Module, fusable: Collection[nn.Module]) -> list[Table]:
    """The tables of ``model`` with dense gradients; ``fusable`` are its layers that ``optim.fuse`` takes."""
    stepped = {
        id(p) for m in model.modules() if getattr(m, "fused_optimizer", None) is not None for p in m.parameters()
    }
    served = {id(p) for layer in fusable for p in layer.parameters()}
    found: dict[int, Table] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.sparse:
            continue
        for name, p in module.named_parameters(path, recurse=False):
            if p.requires_grad and p.dim() == 2 and id(p) not in stepped:
                found.setdefault(id(p), Table(name, *p.shape, p.element_size(), id(p) in served))
    return list(found.values())


def _size(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"


def said_of(tables: Sequence[Table]) -> list[str]:
    """The lines of a report."""
    if not tables:
        return []
    rows, served = sum(t.rows for t in tables), [t for t in tables if t.can_be_fused]
    lines = [
        f"{len(tables)} tables get dense gradients: {rows:,} rows, {_size(sum(t.bytes for t in tables))}. A step of "
        f"Adam moves all of them, {_size(sum(t.dense_bytes for t in tables))} in one pass (torch.optim.Adam(..., "
        "fused=True)), by default in several."
    ]
    if served:
        dense, a_sample = (sum(values) for values in zip(*((t.dense_bytes, t.exact_bytes_a_row) for t in served)))
        which = "the tables" if len(served) == len(tables) else f"{len(served)} of the tables"
        lines += [
            f"The same numbers from the rows looked up: optimizer = rankkernels.optim.Adam(parameters of {which}, "
            "exact=True), then, with the model accelerated, rankkernels.optim.fuse(model, optimizer).",
            f"{SAMPLES:,} samples with an id a table look up {SAMPLES * len(served):,} rows: "
            f"{_size(a_sample * SAMPLES)} in place of {_size(dense)}; {dense // a_sample:,} samples move as much. "
            "What it is worth, and that no coupled weight decay goes with it: docs/large_tables.md.",
        ]
    return lines
