"""Every Triton kernel compiled for GPUs that this machine need not have: what ``bench.gpu.report`` reports is
asserted here. test_triton_compile.py runs this file in a process of its own, with GPU_TARGETS for those alone, and
with GPU_EVERY=8 for every eighth case of an op, in its first dtype.
"""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from gpu.cases import INTERPRETED
from triton.runtime.jit import JITFunction

from bench.gpu import page, report
from bench.gpu.ahead_of_time import TARGETS, AbsentGPU, compile_case, compiling, meta_inputs, serves
from bench.gpu.cases import COMPILED, EXACT_ADAM, GPU_OPS
from bench.gpu.occupancy import MULTIPROCESSORS, occupancy
from rankkernels import _triton
from rankkernels._triton import _launch, embedding_fm, fm_interaction, norm_activation
from rankkernels._triton import din_attention_backward as backward
from rankkernels._triton import din_attention_forward as forward
from rankkernels._triton import din_attention_layers as layers
from rankkernels._triton import embedding_bag_forward as bag_forward
from rankkernels._triton import embedding_bag_numbers as bag_numbers
from rankkernels._triton import embedding_bag_reduce as bag_reduce
from rankkernels._triton import embedding_bag_sources as bag_sources
from rankkernels._triton import embedding_bag_update as bag_update
from rankkernels._triton import embedding_catch_up_history as exact_history
from rankkernels._triton import embedding_catch_up_lookup as exact_lookup
from rankkernels._triton import embedding_catch_up_rows as exact_rows
from rankkernels.ops._features import Features
from rankkernels.ops._idle_steps import WIDTH
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, Hyper, state_shapes
from rankkernels.testing import (
    OpCase,
    augru_case,
    bilinear_interaction_case,
    cross_layer_case,
    din_attention_case,
    ffm_interaction_case,
    mixed_experts_case,
    target_attention_case,
)

SERVED = [case for case in COMPILED if serves(case)]
EVERY = int(os.environ.get("GPU_EVERY", "1"))
CHOSEN = [case for op in [*GPU_OPS, EXACT_ADAM] for case in op.cases[::EVERY] if case in SERVED]
if EVERY > 1:
    CHOSEN = [replace(case, dtypes=case.dtypes[:1]) for case in CHOSEN]


@pytest.fixture(scope="module")
def records():
    targets = os.environ.get("GPU_TARGETS", " ".join(TARGETS)).split()
    return {(r.case.id, r.dtype, r.target): r for r in report.triton_records(targets, CHOSEN)}


def width_of(case: OpCase) -> int:
    """Of the main operand's rows; of all tables the narrowest's."""
    first, *others = case.inputs(case.dtypes[0])
    tables = others if case.op.startswith("embedding") else ()
    return min(t.size(-1) for t in (first, *tables) if t.is_floating_point())


@pytest.fixture(scope="module")
def widths():
    return {case.id: width_of(case) for case in SERVED}


def of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


#: Bytes a thread at most: the kernels of attention are made for a Triton that takes less registers than older ones.
SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 256


#: Reads a few numbers of a sample, not rows of columns.
NARROW = {"cross_alphas_kernel", "embedding_bag_numbers_kernel", "embedding_bag_sources_kernel"}
#: Reads no history, but weights, which are contiguous, and other programs' sums.
BESIDE = {f"din_attention_{name}_kernel" for name in ("fold", "join", "sums", "unfold")}
#: Read no rows that a caller can lay apart, but products and sums.
CONTIGUOUS = {"augru_kernel", "augru_backward_kernel", "target_attention_join_kernel"}
#: Read keys and gradients, not the tables.
NO_TABLE = {f"embedding_bag_{name}_kernel" for name in ("numbers", "sources", "reduce", "join")} | {
    "embedding_fm_backward_kernel"
}


@pytest.mark.parametrize(
    "case, dtype, target",
    [pytest.param(c, d, t, id=f"{c.id}-{of_dtype(d)}-{t}") for c in CHOSEN for d in c.dtypes for t in TARGETS],
)
def test_compiles_to_what_the_hardware_holds(records, widths, case, dtype, target):
    calls = records[case.id, dtype, target].calls
    assert [c.op for c in calls] == [case.op, f"{case.op}_{'update' if case in EXACT_ADAM.cases else 'backward'}"]
    for call in calls:
        assert call.kernels, f"{call.op} launches no kernel"
        for kernel in call.kernels:
            assert kernel.local <= SPILLED and (not kernel.spills or SPILLED)
            assert kernel.wide_loads or widths[case.id] * dtype.itemsize % 16 or kernel.name in NARROW | BESIDE
            assert kernel.matrix_instructions or not kernel.has_dot
            assert kernel.shared <= MULTIPROCESSORS[target].shared_of_block
            assert occupancy(target, kernel.warps, kernel.registers, kernel.shared) > 0
            assert all(n <= 65535 for n in kernel.grid[1:])


def test_tensors_beyond_32_bits_are_launched_within_the_grid(records):
    """CUDA's limits of the dimensions are 2^31 - 1, 65535 and 65535."""
    launched = set()
    for case in [case for op in INTERPRETED for case in op.huge]:
        assert max(t.numel() for t in meta_inputs(case, torch.float32)) > 2**31
        for kernel in (k for call in compile_case(case, torch.float32, "sm_90") for k in call.kernels):
            x, *yz = kernel.grid
            assert 0 < x < 2**31 and all(0 < n <= 65535 for n in yz), (case.id, kernel.name, kernel.grid)
            launched.add(kernel.name)
    compiled = {k.name for r in records.values() for call in r.calls for k in call.kernels}
    assert launched == compiled == kernels_defined() - OF_STEPS


#: The kernels of optimizers' steps alone.
OF_STEPS = {
    "adam_history_kernel", "embedding_bag_fold_kernel", "embedding_bag_rows_kernel", "embedding_mark_steps_kernel",
}  # fmt: skip


def step_calls(kind: str, dtype: torch.dtype, D: int, target: str, live: bool, rounds: bool) -> list:
    """A fused step on jagged bags of two tables, one on given rows, one behind an FM; ``rounds``: stochastically."""
    R, N, B, number = 1000, 4096, 512, OPTIMIZERS.index(kind)
    with torch.device("meta"):
        weights = [torch.empty(R, D, dtype=dtype) for _ in range(2)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        states = [torch.empty(s, dtype=wide) for s in state_shapes(kind, weights[0].shape)]
        states += [torch.empty(1) for _ in range(4)] if live else []
        ids, offsets, grad = torch.empty(N, dtype=torch.long), torch.empty(B, dtype=torch.long), weights[0][:B]
        rows = torch.empty(B, dtype=torch.long)
    features = Features([ids, ids], [offsets, offsets], [], [0, 1], [1, 2], [-1, -1], [-1, -1])
    one_id = Features([rows, rows], [], [], [0, 1], [0, 0], [-1, -1], [-1, -1])
    fm = grad.new_empty(B, 2 * D), grad.new_empty(B, 1), grad.new_empty(B, 1), grad.new_empty(B, 2 * D)
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 1.0, 1.0, float(rounds), *[0.5] * len(RULES[kind].settings)]
    assert len(hyper) == len(Hyper._fields + RULES[kind].settings)
    with compiling(target) as calls:
        torch.ops.rankkernels.embedding_bag_update([grad, grad], weights, states * 2, *features, number, hyper * 2)
        torch.ops.rankkernels.sparse_update(weights[0], states, rows, grad, number, hyper)
        torch.ops.rankkernels.embedding_fm_update(
            *fm, grad.new_empty(1, 2 * D), D, weights, True, states * 2, *one_id, number, hyper * 2
        )
    return calls


#: Optimizer, dtype, columns and whether it rounds stochastically, each for one of NVIDIA's and one of AMD's in turn.
STEPS = [(kind, torch.float32, 16, False) for kind in OPTIMIZERS] + [
    ("ftrl", torch.bfloat16, 512, False), ("adam", torch.float64, 128, False),
    ("adam", torch.bfloat16, 16, True), ("rowwise_adagrad", torch.float16, 512, True),
]  # fmt: skip
MAKERS = [target for target in TARGETS if target[:2] == "sm"], [target for target in TARGETS if target[:2] != "sm"]


@pytest.mark.parametrize(
    "kind, dtype, D, rounds, target",
    [(*step, targets[n % len(targets)]) for n, step in enumerate(STEPS) for targets in MAKERS],
)
def test_steps_compile_to_what_the_hardware_holds(kind, dtype, D, rounds, target):
    calls = step_calls(kind, dtype, D, target, kind in ("adam", "rowwise_adam"), rounds)
    kernels = [kernel for call in calls for kernel in call.kernels]
    names = {kernel.name for kernel in kernels}
    assert names >= {f"embedding_bag_{name}_kernel" for name in ("sources", "reduce", "join", "rows")}
    assert "embedding_fm_backward_kernel" in names
    assert ("embedding_bag_fold_kernel" in names) == (kind in ("adam", "rowwise_adam"))
    for kernel in kernels:
        assert kernel.local == 0 and not kernel.spills
        assert kernel.wide_loads or kernel.name in NARROW | {"embedding_bag_fold_kernel"}
        assert occupancy(target, kernel.warps, kernel.registers, kernel.shared) > 0


@pytest.mark.parametrize(
    "dtype, D", [(torch.float32, 16), (torch.float32, 10), (torch.float16, 512), (torch.float64, 512)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_exact_adam_compiles_to_what_the_hardware_holds(dtype, D, target):
    """All of it that a step can come to, on jagged bags of two tables."""
    R, N, B, wide, clocks = 1000, 4096, 512, torch.promote_types(dtype, torch.float32), [40.0, 9.0, 0.5, 1e-8] * 2
    with torch.device("meta"):
        weights, states = ([torch.empty(R, D, dtype=d) for _ in range(n)] for d, n in ((dtype, 2), (wide, 4)))
        last_steps, history = [torch.empty(R, dtype=torch.int32)] * 2, torch.empty(64, WIDTH, dtype=torch.float64)
        ids, offsets = torch.empty(N, dtype=torch.long), torch.empty(B, dtype=torch.long)
    features = Features([ids, ids], [offsets, offsets], [], [0, 1], [1, 2], [-1, -1], [-1, -1])
    lists, ops = (weights, states, last_steps, [history] * 2), torch.ops.rankkernels
    with compiling(target) as calls:
        ops.embedding_bag_exact(*lists, *features, "", clocks)
        ops.embedding_catch_up(*lists, *features, "", clocks)
        ops.embedding_catch_up_all(*lists, clocks)
        ops.embedding_mark_steps(last_steps, *features, [41, 41])
        ops.adam_history(history, 9, 41, 0.9, 0.999, 0.1, 0.5, 0.49)
    kernels = [kernel for call in calls for kernel in call.kernels]
    names = {"adam_history", "embedding_bag_exact", "embedding_catch_up", "embedding_mark_steps"}
    assert {kernel.name for kernel in kernels} >= {f"{name}_kernel" for name in names}
    for kernel in kernels:
        assert kernel.local == 0 and not kernel.spills
        assert kernel.direct and occupancy(target, kernel.warps, kernel.registers, kernel.shared) > 0


@triton.jit(do_not_specialize=["n"])
def filling_kernel(out_ptr, x_ptr, n, scale, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n) if x_ptr is not None else 1.0
    tl.store(out_ptr + o, x * scale, mask=o < n)


def test_a_launch_that_is_known_again_has_what_tritons_own_has(monkeypatch):
    launched, driver = [], AbsentGPU("sm_90")
    # But for the seventh argument, made for each launch: what a profiler is told.
    driver.launcher_cls = lambda src, metadata: lambda *a: launched.append((src, a[:6] + a[7:]))
    driver.utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        load_binary=lambda *arguments: (1, 2, 0, 0, 1024),
        unload_module=lambda module: None,
    )
    monkeypatch.setattr(_launch, "_compiled", {})
    out, x = torch.empty(100), torch.empty(101)
    triton.runtime.driver.set_active(driver)
    try:
        for pointers, numbers, constants in [
            ((out, x[1:]), (100, 2.0), (128,)),
            ((out, x[:-1]), (100, 2.0), (128,)),
            ((out, x[:-1].double()), (7, 3.0), (128,)),
            ((out, x[:-1]), (2**31, 3.0), (128,)),
            ((out, None), (16, 0.5), (128,)),
            ((out, None), (1, 0.5), (64,)),
        ]:
            filling_kernel[3,](*pointers, *numbers, *constants, num_warps=2)
            for _ in range(2):
                _launch.launch(filling_kernel, (3,), pointers, numbers, constants, num_warps=2)
            tritons, first, again = launched[-3:]
            assert tritons == first == again
        assert len(launched) == 18 and len({id(src) for src, _ in launched}) == len(_launch._compiled) == 6
        _launch.launch(filling_kernel, (2, 5), (x, None), (64, 0.5), (64,), num_warps=2)
        assert launched[-1][1][:3] == (2, 5, 1) and len(_launch._compiled) == 6
    finally:
        triton.runtime.driver.set_active(None)


def test_kernels_that_are_known_again_are_not_specialized_on_numbers():
    bags = bag_forward, bag_numbers, bag_reduce, bag_sources, bag_update, embedding_fm
    exact = exact_history, exact_lookup, exact_rows
    modules = forward, backward, layers, *bags, *exact, fm_interaction, norm_activation
    kernels = {f for m in modules for name, f in vars(m).items() if name.endswith("_kernel")}
    numbers = [p for k in kernels for p in k.params if not (p.is_constexpr or p.name.endswith("_ptr"))]
    assert len(kernels) == 7 + 9 + 2 + 2 + 4 + 4
    assert {p.name for p in numbers if not p.do_not_specialize} == {"dice_eps", "norm_eps", "kept_scale"}


@pytest.mark.parametrize("form", ["padded", "mask"])
def test_other_lengths_compile_nothing_again(form):
    """Batches padded to their longest history, 10 wide: strides that are, or are not, multiples of 16."""
    kernels = [f for m in (forward, backward) for name, f in vars(m).items() if "_kernel" in name and name[0] == "d"]
    variants = lambda: sum(len(cache) for k in kernels for cache, *_ in k.device_caches.values())  # noqa: E731
    counts = []
    for L in (50, 1, 2, 7, 8, 16, 31, 32, 33, 48, 64, 100):
        compile_case(din_attention_case(64, L, 10, [36], batch_norm=False, form=form), torch.float32, "sm_90")
        counts.append(variants())
    assert counts[0] > 0 and len(set(counts)) == 1, counts


@pytest.mark.parametrize(
    "case, dtype",
    [
        (cross_layer_case(5, 7), torch.float64),
        (bilinear_interaction_case(3, 4, 5), torch.float64),
        (ffm_interaction_case(3, 4, 5), torch.float64),
        (mixed_experts_case(3, 2, 5), torch.float64),
        (mixed_experts_case(3, 2, 65), torch.float32),
        (mixed_experts_case(3, 65, 2), torch.float32),
        (target_attention_case(3, 2, 5, 4), torch.float64),
        (target_attention_case(3, 2, 5, 129), torch.float32),
        (augru_case(3, 2, 4, 4, form="padded"), torch.float64),
        (augru_case(3, 2, 65, 4, form="padded"), torch.float32),
    ],
    ids=lambda value: getattr(value, "id", of_dtype(value)),
)
@pytest.mark.filterwarnings("ignore::rankkernels.ops._table.ReferenceWarning")
def test_what_no_kernel_serves_is_the_references(case, dtype):
    with compiling("sm_90", only_counting=True) as calls:
        case.function(*meta_inputs(case, dtype))
    assert [call.op for call in calls if call.op] == [case.op] and not calls[0].kernels


def kernels_defined() -> set[str]:
    modules = [import_module(f"{_triton.__name__}.{m.name}") for m in pkgutil.iter_modules(_triton.__path__)]
    return {name for m in modules for name, f in vars(m).items() if isinstance(f, JITFunction) and "_kernel" in name}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", [op.cases[0] for op in GPU_OPS], ids=lambda case: case.op)
def test_wide_loads_are_those_of_the_main_operand(records, case, target):
    """Its rows one element further apart, so that they are not aligned, the kernels have fewer of them."""
    dtype = case.dtypes[0]

    def unaligned(dtype, generator):
        first, *others = case.make(dtype, generator)
        return [torch.cat([t, t[..., :1]], -1)[..., :-1] if t.shape == first.shape else t for t in (first, *others)]

    def wide_loads(calls):
        kernels = [k for call in calls for k in call.kernels if k.name not in BESIDE | CONTIGUOUS | NO_TABLE]
        if case.op.startswith("embedding"):  # which read addresses and ids, too, of 8 bytes
            return [k.count(r"LDG\S*\.128|(global|buffer)_load_dwordx4") for k in kernels]
        return [k.wide_loads for k in kernels]

    wide = wide_loads(records[case.id, dtype, target].calls)
    narrow = wide_loads(compile_case(replace(case, make=unaligned), dtype, target))
    assert all(n < w for n, w in zip(narrow, wide, strict=True) if w), (narrow, wide)


def test_prints_the_table(records):
    table = page.triton_table(list(records.values()), {})
    assert len(table) == 2 + 2 * sum(len(case.dtypes) for case in SERVED)
    assert len({line.count("|") for line in table}) == 1
    print("\n".join(table))


def test_the_committed_page_is_of_this_code(records):
    """bench/gpu/gpu_kernels.md: what every Triton makes of the kernels alike, and with its own Triton all of it."""
    text = (report.ROOT / "bench/gpu/gpu_kernels.md").read_text()
    same = f"Triton {triton.__version__}," in text
    alike = None if same else -page.COMPILED_COLUMNS
    of = lambda lines: [line.strip("| ").split(" | ")[:alike] for line in lines if line.startswith("|")]  # noqa: E731
    committed = of(text.splitlines())
    for row in of(page.triton_table(list(records.values()), report.loop_counts(CHOSEN) if same else {})):
        assert row in committed, f"make gpu-report gives {row}"


def test_occupancy_is_what_the_vendors_calculators_say():
    for target, warps, registers, shared, expected in (
        ("sm_80", 4, 32, 0, 1.0),
        ("sm_80", 8, 128, 0, 0.25),
        ("sm_80", 8, 255, 0, 0.125),
        ("sm_90", 4, 40, 0, 0.75),
        ("sm_90", 4, 32, 100 << 10, 0.125),
        ("gfx942", 4, 64, 0, 1.0),
        ("gfx942", 4, 256, 0, 0.25),
        ("gfx942", 4, 64, 20 << 10, 0.375),
    ):
        assert occupancy(target, warps, registers, shared) == expected, (target, warps, registers, shared)


def test_the_report_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
         "from bench.gpu.report import main; main()"],
        cwd=report.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "unset TRITON_INTERPRET" in done.stderr


def test_the_page_says_what_was_not_compiled(records):
    text = page.report(list(records.values()), {}, None, {}, {}, "these versions")
    assert "these versions. Nothing here ran on a GPU" in text
    assert "Not compiled: no nvcc" in text
