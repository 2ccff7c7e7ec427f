"""16-bit tables rounded stochastically: the reference, kernels against it bit for bit, and what training gains."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, state_shapes

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
OWN = {"lr_power": -0.5, "beta": 0.5, "l1": 0.2, "l2": 0.1, "ar_alpha": 1.5, "min_shrinkage": 0.2}
KEY, STEP = 5 << 32 | 0xFEDCBA98, 7
WIDTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 64, 65, 72, 127, 128, 129, 130)


def integers(x: torch.Tensor) -> torch.Tensor:
    """The bits, where a NaN is equal to itself and -0 is not 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


# ---- the reference


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


# ---- the kernels


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


EVERY = pytest.mark.parametrize("kind", OPTIMIZERS)


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
    sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
    from test_out_of_bounds import needs_kernels_of

    needs_kernels_of(capability)
    isa = "baseline" if capability == "default" else capability
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == [isa, "right"], done.stderr


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


# ---- training


def bag(dtype: torch.dtype, R: int = 256, D: int = 16, value: float = 1.0, tables: int = 1):
    module = rk.TableBatchedEmbeddingBag([R] * tables, D, modes="none", dtype=dtype)
    with torch.no_grad():
        for w in module.weights:
            w.fill_(value)
    return module


def train(module, optimizer, steps: int, slope: float = 1.0) -> None:
    ids = torch.arange(module.weights[0].size(0))
    for _ in range(steps):
        optimizer.zero_grad()
        (slope * module([ids] * len(module.weights)).float()).sum().backward()
        optimizer.step()


@DTYPES
def test_the_mean_of_many_roundings_is_the_number(dtype):
    torch.manual_seed(0)
    module, p, n = bag(dtype, R=4096, D=16, tables=2), 0.3, 2 * 4096 * 16
    spacing = torch.finfo(dtype).eps  # above 1
    optimizer = rk.optim.SGD(module.parameters(), lr=p * spacing, stochastic_rounding=True)
    rk.optim.fuse(module, optimizer)
    train(module, optimizer, 1, slope=-1.0)
    up = torch.stack([(w.detach().double() - 1) / spacing for w in module.weights])
    assert up.unique().tolist() == [0.0, 1.0]
    assert abs(up.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    # Tables, rows and columns are rounded apart: two of them agree as often as chance has it.
    agree = p**2 + (1 - p) ** 2
    for a, b in ((up[0], up[1]), (up[:, 1:], up[:, :-1]), *((up[..., c:], up[..., :-c]) for c in (1, 2, 8))):
        assert abs((a == b).double().mean() - agree) < 5 * math.sqrt(agree * (1 - agree) / a.numel())


@DTYPES
def test_a_table_that_stalls_at_nearest_trains(dtype):
    rate, steps = torch.finfo(dtype).eps / 16, 64  # a quarter of what would move 1 downwards, half a spacing below
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        module = bag(dtype)
        optimizer = rk.optim.SGD(module.parameters(), lr=rate, stochastic_rounding=stochastic)
        rk.optim.fuse(module, optimizer)
        train(module, optimizer, steps)
        moved[stochastic] = 1 - module.weights[0].detach().double()
    assert not moved[False].any()
    # A step's rounding has a variance below spacing^2 / 4.
    deviation = math.sqrt(steps / moved[True].numel()) * torch.finfo(dtype).eps / 2
    assert abs(moved[True].mean() - rate * steps) < 5 * deviation


@EVERY
def test_a_seed_is_a_run(kind):
    """By ``torch.manual_seed``, over a restart with another one, and in a copy."""
    cls = next(c for c in vars(rk.optim).values() if getattr(c, "_kind", None) == kind)

    def start(seed: int):
        module = bag(torch.bfloat16, R=30, D=9, value=0.7, tables=2)
        torch.manual_seed(seed)
        optimizer = cls(module.parameters(), lr=0.01, stochastic_rounding=True)
        return rk.optim.fuse(module, optimizer), optimizer

    runs = []
    for seed in (1, 1, 2):
        module, optimizer = start(seed)
        train(module, optimizer, 6)
        runs.append([integers(w.detach()) for w in module.weights])
    assert all(map(torch.equal, *runs[:2])) and not all(map(torch.equal, *runs[1:]))
    first, optimizer = start(1)
    train(first, optimizer, 3)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    file = io.BytesIO()
    torch.save({"module": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, optimizer = start(3)
    second.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.rounding_seed == saved["optimizer"]["param_groups"][0]["rounding_seed"]
    for module, stepper in ((second, optimizer), *((c, c.fused_optimizer) for c in copies)):
        train(module, stepper, 3)
        assert all(torch.equal(integers(w.detach()), right) for w, right in zip(module.weights, runs[0]))


def test_the_default_draws_nothing():
    state = torch.get_rng_state()
    optimizer = rk.optim.Adam([torch.zeros(3, 2)])
    assert torch.equal(torch.get_rng_state(), state) and optimizer.rounding_seed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_tables_are_not_rounded(dtype):
    results = []
    for stochastic in (False, True):
        module = bag(dtype)
        optimizer = rk.optim.Adam(module.parameters(), stochastic_rounding=stochastic)
        train(rk.optim.fuse(module, optimizer), optimizer, 3)
        results.append(module.weights[0])
    assert torch.equal(*results)


def test_groups_have_one_seed_and_their_own_rounding():
    a, b, c = (torch.zeros(3, 2, dtype=torch.bfloat16) for _ in range(3))
    optimizer = rk.optim.SGD([{"params": [a], "stochastic_rounding": True}, {"params": [b]}])
    optimizer.add_param_group({"params": [c], "stochastic_rounding": True})
    seed, groups = optimizer.rounding_seed, optimizer.param_groups
    assert [g["rounding_seed"] for g in groups] == [seed, None, seed] and 0 <= seed < 2**32
    assert optimizer._roundings([c, b, a], groups[::-1]) == [3 << 32 | seed, 0.0, 1 << 32 | seed]


def test_a_state_from_before_there_was_rounding():
    table = torch.zeros(3, 2, dtype=torch.bfloat16)
    optimizer = rk.optim.SGD([table], stochastic_rounding=True)
    saved, seed = rk.optim.SGD([table]).state_dict(), optimizer.rounding_seed
    for name in ("stochastic_rounding", "rounding_seed"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["stochastic_rounding"] and optimizer.rounding_seed == seed


def test_refused():
    table = torch.zeros(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Adam: with exact=True stochastic_rounding must be False"):
        rk.optim.Adam([table], exact=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match="SGD: stochastic_rounding must be True or False, got 0.5"):
        rk.optim.SGD([table], stochastic_rounding=0.5)
    with pytest.raises(ValueError, match="SGD: rounding_seed must be None or an integer below 2\\^32, got -1"):
        rk.optim.SGD([{"params": [table], "rounding_seed": -1}])
    ours = rk.optim.SGD([table], stochastic_rounding=True)
    with pytest.raises(ValueError, match="to_torch: SGD has no stochastic_rounding, and here it is True"):
        rk.optim.to_torch(ours, torch.optim.SGD([table]))


if __name__ == "__main__":
    print(rk.ops._library.cpu_isa)
    for dtype in (torch.bfloat16, torch.float16):
        test_numbers_of_every_size(dtype)
        for kind in OPTIMIZERS:
            test_a_sparse_step_is_the_references(kind, dtype)
            test_a_fused_step_is_the_references(kind, dtype)
    print("right")
