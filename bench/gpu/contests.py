"""Who computes the same on a GPU, as contests to be raced: of attention, of the tests' cases, of embeddings, of whole
training steps.

"ours" is what a user of this package calls, "eager" the same of PyTorch's own modules. FBGEMM is a contender where it
is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankkernels as rk
from bench.gpu import plain
from bench.gpu.timing import Contest
from bench.harness.peers import fbgemm_copy
from rankkernels import ops, optim, reference
from rankkernels.testing import TOLERANCE, OpCase

#: Eager layers round behind each of their operations: results may differ by so many times TOLERANCE.
ROUNDINGS = 10


class Place(NamedTuple):
    """Where contests are made; ``small``: no size of theirs is above 16, for a rehearsal."""

    device: torch.device
    small: bool = False

    def of(self, size: int) -> int:
        return min(size, 16) if self.small else size


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def forward(function: Callable) -> Callable:
    def run(*inputs):
        with torch.no_grad():
            return [function(*inputs)]

    return run


def forward_backward(function: Callable, parameters: Sequence[Tensor] = ()) -> Callable:
    """The result, and the gradients of the inputs and the parameters."""

    def run(*inputs):
        out = function(*inputs)
        wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    return run


def draw(place: Place, dtype: torch.dtype, grad: bool, seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator(place.device).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=place.device).to(dtype).requires_grad_(grad) for s in shapes]


def attention(B: int, L: int, D: int, dims: Sequence[int], training: bool, dtype: torch.dtype, place: Place) -> Contest:
    """An activation unit with batch normalization and Dice, of padded histories."""
    B, L = place.of(B), place.of(L)
    torch.manual_seed(0)
    ours, eager = rk.ActivationUnit(D, dims=dims), plain.ActivationUnit(D, dims)
    eager.load_state_dict(ours.state_dict())
    units = {"ours": ours, "eager": eager}
    for unit in units.values():
        unit.to(place.device, dtype).train(training)

    def run(function: Callable, unit: nn.Module) -> Callable:
        return forward_backward(function, list(unit.parameters())) if training else forward(function)

    widths = (D, *dims, 1)
    products = sum(2 * B * L * a * b for a, b in zip(widths, widths[1:]))
    held = (B * L * D + B * D) * dtype.itemsize
    return Contest(
        functions={name: run(unit, unit) for name, unit in units.items()},
        make=lambda seed: draw(place, dtype, training, seed, (B, L, D), (B, D)),
        size=held,
        touched=held,
        moved=(held + B * D * dtype.itemsize) * (3 if training else 1),
        flops=products * (4 if training else 1),
        compiled=lambda: run(torch.compile(eager), eager),
        tolerance=ROUNDINGS * TOLERANCE[dtype],
    )


def of_case(case: OpCase, dtype: torch.dtype, backward: bool, place: Place) -> Contest:
    """A case against its reference."""
    run = forward_backward if backward else forward
    held = bytes_of(case.inputs(dtype))
    return Contest(
        functions={"ours": run(case.function), "eager": run(case.reference)},
        make=lambda seed: [
            t.to(place.device).requires_grad_(backward and t.is_floating_point()) for t in case.inputs(dtype, seed=seed)
        ],
        size=held,
        touched=held,
        moved=(3 if backward else 1) * case.elements * dtype.itemsize,
        flops=case.flops + (case.backward_flops if backward else 0),
        compiled=lambda: run(torch.compile(case.reference)),
        tolerance=ROUNDINGS * TOLERANCE[dtype],
    )


def made(make: Callable[..., OpCase], shape: Sequence[int], options: Sequence, backward: bool, place: Place) -> Contest:
    return of_case(make(*map(place.of, shape), *options), torch.float32, backward, place)


class Tables(NamedTuple):
    """T tables of R rows, D wide, and L ids of each a sample."""

    T: int
    R: int
    D: int
    B: int
    L: int

    def at(self, place: Place) -> Tables:
        return self._replace(R=place.of(self.R), B=place.of(self.B))

    @property
    def looked_up(self) -> int:
        """Bytes of the rows, counted for each lookup."""
        return 4 * self.T * self.B * self.L * self.D

    @property
    def pooled(self) -> int:
        return 4 * self.T * self.B * self.D

    def weights(self, place: Place, seed: int) -> list[Tensor]:
        return draw(place, torch.float32, False, seed, *[(self.R, self.D)] * self.T)

    def ids(self, place: Place, seed: int) -> list[Tensor]:
        generator = torch.Generator(place.device).manual_seed(seed)
        shape = (self.B, self.L)
        return [torch.randint(self.R, shape, generator=generator, device=place.device) for _ in range(self.T)]


CRITEO, LARGE = Tables(26, 100_000, 16, 65536, 1), Tables(8, 1_000_000, 64, 16384, 20)


def bags(weights: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """nn.EmbeddingBag's function, a table a call."""
    return torch.cat([F.embedding_bag(i, w, mode="sum") for i, w in zip(ids, weights)], 1)


def with_fbgemm(functions: dict, tables: Tables, weights: Sequence[Tensor], trained: bool, **options) -> dict:
    """With FBGEMM's operator on tables of its own as a contender, if it is installed for this device."""
    try:
        module = fbgemm_copy(weights, str(weights[0].device), **options)
    except Exception:  # not installed, or another build of it: its CPU build has the same name
        return functions
    offsets = torch.arange(0, tables.T * tables.B * tables.L + 1, tables.L, device=weights[0].device)

    def fbgemm(*inputs):
        out = module(torch.stack(inputs[-tables.T :]).flatten(), offsets)
        if trained:
            out.backward(torch.ones_like(out))
        return [out.detach()]

    return functions | {"FBGEMM": fbgemm}


def lookup(tables: Tables, place: Place) -> Contest:
    """Sums of bags. Each set has tables of its own: no row of it is in the cache when its turn comes."""
    tables = tables.at(place)
    T, modes = tables.T, ["sum"] * tables.T
    functions = {
        "ours": forward(lambda *t: rk.table_batched_embedding_bag(t[:T], t[T:], modes=modes, concat=True)[0]),
        "eager": forward(lambda *t: bags(t[:T], t[T:])),
    }
    return Contest(
        functions=with_fbgemm(functions, tables, tables.weights(place, 0), False),
        make=lambda seed: [*tables.weights(place, seed), *tables.ids(place, seed)],
        size=4 * T * tables.R * tables.D,
        touched=tables.looked_up,
        moved=tables.looked_up + tables.pooled + 8 * T * tables.B * tables.L,
        flops=tables.looked_up // 4,
        compiled=lambda: forward(torch.compile(lambda *t: bags(t[:T], t[T:]))),
    )


def lookup_fm(tables: Tables, place: Place) -> Contest:
    """Embeddings, FM and linear term of one id a table."""
    tables = tables.at(place)
    T, modes = tables.T, ["none"] * tables.T

    def eager(*t):
        fields = torch.stack([F.embedding(i, w) for i, w in zip(t[T + 1 :], t[:T])], 1)
        wide = fields.flatten(1)
        return torch.cat([wide, reference.fm_interaction(fields), F.linear(wide, t[T])], 1)

    def ours(*t):
        return torch.cat([o for o in ops.embedding_fm(t[:T], t[T + 1 :], t[T], modes=modes) if o is not None], 1)

    def make(seed):
        ids = [i.squeeze(1) for i in tables.ids(place, seed)]
        return [*tables.weights(place, seed), *draw(place, torch.float32, False, seed, (1, T * tables.D)), *ids]

    return Contest(
        functions={"ours": forward(ours), "eager": forward(eager)},
        make=make,
        size=4 * T * tables.R * tables.D,
        touched=tables.looked_up,
        moved=2 * tables.looked_up + 8 * T * tables.B,
        flops=5 * tables.looked_up // 4,
        compiled=lambda: forward(torch.compile(eager)),
        tolerance=ROUNDINGS * TOLERANCE[torch.float32],
    )


class Stepper(NamedTuple):
    """An optimizer of tables: ours, torch's of the dense gradient and FBGEMM's name of it, if they have it; the numbers
    it reads and writes a row beside the row, in rows; and whether it is ours that follows dense Adam."""

    own: Callable
    torchs: Callable | None
    fbgemms: str | None
    state: int
    exact: bool = False


ADAM = Stepper(optim.Adam, partial(torch.optim.Adam, fused=True), "ADAM", 2)
EXACT_ADAM = Stepper(partial(optim.Adam, exact=True), ADAM.torchs, None, 2, exact=True)
ROWWISE_ADAGRAD = Stepper(optim.RowWiseAdagrad, None, "EXACT_ROWWISE_ADAGRAD", 0)


def lookup_and_step(tables: Tables, optimizer: Stepper, place: Place) -> Contest:
    """Sums of bags, their backward and the optimizer's step: fused in ours and in FBGEMM's, dense in torch's."""
    tables, (own, torchs, fbgemms, state, exact) = tables.at(place), optimizer
    T, capturable = tables.T, place.device.type == "cuda" and not exact
    weights = tables.weights(place, 0)
    module = rk.TableBatchedEmbeddingBag([tables.R] * T, tables.D, device=place.device)
    dense = [nn.Parameter(w.clone()) for w in weights] if torchs else []
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights):
            parameter.copy_(weight)
    optim.fuse(module, own(module.parameters(), lr=1e-3, capturable=capturable))

    def ours(*ids):
        out = module(ids)
        out.backward(torch.ones_like(out))
        return [out.detach()]

    functions: dict[str, Callable] = {"ours": ours}
    if torchs:
        stepper = torchs(dense, lr=1e-3, capturable=capturable)

        def eager(*ids):
            out = bags(dense, ids)
            stepper.zero_grad()
            out.backward(torch.ones_like(out))
            stepper.step()
            return [out.detach()]

        functions["eager"] = eager
    if fbgemms:
        functions = with_fbgemm(functions, tables, weights, True, optimizer=fbgemms, learning_rate=1e-3)
    rows, held = tables.looked_up, 8 * T * tables.B * tables.L  # at most: a row looked up twice is stepped once
    return Contest(
        functions=functions,
        make=lambda seed: tables.ids(place, seed),
        size=held,
        touched=held if exact else (1 + state) * rows,  # many sets: rows are idle in between
        moved=rows + 2 * tables.pooled + 2 * (1 + state) * rows,
        flops=10 * rows // 4,
        graphs=not exact,
    )


def training_step(
    model: nn.Module, names: Sequence[str], place: Place, fused: bool, compiled: Callable = lambda model: model
) -> Callable:
    """A whole step of Adam: on the tables' rows in the backward if ``fused``, on everything by torch if not."""
    capturable = place.device.type == "cuda"
    embedded = list(model.embedding.parameters()) if fused else []
    if fused:
        optim.fuse(model, optim.Adam(embedded, lr=1e-3, capturable=capturable))
    others = [p for p in model.parameters() if all(p is not t for t in embedded)]
    stepper = torch.optim.Adam(others, lr=1e-3, capturable=capturable, fused=True)
    called = compiled(model)

    def step(*tensors):
        *x, y = tensors
        stepper.zero_grad()
        loss = F.binary_cross_entropy(called(dict(zip(names, x))), y)
        loss.backward()
        stepper.step()
        return [loss.detach()]

    return step


def steps(workload: Callable, plain_model: Callable, B: int, place: Place) -> Contest:
    """A model's training steps, each on another batch."""
    rows, B = place.of(100_000), place.of(B)
    made, eager = workload(rows, B), plain_model(rows)
    torch.manual_seed(0)
    ours, x, _ = made.ours()
    eager.load_state_dict(ours.state_dict())
    models = {"ours": ours, "eager": eager}
    functions = {n: training_step(m.to(place.device), list(x), place, n == "ours") for n, m in models.items()}

    def make(seed):
        batch, label = made.batch(seed=seed + 1)
        return [t.to(place.device) for t in (*batch.values(), label)]

    ids = sum(t.numel() for t in x.values() if not t.is_floating_point())
    width = next(iter(ours.embedding.parameters())).size(1)
    return Contest(
        functions=functions,
        make=make,
        size=8 * ids,
        touched=3 * 4 * ids * width,
        moved=8 * 4 * ids * width,
        flops=0,
        compiled=lambda: training_step(eager, list(x), place, False, torch.compile),
        tolerance=1e-4,
    )
