"""bench/gpu/sass.py: instructions counted loop by loop in what NVIDIA's disassemblers print."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from process import run_pytest

from bench.gpu.occupancy import GPUS, lower_bounds
from bench.gpu.page import Compiled, versions_table
from bench.gpu.sass import Code, Counts, Loop, Trips, issued, parse

#: A loop in a loop, whose line is in a function that the outer one calls; then one of which a turn is four.
NVDISASM = """\
.text.kernel:
	//## File "/a/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   IADD3 R2, P1, R2, 0x1, RZ ;
	//## File "/a/blocks.py", line 7 inlined at "/a/kernel.py", line 5
	//## File "/a/kernel.py", line 5
.L_x_2:
        /*0030*/                   LDG.E.128 R4, desc[UR8][R8.64] ;
        /*0040*/                   UIADD3 UR4, UP0, UR4, 0x20, URZ ;
        /*0050*/                   ISETP.GE.AND P0, PT, R3, UR4, PT ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
	//## File "/a/kernel.py", line 4
        /*0070*/                   ISETP.GE.AND P0, PT, R2, 0x8, PT ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
	//## File "/a/kernel.py", line 9
        /*0090*/                   IADD3 R12, R12, -0x80, RZ ;
        /*00a0*/                   IADD3 R6, R6, 0x4, RZ ;
        /*00b0*/                   ISETP.NE.AND P0, PT, R12, RZ, PT ;
        /*00c0*/               @P0 BRA `(.L_x_3) ;
.L_x_9:
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
        /*00f0*/                   NOP;
"""
OUTER, INNER, LAST = ("kernel.py", 4), ("blocks.py", 7), ("kernel.py", 9)


def test_loops_are_what_branches_go_back_over():
    code = parse(NVDISASM)
    assert code == Code(
        straight=3,
        loops=[
            Loop(3, OUTER, frozenset({1})),
            Loop(4, INNER, frozenset({0x20})),
            Loop(4, LAST, frozenset({0x80})),  # R6 grows, too, but is compared with nothing
        ],
    )
    assert str(code) == "3 + 3 + 4 + 4"


def test_cuobjdump_prints_addresses_and_no_lines():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0010*/                   IADD3 R2, R2, 0xffffffff, RZ ;
        /*0020*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA 0x50;
    """
    assert parse(text) == Code(2, [Loop(3, None, frozenset({1}))])


def test_loops_count_as_often_as_they_run():
    counts: Counts = {
        (OUTER,): Trips(1, 8, 1),
        (INNER, ("kernel.py", 5)): Trips(8, 40, 0x20),
        (LAST,): Trips(1, 13, 0x20),
    }
    assert issued(parse(NVDISASM), counts) == 3 + 8 * 3 + 40 * 4 + 13 * 4 / 4
    assert issued(parse(NVDISASM), {}) == 3 + 3 + 4 + 4  # where nothing is known, once


@pytest.mark.parametrize("turns, expected", [(0, 0), (1, 50), (5, 2 * 90 + 50), (6, 3 * 90)])
def test_an_unrolled_loop_leaves_the_rest_to_the_next(turns, expected):
    loops = [Loop(90, OUTER, frozenset({16, 8})), Loop(50, OUTER, frozenset({8}))]
    assert issued(Code(0, loops), {(OUTER,): Trips(2, 2 * turns, 8)}) == 2 * expected


def test_one_function_inlined_twice_has_two_loops_in_order():
    loops = [Loop(10, INNER, frozenset()), Loop(100, INNER, frozenset())]
    counts = {(INNER, ("kernel.py", 5)): Trips(1, 3, 1), (INNER, ("kernel.py", 6)): Trips(1, 7, 1)}
    assert issued(Code(1, loops), counts) == 1 + 3 * 10 + 7 * 100
    three = [*loops, Loop(1000, INNER, frozenset())]  # which is which is not known: all run as often
    assert issued(Code(1, three), counts) == pytest.approx(1 + 1110 * 10 / 3)


def test_the_bounds_of_a_call():
    h100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))
    bounds = lower_bounds(h100, torch.float32, 3_350_000, 67_000_000, False, 1_045_440)
    assert {what: round(1e6 * s, 2) for what, s in bounds.items()} == {"b": 1.0, "f": 1.0, "i": 1.0}


def test_trips_are_counted_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_pytest(Path(__file__).with_name("triton_kernels") / "trips.py", TRITON_INTERPRET="1")


def test_a_line_for_each_triton():
    spills = {"a_kernel of x float32 sm_80": 8, "a_kernel of x float32 sm_90": 24, "b_kernel of y float16 sm_80": 16}
    rows = versions_table([Compiled("3.6.0", 40, 519, spills, 255), Compiled("3.9.0", 40, 519, {}, 243)])
    assert rows[2:] == [
        "| 3.6.0 | 2.11 | 40 | 519 | 255 | 2 a_kernel, 1 b_kernel: 24 bytes at most |",
        "| 3.9.0 |  | 40 | 519 | 243 | none |",
    ]
