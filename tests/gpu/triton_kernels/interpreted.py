"""Every Triton kernel under Triton's interpreter, on the CPU. test_triton_interpreter.py runs this file in a process of
its own: the interpreter has to be chosen before a kernel is defined.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu.cases import INTERPRETED
from gpu.cases.base import BF16, DOUBLE, SINGLE, Interpreted, described, error, strided
from gpu.cases.embedding_fm import EMBEDDING_FM
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.errors import InterpreterError

from bench.gpu.ahead_of_time import tensor_bytes
from rankkernels import reference
from rankkernels._triton._pairs import fields_of
from rankkernels._triton._products import product
from rankkernels.ops._activations import ACTIVATIONS

assert triton.knobs.runtime.interpret, "this file needs TRITON_INTERPRET=1"
interpreter.install()


@pytest.fixture(autouse=True)
def uninitialized_is_nan():
    """torch.empty gives NaN: an element that no program stores is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def errors(op: Interpreted, module: ModuleType, config: dict, dtype: torch.dtype) -> list[float]:
    """Errors of the launchers' results, in units of what the op tolerates."""
    torch.manual_seed(0)
    arguments = op.make(config, dtype)
    wide = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    expected = op.expected(**tree_map_only(torch.Tensor, wide, arguments))
    before = tree_map_only(torch.Tensor, torch.clone, arguments)
    actual = op.launch(module, **arguments)
    for name, value in before.items():
        assert all(
            torch.equal(b, t) for b, t in zip(tree_leaves(value), tree_leaves(arguments[name])) if torch.is_tensor(b)
        ), f"{name} was written to"
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert actual[0].dtype == dtype
    tolerance = op.tolerance[op.rounded_to(config, dtype)]
    return [error(a, e) / tolerance for a, e in zip(actual, expected)]


def in_all_dtypes(configs: str):
    """Each op's ``configs`` in every dtype, all but one of these, in turn, slow. Where there are many, each has two
    dtypes in turn, and two in three are slow."""
    for op in INTERPRETED:
        many = sum(not config.get("slow") for config in getattr(op, configs)) > 20
        every = 3 if many else 1
        for n, config in enumerate(getattr(op, configs)):
            dtypes = config.get("dtypes", op.dtypes)
            first = n // every % len(dtypes)
            for i in sorted({first, (first + 1 + n % every) % len(dtypes)}) if many else range(len(dtypes)):
                slow = config.get("slow") or n % every or i != first
                marks, name = [pytest.mark.slow] if slow else [], f"{op.module}-{described(config)}"
                yield pytest.param(op, config, dtypes[i], marks=marks, id=f"{name}-{described(dtypes[i])}")


@pytest.mark.parametrize("op, config, dtype", in_all_dtypes("configs"))
def test_kernel_equals_reference(op, config, dtype):
    module = importlib.import_module(f"rankkernels._triton.{op.module}")
    assert max(errors(op, module, config, dtype)) <= 1


@pytest.mark.parametrize(
    "op, config",
    [
        pytest.param(op, c, id=f"{op.module}-{described(c)}")
        for op in INTERPRETED
        if op.streamed
        for c in op.streamed_configs
    ],
)
def test_forward_reads_its_input_once(op, config):
    """By the loads of the first launch that has it."""
    interpreter.launched.clear()
    arguments = op.make(config, SINGLE)
    op.launch(importlib.import_module(f"rankkernels._triton.{op.module}"), **arguments)
    loads = next(loads for memory in interpreter.launched if (loads := memory.loads_of(arguments[op.streamed])).any())
    assert (loads == 1).all()


@pytest.mark.parametrize("op, config, dtype", in_all_dtypes("counted_configs"))
def test_forward_moves_its_inputs_and_outputs(op, config, dtype):
    """No more than 1.05 times the bytes of what it is given and returns, weights included, by the loads and stores of
    all its launches and by what PyTorch's kernels around them take and return.

    For as many samples as are trained on at once, from what few of them and 4 more move. Where a layer normalizes with
    the statistics of its batch, no row's activation is known before all rows were read: a pass over the rows for each
    such layer, and one that goes on. So often is each of their elements loaded, exactly, and all but the first count
    beside inputs and outputs.
    """
    B, *shape = config["shape"]
    passes = config.get("passes", 1)
    moved, given_and_returned = [], []
    for samples in (B, B + 4):
        arguments = op.make(config | {"shape": (samples, *shape)}, dtype)
        interpreter.launched.clear()
        with interpreter.BytesAround() as around:
            outs = op.forward(importlib.import_module(f"rankkernels._triton.{op.module}"), **arguments)
        launches = sum(memory.bytes_moved(arguments[op.streamed]) for memory in interpreter.launched)
        streamed = arguments[op.streamed]
        assert (sum(memory.loads_of(streamed) for memory in interpreter.launched) == passes).all()
        moved.append(launches + around.bytes)
        inputs = {**arguments, "grad_out": None}
        given_and_returned.append(tensor_bytes((inputs, outs)) + (passes - 1) * tensor_bytes(streamed))
    moved, given_and_returned = (few + (4096 - B) * (more - few) / 4 for few, more in (moved, given_and_returned))
    ratio = moved / given_and_returned
    print(f"| {op.module} {described(config)} {described(dtype)} | {ratio:.3f} of the inputs' and outputs' bytes |")
    assert 0.99 <= ratio <= 1.05


@pytest.mark.parametrize("valid", [0, 1, 33, 400])
def test_a_masked_history_is_read_to_its_last_valid_row(valid):
    """In whole blocks of rows, by the loads of every launch."""
    (op,) = (op for op in INTERPRETED if op.module == "din_attention")
    arguments = op.make({"shape": (2, 400, 5, 6), "activation": "sigmoid", "form": "mask"}, SINGLE)
    arguments["mask"][0] = torch.arange(400) == valid - 1
    interpreter.launched.clear()
    op.launch(importlib.import_module(f"rankkernels._triton.{op.module}"), **arguments)
    for memory in interpreter.launched:
        assert not memory.loads_of(arguments["history"][0, -(-valid // 32) * 32 :]).any()


EXTREMES = [torch.inf, -torch.inf, torch.nan, 6e4, -6e4, 100.0, -100.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "activation, batch_norm", [(a, n) for a in ACTIVATIONS for n in (True, False) if n or a != "dice_batch_norm"]
)
def test_extremes_have_torchs_value(activation, batch_norm):
    module = importlib.import_module("rankkernels._triton.norm_activation")
    x = torch.tensor(EXTREMES)[:, None].repeat(1, 5).requires_grad_()
    alpha = torch.full((5,), 0.25, requires_grad=True) if ACTIVATIONS[activation] else None
    stats = (torch.zeros(5), torch.ones(5)) if batch_norm else (None, None)
    flags = activation, batch_norm, False, 1e-5, 1e-3
    arguments = x.detach(), None, None, None if alpha is None else alpha.detach(), *stats
    norm = reference.BatchNorm(None, None, *stats, 1e-5) if batch_norm else None
    expected, _ = reference.norm_activation(x, norm, activation, alpha)
    out, batch_stats = module.norm_activation(*arguments, *flags)
    torch.testing.assert_close(out, expected.detach(), equal_nan=True)
    grad_x, grads = module.norm_activation_backward(torch.ones_like(out), batch_stats, *arguments, *flags)
    wanted = torch.autograd.grad(expected, [x] if alpha is None else [x, alpha], torch.ones_like(out))
    torch.testing.assert_close([grad_x, *grads], list(wanted), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_fm_of_infinities_is_the_references():
    module = importlib.import_module("rankkernels._triton.fm_interaction")
    x = torch.randn(5, 4, 6)
    x[1, 0, 2], x[2, 3, 2], x[3, 1, 5] = torch.inf, -torch.inf, torch.nan
    for reduce_sum in (True, False):
        torch.testing.assert_close(
            module.fm_interaction(x, reduce_sum), reference.fm_interaction(x, reduce_sum), equal_nan=True
        )


@pytest.mark.parametrize("config", [c for c in EMBEDDING_FM.configs if c.get("way") in (None, "adam")], ids=described)
def test_lookup_and_fm_in_one_pass_have_the_bits_of_their_parts(config):
    names = "embedding_bag", "fm_interaction", "embedding_fm"
    bag, fm, whole = (importlib.import_module(f"rankkernels._triton.{name}") for name in names)
    arguments = EMBEDDING_FM.make(config, SINGLE)
    names = "weights", "features", "gradients", "linear_weight"
    weights, features, (grad, grad_fm, grad_linear), linear_weight = (arguments[name] for name in names)
    (embeddings,) = bag.embedding_bag(weights, features, True)
    fields = embeddings.view(embeddings.size(0), len(features.indices), -1)
    out, grad_x = torch.empty_like(embeddings), torch.empty_like(fields)
    assert torch.equal(whole.embedding_fm(weights, features, out), fm.fm_interaction(fields, True))
    assert torch.equal(out, embeddings)
    whole.lookup_gradients(arguments["gradients"], embeddings, linear_weight, grad_x)
    parts = torch.zeros_like(fields) if grad_fm is None else fm.fm_interaction_backward(grad_fm, fields, True)
    parts = parts.flatten(1) if grad is None else parts.flatten(1) + grad
    if grad_linear is not None and linear_weight is not None:
        parts = torch.addcmul(parts, grad_linear, linear_weight)
    assert torch.equal(grad_x.flatten(1), parts)


def edited(module: str, folder: Path, old: str = "", new: str = "") -> ModuleType:
    """A copy of a kernels' module, and of those it is split into, with ``new`` for ``old`` in the source of one."""
    original = Path(importlib.util.find_spec(f"rankkernels._triton.{module}").origin)
    sources = {p.stem: p.read_text() for p in original.parent.glob(f"{module}*.py")}
    matches = sum(source.count(old) for source in sources.values())
    assert not old or matches == 1, f"the edit has to match once, and {old!r} matches {matches} times"
    for stem, source in sources.items():
        source = source.replace(old, new) if old else source
        (folder / f"edited_{stem}.py").write_text(source.replace("rankkernels._triton." + module, "edited_" + module))
    for name in [name for name in sys.modules if name.startswith("edited_")]:
        del sys.modules[name]
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module(f"edited_{module}")


def test_every_kernel_is_one_of_an_op():
    folder = Path(importlib.util.find_spec("rankkernels._triton").origin).parent
    with_kernels = {
        p.stem for p in folder.glob("*.py") if re.search(r"^@triton\.jit.*\ndef \w+_kernel\(", p.read_text(), re.M)
    }
    assert with_kernels and all(any(stem.startswith(op.module) for op in INTERPRETED) for stem in with_kernels), (
        with_kernels
    )


@pytest.mark.parametrize("op", INTERPRETED, ids=lambda op: op.module)
def test_unbroken_copy_passes(op, tmp_path):
    copy = edited(op.module, tmp_path)
    assert max(errors(op, copy, op.configs[0], SINGLE)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, what, old, new",
    [
        pytest.param(op, what, old, new, id=f"{op.module}-{what.replace(' ', '_')}")
        for op in INTERPRETED
        for what, old, new in op.mutations
    ],
)
def test_broken_copy_is_noticed(op, what, old, new, tmp_path):
    broken = edited(op.module, tmp_path, old, new)
    word = what.split(":")[0]
    for config in sorted(op.configs, key=lambda config: not config.get(word) and word not in map(str, config.values())):
        try:
            if max(errors(op, broken, config, BF16 if config.get("rounds") else SINGLE)) > 1:
                return
        except InterpreterError:
            return
    pytest.fail("no config of the op notices the edit")


@triton.jit
def fields_kernel(out_ptr, start, F, BLOCK: tl.constexpr):
    o, out = tl.arange(0, BLOCK), fields_of(start + tl.arange(0, BLOCK), F)
    tl.store(out_ptr + o, out[0])
    tl.store(out_ptr + BLOCK + o, out[1])


@pytest.mark.parametrize("F", [47, 5001, 2**15 + 1])
def test_fields_of_a_pair(F):
    """Where float32 rounds the root, too."""
    pairs = F * (F - 1) // 2
    for start in (0, (pairs - 1024) // 2, pairs - 1024):
        fields = torch.empty(2, 1024, dtype=torch.int32)
        fields_kernel[(1,)](fields, start, F, BLOCK=1024)
        f, g = fields.long()
        assert (0 <= f).all() and (f < g).all() and (g < F).all()
        assert torch.equal(f * (2 * F - f - 1) // 2 + g - f - 1, torch.arange(start, start + 1024))


# The bench itself.


def test_bfloat16_conversions_are_torchs():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(interpreter.bf16_to_float32(every.numpy().view(np.uint16)))
    assert torch.equal(wide.view(torch.int32), every.view(torch.bfloat16).float().view(torch.int32))
    bits = torch.randint(-(2**31), 2**31, (1 << 20,)).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    for x in (bits.view(torch.float32), ties.view(torch.float32), wide):
        actual = torch.from_numpy(interpreter.float32_to_bf16(x.numpy()).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(actual.isnan(), x.isnan())
        assert torch.equal(actual[~x.isnan()], x[~x.isnan()].to(torch.bfloat16))


@triton.jit
def cast_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, x * 1.5, mask=o < N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, SINGLE])
def test_casts_in_a_kernel_are_torchs(dtype):
    x, out = torch.randn(1000).to(dtype), torch.empty(1000, dtype=dtype)
    cast_kernel[(1,)](x, out, 1000, BLOCK=1024)
    assert torch.equal(out, (x.float() * 1.5).to(dtype))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)
    tile = o[:, None] * 16 + o[None, :]
    a, b = tl.load(a_ptr + tile), tl.load(b_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(a, b, input_precision=PRECISION))


def test_dots_have_the_precision_of_tensor_cores():
    a, b, out = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    for dtype in (torch.bfloat16, torch.float16):
        dot_kernel[(1,)](a.to(dtype), b.to(dtype), out, PRECISION="ieee")
        assert error(out, a.to(dtype).double() @ b.to(dtype).double()) < 1e-6
    dot_kernel[(1,)](a, b, out, PRECISION="ieee")
    assert error(out, a.double() @ b.double()) < 1e-6
    dot_kernel[(1,)](a, b, out, PRECISION="tf32")
    assert 1e-4 < error(out, a.double() @ b.double()) < 1e-3
    a = a.abs()  # what is cut off, and not rounded, adds up
    dot_kernel[(1,)](a, a, out, PRECISION="tf32")
    assert ((out.double() / (a.double() @ a.double()) - 1) < -2e-4).all()


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)
    tile = o[:, None] * 16 + o[None, :]
    a, b = tl.load(a_ptr + tile), tl.load(b_ptr + tile)
    tl.store(out_ptr + tile, product(a, b, tl.zeros([16, 16], tl.float32), PRECISION))


@pytest.mark.parametrize(
    "precision, tolerance", [("tf32", 3e-4), ("float16", 3e-4), ("bfloat16", 3e-3), ("ieee", 1e-6)]
)
def test_operands_are_rounded_to_nearest(precision, tolerance):
    a, b, out = torch.rand(16, 16), torch.rand(16, 16), torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, PRECISION=precision)
    exact = a.double() @ b.double()
    assert error(out, exact) < tolerance / 2 and abs((out.double() / exact - 1).mean()) < tolerance / 10


def test_infinities_and_nan_survive_rounding():
    a, out = torch.zeros(16, 16), torch.empty(16, 16)
    a[0, 0], a[1, 1] = torch.inf, -torch.inf
    a[2, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a GPU's own NaN
    product_kernel[(1,)](a, torch.ones(16, 16), out, PRECISION="tf32")
    assert (out[0] == torch.inf).all() and (out[1] == -torch.inf).all() and out[2].isnan().all()
    assert not out[3:].any()


@triton.jit
def misbehaving_kernel(x_ptr, out_ptr, N, stride, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    o = pid * BLOCK + tl.arange(0, BLOCK)
    if WHAT == "past the end":
        tl.store(out_ptr + o, tl.load(x_ptr + o * stride, mask=o < N + 1, other=0.0), mask=o < N)
    elif WHAT == "in a gap":
        tl.store(out_ptr + o, tl.load(x_ptr + o, mask=o < N, other=0.0), mask=o < N)
    elif WHAT == "store past the end":
        tl.store(out_ptr + o, tl.load(x_ptr + o * stride, mask=o < N, other=0.0))
    elif WHAT == "stored twice":
        tl.store(out_ptr + o % BLOCK, o * 1.0)
    elif WHAT == "read what is stored":
        tl.store(out_ptr + o, o * 1.0, mask=o < N)
        tl.store(out_ptr + o, tl.load(out_ptr + o, mask=o < N), mask=o < N)
    elif WHAT == "store what another reads":
        tl.store(out_ptr + o, tl.load(out_ptr + (N - 1 - o), mask=o < N, other=0.0), mask=o < N)
    elif WHAT == "atomic":
        tl.atomic_add(out_ptr + o, 1.0, mask=o < N)
    elif WHAT == "arithmetic in bfloat16":
        x = tl.load(x_ptr + o * stride, mask=o < N, other=0.0).to(tl.bfloat16)
        tl.store(out_ptr + o, x * x, mask=o < N)
    else:
        tl.store(out_ptr + o, tl.load(x_ptr + o * stride, mask=o < N, other=0.0), mask=o < N)


@pytest.mark.parametrize(
    "what, message",
    [
        ("past the end", "load outside"),
        ("in a gap", "load outside"),
        ("store past the end", "store outside"),
        ("stored twice", "stores what another one stores"),
        ("read what is stored", "loads what was stored"),
        ("store what another reads", "stores what another one loads|loads what was stored"),
        ("atomic", "atomic"),
        ("arithmetic in bfloat16", "convert to float32"),
        ("nothing", None),
    ],
)
def test_the_interpreter_objects(what, message):
    x, out = strided([30], SINGLE, "stepped"), torch.empty(30)
    launch = lambda: misbehaving_kernel[(4,)](x, out, 30, 2, WHAT=what, BLOCK=8)  # noqa: E731
    if message is None:
        launch()
        assert torch.equal(out, x)
    else:
        with pytest.raises(InterpreterError, match=message):
            launch()


def test_error_is_infinite_for_nan():
    assert error(torch.tensor([torch.nan, 1.0]), torch.ones(2)) == float("inf")
    assert error(torch.full((3,), 1.5), torch.ones(3, dtype=DOUBLE)) == 0.5
