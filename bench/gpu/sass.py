"""What a kernel of NVIDIA's machine code issues: its instructions, loop by loop, times how often the loops run.

A multiprocessor issues an instruction of four warps a clock at most, so instructions are a lower bound of the time that
neither bytes nor flops show. Straight code counts once, both sides of a branch too. A loop is what a branch goes back
over; the line of the branch says which loop of the source it is, and how often that runs is counted by
bench.gpu.trips. A compiler that unrolls a loop leaves one or more with a step of several of the source's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

#: A place in the source: file and line.
Line = tuple[str, int]
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
_TARGET = re.compile(r"`\((\.L_\w+)\)|\b0x([0-9a-f]+)\b")
_STEP = re.compile(r"(U?R\d+)\S*, (?:U?P\w+, )*(U?R\d+)\S*, (-?0x[0-9a-f]+)\b")


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str
    line: Line | None


class Loop(NamedTuple):
    """Instructions from the target of a branch to the branch, those of loops inside left out; the branch's line; by how
    much registers grow that are compared with something, one of which counts the loop."""

    size: int
    line: Line | None
    steps: frozenset[int]


class Code(NamedTuple):
    """A kernel's instructions: how many outside of loops, and the loops in the order of their beginnings."""

    straight: int
    loops: list[Loop]

    def __str__(self) -> str:
        return " + ".join(map(str, (self.straight, *(loop.size for loop in self.loops))))


def steps_of(own: Sequence[Instruction]) -> frozenset[int]:
    compared = {r for i in own if "ISETP" in i.name for r in re.findall(r"\bU?R\d+", i.operands)}
    adds = (_STEP.match(i.operands) for i in own if re.match(r"U?IADD3?$|VIADD$", i.name))
    grown = {int(m[3], 0) for m in adds if m and m[1] == m[2] and m[1] in compared}
    return frozenset(min(abs(n), (1 << 32) - abs(n)) for n in grown)


def instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Of what nvdisasm or cuobjdump print of one kernel, and the labels' addresses."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    line, inner = None, True
    for row in text.splitlines():
        if label := _LABEL.match(row):
            pending.append(label[1])
        elif place := _PLACE.search(row):
            if inner:  # of a chain of places the first is the innermost
                line = place[1].rpartition("/")[2], int(place[2])
            inner = place[3] is None
        elif m := _INSTRUCTION.match(row):
            address = int(m[1], 16)
            labels.update((name, address) for name in pending)
            pending.clear()
            found.append(Instruction(address, (m[2] or "").strip(), m[3], m[4].strip(), line))
    return found, labels


def parse(text: str) -> Code:
    code, labels = instructions(text)
    ends: dict[int, Instruction] = {}
    for i in code:
        target = _TARGET.search(i.operands) if i.name.startswith("BRA") else None
        if target is not None:
            address = labels.get(target[1], -1) if target[1] else int(target[2], 16)
            if 0 <= address <= i.address:
                ends[address] = max(ends.get(address, i), i)
    inside: dict[int, list[Instruction]] = {first: [] for first in ends}
    straight = 0
    for i in code:
        around = [first for first, end in ends.items() if first <= i.address <= end.address]
        if around:
            inside[min(around, key=lambda first: ends[first].address - first)].append(i)
        else:
            straight += i.name != "NOP"
    loops = [Loop(len(own), ends[first].line, steps_of(own)) for first, own in sorted(inside.items())]
    # A branch to itself stands behind the end of a kernel.
    return Code(straight, [loop for loop in loops if loop.size > 1])


class Trips(NamedTuple):
    """Of one loop of the source in one program: how often it is come to, how often it runs in all, and its step."""

    entries: float
    turns: float
    step: int


#: Of a program's loops, by where one is and from where that is called, innermost first; in the order of first runs.
Counts = Mapping[tuple[Line, ...], Trips]


def unrolled(loop: Loop, step: int) -> int:
    """How many turns of the source's loop one of this is, by what counts it: 1 if nothing says more."""
    return max((s // step for s in loop.steps if s % step == 0 and s // step in (2, 4, 8)), default=1)


def issued(code: Code, counts: Counts) -> float:
    """Instructions that a warp issues in one program."""
    total = float(code.straight)
    for line, loops in _by_line(code.loops).items():
        matching = [trips for chain, trips in counts.items() if line in chain]
        if len(matching) > 1:
            named = [trips for chain, trips in counts.items() if chain and chain[0] == line]
            matching = named or matching
        total += sum(_turns(loops, matching))
    return total


def _by_line(loops: Sequence[Loop]) -> dict[Line | None, list[Loop]]:
    found: dict[Line | None, list[Loop]] = {}
    for loop in loops:
        found.setdefault(loop.line, []).append(loop)
    return found


def _turns(loops: Sequence[Loop], trips: Sequence[Trips]) -> Iterator[float]:
    """Instructions of the loops of one line, whose trips are those of one loop of the source or of several."""
    if len(trips) == len(loops):
        pairs = list(zip(loops, trips))
        for loop, t in pairs:
            yield loop.size * t.turns / unrolled(loop, t.step)
    elif len(trips) == 1:  # unrolled: each takes what the ones before it left
        (t,) = trips
        left = t.turns / t.entries if t.entries else 0.0
        for loop in loops:
            by = unrolled(loop, t.step)
            times = left // by
            left -= times * by
            yield loop.size * times * t.entries
    else:
        turns = sum(t.turns for t in trips) / max(len(loops), 1)
        for loop in loops:
            yield loop.size * max(turns, 1.0)
