"""bench/gpu/trips.py, in a process with TRITON_INTERPRET=1: test_gpu_sass.py runs this file."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import trips
from rankkernels._triton import din_attention_blocks, fm_interaction
from rankkernels.testing import bilinear_interaction_case, din_attention_case, fm_interaction_case


def line_of(module, text: str) -> tuple[str, int]:
    lines = open(module.__file__).read().splitlines()
    return module.__file__.rpartition("/")[2], next(i for i, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("F, turns", [(39, 5), (40, 5), (41, 6)])
def test_fields_in_blocks_of_eight(F, turns):
    forward, _ = trips.count(fm_interaction_case(4096, F, 16), torch.float32)
    chain = (line_of(fm_interaction, "for f in tl.range"),)
    assert forward[chain] == trips.Trips(entries=1, turns=turns, step=8)


@pytest.mark.parametrize("L, blocks", [(32, 1), (33, 2), (64, 2)])
def test_functions_are_known_by_where_they_are_called(L, blocks):
    """The score kernel of attention: products of a hidden layer for each block of 32 rows, in a function of its own."""
    case = din_attention_case(8, L, 64, [36], "dice", False, False, False)
    *_, score = trips.count(case, torch.float32)[:2]
    file = din_attention_blocks.__file__.rpartition("/")[2]
    of_blocks = [t for chain, t in score.items() if chain[0][0] != file and t.step == 32]
    inlined = [t for chain, t in score.items() if chain[0][0] == file and len(chain) == 2 and t.entries == blocks]
    assert [t.turns for t in of_blocks] == [blocks] and inlined


@pytest.mark.parametrize("F", [3, 5])
def test_every_case_of_a_process_is_counted(F):
    launches = trips.count(bilinear_interaction_case(64, F, 16), torch.float32)
    assert len(launches) == 3 and all(launches)


def test_a_sample_of_the_programs_runs():
    assert trips.sample(1) == [0] and trips.sample(2) == [0, 1] and trips.sample(300) == [50, 150, 250]
