"""What a frozen model does, as the integers that the op ``rank`` takes (csrc/cpu/serve/plan.h), and its weights.

Numbers named ``weight``, ``bias`` and so on are places in one vector of float32, -1 for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._features import Known

#: Their numbers in the C++: ``Activation`` of csrc/cpu/dense/params.h.
LEAKY, RELU, SIGMOID, DICE, DICE_BATCH_NORM = range(5)
#: Bytes of a row's scale and bias.
SCALES = 8


class Table(NamedTuple):
    """How a table [R, D] is stored: in float32, bfloat16, or codes of 8 or 4 bits with a row's scale and bias."""

    bits: int
    width: int

    @property
    def stored_width(self) -> int:
        codes = self.bits < 16
        return SCALES + -(-self.width * self.bits // 8) if codes else self.width

    @property
    def dtype(self) -> torch.dtype:
        return {32: torch.float32, 16: torch.bfloat16}.get(self.bits, torch.uint8)


class Lookup(NamedTuple):
    """The rows that an input's ids look up, a part of the MLP's inputs, the FM and the linear term."""

    input: int
    table: int
    mode: int  # of ops._features.MODES: none, sum or mean
    padding_idx: int  # that a bag leaves out, and a masked history; -1: none
    unknown: int
    known: int  # ids from 0 that have rows, where unknown ones are no error
    hash_padding: int  # the row that a hash leaves out; -1: none
    column: int
    weight: int
    fm: bool
    history: bool

    def rows_of(self, ids: Tensor) -> Tensor:
        """ids as they come -> rows of the table; as they are where unknown ones are an error."""
        return Known(self.unknown, self.known, self.hash_padding).rows_of(ids)


class Dense(NamedTuple):
    """Numbers of an input, a part of the MLP's inputs, the linear term and, times a vector, the FM."""

    input: int
    width: int
    column: int
    weight: int
    field: int  # the vector that makes one number a field of the FM; -1: none


class Layer(NamedTuple):
    """W x + b, packed (``pack``), and the activation behind it; the last one's score."""

    inputs: int
    units: int
    weight: int
    bias: int
    activation: int
    alpha: int
    v_scale: int
    v_shift: int
    epsilon: int
    score_weight: int
    score_bias: int

    def weight_of(self, weights: Tensor) -> Tensor:
        """W [units, inputs]."""
        return unpack(weights[self.weight :], self.units, self.inputs)


class Unit(NamedTuple):
    """An attention: histories and targets are lookups, side by side."""

    histories: tuple[int, ...]
    targets: tuple[int, ...]
    column: int
    length: int  # the input that says how many rows are valid; -1: none
    masked: bool
    use_softmax: bool
    count_padding: bool
    layers: tuple[Layer, ...]
    history_weight: int
    target_weight: int
    product_weight: int

    def first_weights(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer's products take: Wt + Wd of the target, Wh - Wd of the history, Wp, [H, D] each."""
        H, D = self.layers[0].units, self.layers[0].inputs
        target, product = (unpack(weights[p:], H, D, 4) for p in (self.target_weight, self.product_weight))
        history = weights[self.history_weight :][: D * padded(H)].view(D, padded(H))
        return target, history[:, :H].t(), product


class Plan(NamedTuple):
    inputs: int
    width: int  # of the MLP's input
    fm_width: int  # of the FM's fields; 0: no FM
    sigmoid: bool
    constant: int
    tables: tuple[Table, ...]
    lookups: tuple[Lookup, ...]
    dense: tuple[Dense, ...]
    units: tuple[Unit, ...]
    layers: tuple[Layer, ...]

    def encode(self) -> Tensor:
        numbers = [self.inputs, self.width, self.fm_width, self.sigmoid, self.constant]
        for listed in (self.tables, self.lookups, self.dense):
            numbers += [len(listed), *chain.from_iterable(listed)]
        numbers.append(len(self.units))
        for unit in self.units:
            numbers += [len(unit.histories), *chain.from_iterable(zip(unit.histories, unit.targets))]
            numbers += [unit.column, unit.length, unit.masked, unit.use_softmax, unit.count_padding]
            numbers += [len(unit.layers), *chain.from_iterable(unit.layers)]
            numbers += [unit.history_weight, unit.target_weight, unit.product_weight]
        numbers.append(bool(self.layers))
        if self.layers:
            numbers += [len(self.layers), *chain.from_iterable(self.layers)]
        return torch.tensor([int(n) for n in numbers], dtype=torch.int64)

    @staticmethod
    def decode(plan: Tensor) -> Plan:
        numbers = iter(plan.tolist())

        def several(kind, n: int | None = None) -> tuple:
            n = next(numbers) if n is None else n
            return tuple(kind(*(next(numbers) for _ in kind._fields)) for _ in range(n))

        head = [next(numbers) for _ in range(5)]
        tables, lookups, dense = several(Table), several(Lookup), several(Dense)
        units = tuple(_unit(numbers, several) for _ in range(next(numbers)))
        return Plan(*head, tables, lookups, dense, units, several(Layer) if next(numbers) else ())


def _unit(numbers: Iterator[int], several) -> Unit:
    pairs = [(next(numbers), next(numbers)) for _ in range(next(numbers))]
    flags = [next(numbers) for _ in range(5)]
    return Unit(*zip(*pairs), *flags, several(Layer), *(next(numbers) for _ in range(3)))


def pack(weight: Tensor, multiple: int = 1) -> Tensor:
    """[out, in] -> groups of four units, [ceil(out / 4), in, 4], zeros for absent ones; ``in`` is filled up to a
    ``multiple`` with zeros, too."""
    units, inputs = weight.shape
    filled = weight.new_zeros(-(-units // 4) * 4, -(-inputs // multiple) * multiple)
    filled[:units, :inputs] = weight
    return filled.view(-1, 4, filled.size(1)).transpose(1, 2).contiguous()


def unpack(packed: Tensor, units: int, inputs: int, multiple: int = 1) -> Tensor:
    """The inverse of ``pack``, of a vector that begins with what it made."""
    groups, filled = -(-units // 4), -(-inputs // multiple) * multiple
    packed = packed[: 4 * groups * filled].view(groups, filled, 4)
    return packed.transpose(1, 2).reshape(4 * groups, filled)[:units, :inputs]


def padded(n: int) -> int:
    """Floats of an operand's row: ``padded`` of csrc/cpu/simd/operand.h."""
    return (-(-n // 16) | 1) * 16


def quantize(weight: Tensor, bits: int) -> Tensor:
    """A table [R, D] -> as it is stored: see ``Table``. A code is the nearest of 2^bits values spread evenly from the
    row's least to its largest, so an error is at most half of their distance, and what rounding float32 adds."""
    weight = weight.detach().to("cpu", torch.float32)
    if bits >= 16:
        return weight.to(Table(bits, 0).dtype, copy=True).contiguous()
    R, D = weight.shape
    out = torch.empty(R, Table(bits, D).stored_width, dtype=torch.uint8)
    for rows, stored in zip(weight.split(1 << 16), out.split(1 << 16)):
        low, high = rows.aminmax(dim=1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        codes = ((rows - low) / scale.where(scale > 0, 1.0)).round().clamp(0, 2**bits - 1).to(torch.uint8)
        stored[:, :SCALES] = torch.cat([scale, low], 1).view(torch.uint8)
        if bits == 4:
            half = (D + 1) // 2
            second = codes.new_zeros(codes.size(0), half)
            second[:, : D - half] = codes[:, half:]
            codes = codes[:, :half] | second << 4
        stored[:, SCALES:] = codes
    return out


def dequantize(stored: Tensor, table: Table) -> Tensor:
    """Rows as they are stored -> [.., D] in float32."""
    return dequantized(split(stored, table), table)


def split(stored: Tensor, table: Table) -> list[Tensor]:
    """Rows as they are stored -> their values, or codes and each row's scale and bias."""
    if table.bits >= 16:
        return [stored]
    scale, low = stored[..., :SCALES].clone(memory_format=torch.contiguous_format).view(torch.float32).unbind(-1)
    return [stored[..., SCALES:], scale, low]


def dequantized(parts: Sequence[Tensor], table: Table) -> Tensor:
    """What ``split`` gives -> [.., D] in float32."""
    if table.bits >= 16:
        (values,) = parts
        return values.float()
    codes, scale, low = parts
    codes = codes.float()
    if table.bits == 4:  # in float32, where exporters need no bits: c = first + 16 second
        second = (codes / 16).floor()
        codes = torch.cat([codes - 16 * second, second], -1)[..., : table.width]
    return codes * scale[..., None] + low[..., None]
