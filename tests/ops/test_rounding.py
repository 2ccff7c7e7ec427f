"""Rows of 16-bit tables rounded stochastically: the reference, and the kernels against it bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from test_out_of_bounds import check_with_kernels_of

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, state_shapes

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
EVERY = pytest.mark.parametrize("kind", OPTIMIZERS)
OWN = {"lr_power": -0.5, "beta": 0.5, "l1": 0.2, "l2": 0.1, "ar_alpha": 1.5, "min_shrinkage": 0.2}
KEY, STEP = 5 << 32 | 0xFEDCBA98, 7
WIDTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 64, 65, 72, 127, 128, 129, 130)


def integers(x: torch.Tensor) -> torch.Tensor:
    """The bits, where a NaN is equal to itself and -0 is not 0."""
    return x.contiguous().view(torch.int16)


@DTYPES
def test_all_bits_have_the_mean_of_the_number(dtype):
    """Exactly so where a number lies at a multiple of 2^-16 between its neighbours."""
    bits, info = torch.arange(2**16), torch.finfo(dtype)
    for below, power in ((1.0, 0), (-1.5, 0), (100.0, 6), (-3e-3, -9)):
        below = float(torch.tensor(below).to(dtype))
        for k in (1, 12345, 2**15, 2**16 - 1):
            x = below + math.copysign(k * info.eps * 2.0 ** (power - 16), below)
            if float(torch.tensor(x)) != x:
                continue  # float16 has 13 bits more than float32 between neighbours, and not 16
            rounded = reference.round_stochastically(torch.full((2**16,), x), dtype, bits).double()
            assert rounded.mean() == x and rounded.unique().numel() == 2


@DTYPES
def test_what_the_dtype_has_stays(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for bits in (0, 1, 2**16 - 1):
        rounded = reference.round_stochastically(every.float(), dtype, torch.full((2**16,), bits))
        stays = ~every.isnan()
        assert torch.equal(integers(rounded)[stays], integers(every)[stays]) and rounded[~stays].isnan().all()


@DTYPES
def test_the_largest_number_and_beyond(dtype):
    """Infinite is what rounding to the nearest makes so."""
    most = torch.finfo(dtype).max
    spacing = most - float(torch.nextafter(torch.tensor(most, dtype=dtype), torch.zeros((), dtype=dtype)))
    x = torch.tensor([most - spacing / 4, most + spacing / 4, most + 0.75 * spacing, math.inf, math.nan]).float()
    for bits in (0, 2**16 - 1):
        right = [most if bits == 0 else most - spacing, most, math.inf, math.inf]
        for sign in (1, -1):
            rounded = reference.round_stochastically(sign * x, dtype, torch.full((5,), bits)).double()
            assert rounded[:4].tolist() == [sign * r for r in right] and rounded[4].isnan()


def make(kind: str, dtype: torch.dtype, D: int, R: int = 40):
    generator = torch.Generator().manual_seed(D)
    weight = torch.randn(R, D, generator=generator).to(dtype)
    states = [0.1 + torch.rand(shape, generator=generator) for shape in state_shapes(kind, weight.shape)]
    if kind == "rowwise_rmsprop":
        states[1] = torch.randint(STEP, (R,), generator=generator).float()
    return weight, states, generator


def hyper_of(kind: str, rounding: float = KEY, lr: float = 0.1, max_norm: float = 1.5) -> list[float]:
    return [lr, 0.8, 0.95, 1e-3, 0.05, STEP, 0.5, max_norm, rounding, *(OWN[name] for name in RULES[kind].settings)]


def rounded_of(wide: torch.Tensor, dtype: torch.dtype, rows: torch.Tensor, step: int = STEP) -> torch.Tensor:
    return reference.round_stochastically(wide, dtype, reference.rounding_bits(KEY, step, rows, wide.size(1)))


def check_sparse(kind: str, dtype: torch.dtype, D: int, R: int = 40) -> None:
    """A step on a 16-bit table is one on the same values in float32, whose rows the reference rounds."""
    weight, states, generator = make(kind, dtype, D, R)
    rows = torch.rand(R, generator=generator).lt(0.7).nonzero()[:, 0]
    values = torch.randn(rows.numel(), D, generator=generator).to(dtype)
    wide, wide_states = weight.float(), [s.clone() for s in states]
    update, number = torch.ops.rankkernels.sparse_update.default, OPTIMIZERS.index(kind)
    update(wide, wide_states, rows, values.float(), number, hyper_of(kind))
    expected = weight.clone()
    expected[rows] = rounded_of(wide[rows], dtype, rows)
    update(weight, states, rows, values, number, hyper_of(kind))
    assert torch.equal(integers(weight), integers(expected)), (kind, dtype, D)
    assert all(map(torch.equal, states, wide_states))


def check_bags(kind: str, dtype: torch.dtype, D: int, max_norm: float = 1.5) -> None:
    """The same of the step in a backward, with rows in many tiles and a table that rounds to the nearest."""
    n, R = 3000, 300
    weights, states, wides = [], [], []
    for t in range(2):
        w, s, generator = make(kind, dtype, D + t, R)
        weights.append(w)
        states.append(s)
        wides.append((w.float(), [x.clone() for x in s]))
    ids = [torch.where(torch.rand(n, generator=generator) < 0.4, 3, torch.randint(R, (n,), generator=generator))] * 2
    grads = [torch.randn(n, w.size(1), generator=generator).to(dtype) / 8 for w in weights]
    features = ids, [], [], [0, 1], [0, 0], [-1, 5], [-1, -1], []
    update, number = torch.ops.rankkernels.embedding_bag_update.default, OPTIMIZERS.index(kind)
    hyper = [*hyper_of(kind, max_norm=max_norm), *hyper_of(kind, 0.0, max_norm=max_norm)]
    wide, wide_states = [w for w, _ in wides], [s for _, of_table in wides for s in of_table]
    update([g.float() for g in grads], wide, wide_states, *features, number, hyper)
    update(grads, weights, [s for of_table in states for s in of_table], *features, number, hyper)
    rows, before = ids[0].unique(), make(kind, dtype, D, R)[0]
    before[rows] = rounded_of(wide[0][rows], dtype, rows)
    assert torch.equal(integers(weights[0]), integers(before)), (kind, dtype, D)
    assert torch.equal(integers(weights[1]), integers(wide[1].to(dtype))), (kind, dtype, D)


@DTYPES
@EVERY
def test_a_sparse_step_is_the_references(kind, dtype):
    for D in WIDTHS:
        check_sparse(kind, dtype, D)


@DTYPES
@EVERY
def test_a_fused_step_is_the_references(kind, dtype):
    for D in (5, 16, 64, 127):
        check_bags(kind, dtype, D)
    check_bags(kind, dtype, 128, max_norm=0.0)


@DTYPES
def test_numbers_of_every_size(dtype):
    """Subnormal ones, the largest and beyond, infinities and NaN: of a step from 0, the rate times the gradient."""
    grads = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1024, 64)
    for lr in (1.0, 0.37, 1.0013, 1.000001, 3e-4, 3e-39):
        weight, rows = torch.zeros(1024, 64, dtype=dtype), torch.arange(1024)
        hyper = [lr, 0.0, 0.0, 0.0, 0.0, STEP, 1.0, 0.0, KEY]
        wide = weight.float()
        torch.ops.rankkernels.sparse_update.default(wide, [], rows, grads.float(), OPTIMIZERS.index("sgd"), hyper)
        torch.ops.rankkernels.sparse_update.default(weight, [], rows, grads, OPTIMIZERS.index("sgd"), hyper)
        assert torch.equal(weight.isnan(), wide.isnan())
        right = integers(rounded_of(wide, dtype, rows))
        assert torch.equal(integers(weight)[~wide.isnan()], right[~wide.isnan()])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_each_instruction_set(capability):
    check_with_kernels_of(capability, __file__)


def test_threads_and_batches_do_not_matter():
    weight, _, generator = make("sgd", torch.bfloat16, 24, 5000)
    values, results = torch.randn(5000, 24, generator=generator).bfloat16(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        stepped, rows = weight.clone(), torch.arange(5000)
        torch.ops.rankkernels.sparse_update.default(stepped, [], rows, values, 0, hyper_of("sgd"))
        results.append(stepped)
    some = torch.arange(3, 5000, 7)
    alone = weight.clone()
    torch.ops.rankkernels.sparse_update.default(alone, [], some, values[some], 0, hyper_of("sgd"))
    assert torch.equal(*results) and torch.equal(alone[some], results[0][some])


if __name__ == "__main__":
    print(rk.ops._library.cpu_isa)
    for dtype in (torch.bfloat16, torch.float16):
        test_numbers_of_every_size(dtype)
        for kind in OPTIMIZERS:
            test_a_sparse_step_is_the_references(kind, dtype)
            test_a_fused_step_is_the_references(kind, dtype)
    print("right")
