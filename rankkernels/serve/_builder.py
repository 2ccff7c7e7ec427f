"""Collects what a frozen model does: inputs, tables, weights, and the plan over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankkernels.ops import _exact_table
from rankkernels.ops._features import MODES, UNKNOWN
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops._rank_plan import Dense, Layer, Lookup, Plan, Table, Unit, pack, padded, quantize
from rankkernels.serve._layers import Network, NotServed, plain

#: Bits of a table's values, by the name that ``freeze`` has for them.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


class Builder:
    def __init__(self, tables: str):
        if tables not in BITS:
            raise ValueError(f"freeze: tables must be one of {', '.join(BITS)}, got {tables!r}")
        self.bits = BITS[tables]
        self.inputs: dict[str, str] = {}  # name -> ids, sequence, history or numbers
        self.stored: list[Tensor] = []
        self.sources: list[Tensor] = []  # of what is stored
        self.tables: list[Table] = []
        self.lookups: list[Lookup] = []
        self.dense: list[Dense] = []
        self.units: list[Unit] = []
        self.layers: tuple[Layer, ...] = ()
        self.width = self.fm_width = 0
        self._floats: list[Tensor] = []
        self._size = 0
        self._table_of: dict[int, int] = {}

    def input(self, name: str, kind: str) -> int:
        """The number of the input ``name``, which is of one kind wherever it is used."""
        if self.inputs.setdefault(name, kind) != kind:
            raise NotServed(f"freeze: {name!r} is used as {self.inputs[name]} and as {kind}")
        return list(self.inputs).index(name)

    def floats(self, values: Tensor | float) -> int:
        """Where these values begin among the weights."""
        values = torch.as_tensor(values).detach().cpu().to(torch.float32).flatten()
        self._floats.append(values)
        self._size += len(values)
        return self._size - len(values)

    def table(self, module: nn.Module, path: str) -> int:
        """The number of the table of an ``nn.Embedding``; the same one is stored once."""
        plain(module, path)
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise NotServed(f"freeze: {path} must be a plain nn.Embedding, got {module!r}")
        if id(module) not in self._table_of:
            if _exact_table.in_use:
                _exact_table.flush_tables([module.weight])
            stored = quantize(module.weight, self.bits)
            use_huge_pages(stored)
            self.stored.append(stored)
            self.sources.append(module.weight.detach())
            self.tables.append(Table(self.bits, module.embedding_dim))
            self._table_of[id(module)] = len(self.tables) - 1
        return self._table_of[id(module)]

    def lookup(
        self, name: str, kind: str, table: int, mode: str = "none", padding_idx: int | None = None, oov: str = "error",
        known: int = 0, column: int = -1, weight: int = -1, fm: bool = False,
    ) -> int:  # fmt: skip
        """The number of a lookup of the feature ``name``; ``padding_idx`` is left out where it is pooled or masked."""
        if padding_idx is not None and padding_idx < 0:
            raise NotServed(f"freeze: feature {name!r} has the negative padding_idx {padding_idx}")
        if fm:
            self._check_field(name, self.tables[table].width)
        hidden = -1 if padding_idx is None else padding_idx
        self.lookups.append(
            Lookup(
                self.input(name, kind), table, MODES.index(mode), hidden, UNKNOWN.index(oov), known,
                hidden if oov == "hash" else -1, column, weight, fm, kind == "history",
            )
        )  # fmt: skip
        return len(self.lookups) - 1

    def numbers(
        self, name: str, width: int, column: int = -1, weight: int = -1, field: Tensor | None = None
    ) -> None:  # fmt: skip
        """``field`` [D]: what one number is multiplied with to be a field of the FM."""
        if field is not None:
            self._check_field(name, len(field))
        place = -1 if field is None else self.floats(field)
        self.dense.append(Dense(self.input(name, "numbers"), width, column, weight, place))

    def _check_field(self, name: str, width: int) -> None:
        if self.fm_width not in (0, width):
            raise NotServed(
                f"freeze: the FM's fields must have one width, {name!r} has {width} and not {self.fm_width}"
            )
        self.fm_width = width

    def columns(self, width: int) -> int:
        """The first of so many more inputs of the MLP."""
        self.width += width
        return self.width - width

    def _layers(self, network: Network, first_bias: Tensor | None = None) -> tuple[Layer, ...]:
        """``first_bias``: of an attention, whose first weight is stored otherwise."""
        layers, none = [], -1
        for i, h in enumerate(network.hidden):
            units, inputs = h.weight.shape
            own = i == 0 and first_bias is not None
            bias = first_bias if own else h.bias.new_zeros(-(-units // 4) * 4)
            if not own:
                bias[:units] = h.bias
            last = i + 1 == len(network.hidden)
            layers.append(
                Layer(
                    inputs // 4 if own else inputs, units,
                    none if own else self.floats(pack(h.weight)), self.floats(bias), h.activation,
                    *(none if v is None else self.floats(v) for v in (h.alpha, h.v_scale, h.v_shift)),
                    self.floats(h.epsilon * units),
                    self.floats(network.out_weight) if last else none,
                    self.floats(network.out_bias if last else 0.0),
                )
            )  # fmt: skip
        return tuple(layers)

    def mlp(self, network: Network) -> None:
        if network.hidden[0].weight.size(1) != self.width:
            raise NotServed(f"freeze: the MLP takes {network.hidden[0].weight.size(1)} inputs, found {self.width}")
        self.layers = self._layers(network)

    def attention(
        self, network: Network, histories: Sequence[int], targets: Sequence[int], column: int, *, masked: bool = False,
        length: int = -1, use_softmax: bool = False, count_padding: bool = False,
    ) -> None:  # fmt: skip
        """An attention MLP of [t, h, t - h, t h] and where its result goes."""
        first = network.hidden[0]
        of_target, of_history, of_difference, of_product = first.weight.chunk(4, 1)
        units = len(first.weight)
        bias = first.bias.new_zeros(padded(units))
        bias[:units] = first.bias
        history = first.weight.new_zeros(of_history.size(1), padded(units))
        history[:, :units] = (of_history - of_difference).t()
        layers = self._layers(network, bias)
        self.units.append(
            Unit(
                tuple(histories), tuple(targets), column, length, masked, use_softmax, count_padding, layers,
                self.floats(history), self.floats(pack(of_target + of_difference, 4)),
                self.floats(pack(of_product, 4)),
            )
        )  # fmt: skip

    def plan(self, constant: float, sigmoid: bool) -> tuple[Plan, Tensor]:
        """The plan and all weights."""
        plan = Plan(
            len(self.inputs), self.width, self.fm_width, sigmoid, self.floats(constant), tuple(self.tables),
            tuple(self.lookups), tuple(self.dense), tuple(self.units), self.layers,
        )  # fmt: skip
        return plan, torch.cat(self._floats)
