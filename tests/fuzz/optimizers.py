"""rankkernels.optim: steps against their formulas in float64, and arguments, groups and states that must be refused."""

from __future__ import annotations

import copy
import io
import math

import torch
from draw import Draw, Finding, check_close, check_unchanged, snapshot, tensors_of
from embedding import check_step, features, grads_for, own_memory, reference_grads, size_of_terms, touched_rows
from modules import refused_or_right
from torch import Tensor, nn

import rankkernels as rk
from rankkernels.ops._features import MODES
from rankkernels.ops.embedding_bag_update import RULES, state_shapes

KINDS = {"sgd": rk.optim.SGD, "adagrad": rk.optim.Adagrad, "rowwise_adagrad": rk.optim.RowWiseAdagrad,
         "adam": rk.optim.Adam, "adamw": rk.optim.AdamW, "ftrl": rk.optim.FTRL, "rowwise_adam": rk.optim.RowWiseAdam,
         "rowwise_rmsprop": rk.optim.RowWiseRMSprop}  # fmt: skip
NAMES = {kind: cls._states for kind, cls in KINDS.items()}


def settings(draw: Draw, kind: str) -> dict:
    """Hyperparameters that are right."""
    lr = draw.choice((0.0, 1e-3, 0.05))
    found = {
        "lr": torch.tensor(lr, dtype=torch.float64) if draw.chance(0.1) else lr,
        "max_row_norm": draw.choice((None, None, 0.5)),
    }
    if kind == "ftrl":
        return found | {"lr": draw.choice((0.01, 0.3)), "lr_power": draw.choice((-0.5, -0.5, -0.3)),
                        "beta": draw.choice((0.0, 1.0)), "l1": draw.choice((0.0, 0.2)),
                        "l2": draw.choice((0.0, 0.1))}  # fmt: skip
    if kind == "rowwise_rmsprop":
        found |= {"ar_alpha": draw.choice((0.0, 3.0)), "min_shrinkage": draw.choice((0.0, 0.1)),
                  "ema_beta": draw.choice((0.0, 0.9))}  # fmt: skip
    else:
        found["weight_decay"] = draw.choice((0.0, 0.1))
    if kind in ("adam", "adamw", "rowwise_adam"):
        found["betas"] = draw.choice(((0.9, 0.999), (0.0, 0.9), (0.5, 0.9), [0.8, 0.8]))
    if kind != "sgd":
        found["eps"] = draw.choice((1e-8, 1e-3))
    if kind == "adagrad":
        found |= {"lr_decay": draw.choice((0.0, 0.1)), "initial_accumulator_value": draw.choice((0.0, 0.1))}
    return found


def hyper(kind: str, group: dict, step: int) -> list[float]:
    """The settings of ``reference.optimizer_step``, in the schemas' order."""
    lr = float(group["lr"])
    if kind == "adagrad":
        lr /= 1 + (step - 1) * group["lr_decay"]
    common = [
        *group.get("betas", (0.0, group.get("ema_beta", 0.0))),
        group.get("eps", 0.0),
        group.get("weight_decay", 0.0),
    ]
    own = [group[name] for name in RULES[kind].settings]
    return [lr, *map(float, common), step, 1.0, group["max_row_norm"] or 0.0, 0.0, *map(float, own)]


def new_states(kind: str, w: Tensor, group: dict) -> list[Tensor]:
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    value = group.get("initial_accumulator_value", 0.0)
    return [torch.full(shape, value, dtype=dtype) for shape in state_shapes(kind, w.shape)]


def looked_up(a: dict, weights: list[Tensor], sparse: bool, optimizer) -> list[Tensor]:
    def given(values):
        return [None if t.shape == (0,) and a["indices"][f].shape != (0,) else t for f, t in enumerate(values)] or None

    return rk.table_batched_embedding_bag(
        weights, a["indices"], modes=[MODES[m] for m in a["modes"]], tables=a["tables"], offsets=given(a["offsets"]),
        per_sample_weights=given(a["per_sample_weights"]), padding_idx=[None if p < 0 else p for p in a["padding_idx"]],
        frozen_rows=[None if r < 0 else r for r in a["frozen_rows"]], sparse=sparse, optimizer=optimizer,
    )  # fmt: skip


def group_of(optimizer, p: Tensor) -> dict:
    return next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))


def exact_sum(grad: Tensor) -> Tensor:
    """A sparse gradient, its values added up in float64."""
    return torch.sparse_coo_tensor(
        grad._indices(), grad._values().double(), grad.shape, check_invariants=False
    ).to_dense()


def one_step(draw: Draw, kind: str, optimizer, a: dict, weights: list, fused: bool) -> None:
    """A forward and a backward of one or two lookups and the step, against the formula."""
    a = {**a, "weights": weights}
    # torch does not add two sparse gradients in float16.
    twice = fused or all(w.dtype != torch.float16 for w in weights)
    lookups = [grads_for(draw, a) for _ in range(draw.choice((1, 1, 1, 2)) if twice else 1)]
    gradients = [reference_grads(a, grads)[0] for grads in lookups]
    old, steps = [], []
    for w in weights:
        state = optimizer.state.get(w)
        states = [state[n].clone() for n in NAMES[kind]] if state else new_states(kind, w, group_of(optimizer, w))
        old.append((w.detach().clone(), states))
        steps.append(1 + (state["step"] if state else 0))
        w.grad = None
    total = 0.0
    for grads in lookups:
        outs = looked_up(a, weights, not fused, optimizer if fused else None)
        total = total + sum((o * g).sum().double() for o, g in zip(outs, grads) if g is not None)
    total.backward()
    given = [None if w.grad is None else exact_sum(w.grad) for w in weights]
    optimizer.step()
    for t, w in enumerate(weights):
        used = [f for f, i in enumerate(a["tables"]) if i == t]
        if not any(grads[f] is not None for grads in lookups for f in used):
            if not torch.equal(w, old[t][0]) or optimizer.state.get(w, {"step": 0})["step"] != steps[t] - 1:
                raise Finding(f"{kind}: a step on table {t}, which has no gradient")
            continue
        rows = torch.cat([touched_rows(a, grads, t) for grads in lookups]).unique()
        floor = max(1.0, sum(0.1 * size_of_terms(a, grads)[t] for grads in lookups))
        state = optimizer.state[w]
        if state["step"] != steps[t]:
            raise Finding(f"{kind}: step {state['step']} of table {t}, expected {steps[t]}")
        new = w.detach(), [state[n] for n in NAMES[kind]]
        grad = sum(g[t] for g in gradients)
        if given[t] is not None:  # what was rounded before the step is not the step's doing
            check_close(f"{kind}, gradient of table {t}", given[t].to(w.dtype), grad, w.dtype, floor)
            grad, floor = given[t], 1.0
        check_step(f"{'fused' if fused else 'stepped'}", kind, hyper(kind, group_of(optimizer, w), steps[t]), old[t],
                   new, rows, grad, floor)  # fmt: skip


def restarted(draw: Draw, kind: str, optimizer, weights: list):
    """The same optimizer from its state_dict, perhaps by way of a file or of torch's optimizer."""
    state = optimizer.state_dict()
    way = draw.choice(("dict", "file", "torch"))
    if way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file)
    theirs = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam,
              "adamw": torch.optim.AdamW}.get(kind)  # fmt: skip
    if way == "torch" and theirs and not any(g["max_row_norm"] for g in optimizer.param_groups):
        other = theirs([{"params": g["params"]} for g in optimizer.param_groups])
        try:
            state = rk.optim.to_torch(optimizer, other).state_dict()
        except ValueError as error:  # what torch would keep in float16 may be beyond it
            if "torch.float16 has no number for" not in str(error):
                raise
    fresh = KINDS[kind]([{"params": g["params"]} for g in optimizer.param_groups], lr=0.7)
    fresh.load_state_dict(state)
    return fresh


def valid(draw: Draw) -> None:
    kind, fused = draw.choice(list(KINDS)), draw.chance(0.5)
    a = features(draw, False, overlap=False)
    weights = [nn.Parameter(own_memory(draw, w).detach()) for w in a["weights"]]
    cut = draw.randint(1, len(weights))
    first = settings(draw, kind)
    optimizer = KINDS[kind](weights[:cut], **first)
    if cut < len(weights):
        optimizer.add_param_group({"params": weights[cut:], **settings(draw, kind)})
    for _ in range(draw.randint(1, 3)):
        one_step(draw, kind, optimizer, a, weights, fused)
        if draw.chance(0.3):
            optimizer = restarted(draw, kind, optimizer, weights)
        if kind != "ftrl" and draw.chance(0.2):
            optimizer.param_groups[0]["lr"] = 0.01


# ---- what is wrong

NUMBERS = (-1.0, -0.0, 0.0, math.nan, math.inf, -math.inf, None, "x", [], (0.9,), (0.9, 1.0), (math.nan, 0.9),
           (0.9, 0.9, 0.9), torch.ones(2), torch.tensor(-1.0), torch.tensor(math.nan), 1e-46, 1e300, True, 2**70, 1j,
           {}, object())  # fmt: skip


def is_number(x, low: float, high: float) -> bool:
    return not isinstance(x, (str, complex)) and low <= float(x) < high


def fits(kind: str, group: dict) -> bool:
    """Whether a group has numbers to step with."""
    positive = ("lr", "weight_decay", "lr_decay", "initial_accumulator_value", "eps", "beta", "l1", "l2", "ar_alpha")
    numbers = [group[n] for n in positive if n in group]
    betas, clip = group.get("betas", (0.0, 0.0)), group["max_row_norm"]
    return (
        all(is_number(x, 0, math.inf) for x in numbers)
        and (kind != "ftrl" or float(group["lr"]) > 0 and is_number(-float(group["lr_power"]), 0, math.inf))
        and (kind != "rowwise_rmsprop" or is_number(group["min_shrinkage"], 0, 1.0001))
        and is_number(group.get("ema_beta", 0.0), 0, 1)
        and len(betas) == 2
        and all(is_number(b, 0, 1) for b in betas)
        and (clip is None or is_number(clip, 1e-38, math.inf) or float(clip) == math.inf)
    )


def made(draw: Draw, kind: str) -> tuple:
    """An optimizer of two tables after a step."""
    dtype = draw.choice((torch.float32, torch.float64, torch.bfloat16))
    weights = [nn.Parameter(draw.normal((r, d), dtype)) for r, d in ((7, 3), (5, 4))]
    groups = [{"params": weights}] if draw.chance(0.5) else [{"params": [w]} for w in weights]
    optimizer = KINDS[kind](groups, **settings(draw, kind))
    if draw.chance(0.8):
        sparse_step(draw, optimizer, weights)
    return optimizer, weights


def sparse_step(draw: Draw, optimizer, weights: list) -> None:
    for w in weights:
        rows = torch.tensor([[1, 3]])
        values = draw.normal((2, w.size(1)), w.dtype)
        w.grad = torch.sparse_coo_tensor(rows, values, w.shape, is_coalesced=True, check_invariants=False)
    optimizer.step()


def picture(optimizer) -> str:
    """All there is of an optimizer, to be compared."""
    state = {i: {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()}
             for i, s in enumerate(optimizer.state.values())}  # fmt: skip
    return repr((state, [[(k, v) for k, v in g.items() if k != "params"] for g in optimizer.param_groups],
                 [[id(p) for p in g["params"]] for g in optimizer.param_groups]))  # fmt: skip


def check_usable(draw: Draw, what: str, kind: str, optimizer) -> None:
    """An optimizer that was accepted has numbers to step with and state of the right form, and takes a step."""
    for group in optimizer.param_groups:
        if not fits(kind, group):
            raise Finding(f"{what}: accepted, with {[(k, v) for k, v in group.items() if k != 'params']}")
        for p in group["params"]:
            if not (isinstance(p, Tensor) and p.dim() == 2 and p.is_floating_point()):
                raise Finding(f"{what}: accepted a table {p!r}"[:300])
            state = optimizer.state.get(p)
            if not state:
                continue
            right = new_states(kind, p, group)
            if set(state) != {"step", *NAMES[kind]} or type(state["step"]) is not int or state["step"] < 0:
                raise Finding(f"{what}: accepted a state of {list(state)}, step {state.get('step')!r}")
            for name, like in zip(NAMES[kind], right):
                s = state[name]
                if s.shape != like.shape or s.dtype != like.dtype or s.device != p.device or s.layout != like.layout:
                    raise Finding(f"{what}: accepted {name} of {s.dtype} {list(s.shape)} on {s.device}, {s.layout}")
    tables = [p for g in optimizer.param_groups for p in g["params"] if p.size(0) > 3 and p.device.type == "cpu"]
    refused_or_right(what, lambda: sparse_step(draw, optimizer, tables))


def odd_table(draw: Draw):
    """What is no table, or one of its own."""
    w = draw.normal((6, 2), torch.float32)
    return draw.choice((
        nn.Parameter(w[0].clone()), nn.Parameter(w[None].clone()), nn.Parameter(w.cfloat()), w.long(), None, 3, "x",
        w.clone().requires_grad_() * 2, nn.Parameter(w.clone()), [], nn.Parameter(w.to_sparse()),
        nn.Parameter(w.to(torch.float8_e5m2)), nn.Parameter(w.to("meta")),
    ))  # fmt: skip


def wrong_group(draw: Draw, kind: str, old: list) -> dict:
    group = {"params": [nn.Parameter(draw.normal((6, 2), torch.float32))], **settings(draw, kind)}
    way = draw.choice(("number", "number", "number", "table", "known", "no group"))
    if way == "number":
        group[draw.choice([k for k in group if k != "params"])] = draw.choice(NUMBERS)
    elif way == "table":
        group["params"] = draw.choice((odd_table(draw), [odd_table(draw)], [*group["params"], odd_table(draw)]))
    elif way == "known":
        group["params"] = draw.choice((old[:1], [*group["params"], old[1]], group["params"] * 2))
    else:
        group = draw.choice((None, [], {}, {"lr": 0.1}, {"params": None}))
    return group


def changed(draw: Draw, kind: str, state_dict: dict, depth: int = 0):
    """A state_dict with one thing in it deleted, added or exchanged."""
    bad = (*NUMBERS, torch.ones(7, 3), torch.full((7, 3), math.nan), torch.ones(7), torch.ones(5, 4).cfloat(), 1.5, -3,
           torch.tensor(2.0), torch.ones(7, 3).to_sparse(), torch.ones(7, 3, device="meta"), torch.ones(7, 3).long(),
           torch.ones(1, 3).expand(7, 3))  # fmt: skip
    new = copy.copy(state_dict)
    keys = list(new) if isinstance(new, dict) else list(range(len(new)))
    key = draw.choice(keys)
    inner = new[key]
    if isinstance(inner, (dict, list)) and len(inner) and draw.chance(0.85 if depth < 3 else 0):
        new[key] = changed(draw, kind, inner, depth + 1)
    elif isinstance(inner, Tensor) and inner.layout == torch.strided and inner.dim() and draw.chance(0.5):
        ways = [inner.double(), inner.half(), inner[:-1], inner[None], inner.to("meta"), inner.long(), -inner]
        if inner.dim() == 2:
            ways.append(inner.t())
        if not inner.is_meta:
            ways.append(inner.to_sparse())
        new[key] = draw.choice(ways)
    elif draw.chance(0.3):
        del new[key]
    elif draw.chance(0.2) and isinstance(new, dict):
        new[draw.choice(("more", 5, "momentum", "amsgrad", "step"))] = draw.choice(bad)
    else:
        new[key] = draw.choice(bad)
    return new


def wrong(draw: Draw) -> None:
    """A constructor, a group or a state with one thing wrong: refused, and nothing has changed; or of use."""
    kind = draw.choice(list(KINDS))
    cls = KINDS[kind]
    way = draw.choice(("constructor", "add_param_group", "load_state_dict", "load_state_dict"))
    what = f"{cls.__name__}, {way}"
    if way == "constructor":
        group = wrong_group(draw, kind, [nn.Parameter(torch.ones(2, 2)) for _ in range(2)])
        options = {k: v for k, v in group.items() if k != "params"} if isinstance(group, dict) else {}
        params = group.get("params") if isinstance(group, dict) else group
        given = (params, options) if draw.chance(0.5) else ([group], {})
        optimizer = refused_or_right(what, lambda: cls(given[0], **given[1]))
        if optimizer is not None:
            check_usable(draw, what, kind, optimizer)
        return
    optimizer, weights = made(draw, kind)
    before, tables = picture(optimizer), snapshot(tensors_of(weights))
    if way == "add_param_group":
        group = wrong_group(draw, kind, weights)
        call = lambda: optimizer.add_param_group(group) or True  # noqa: E731
    else:
        state = copy.deepcopy(optimizer.state_dict())
        for _ in range(draw.choice((1, 1, 2))):
            state = changed(draw, kind, state)
        call = lambda: optimizer.load_state_dict(state) or True  # noqa: E731
    accepted = refused_or_right(what, call)
    check_unchanged(tables, what)
    if accepted is not None:
        check_usable(draw, what, kind, optimizer)
    elif picture(optimizer) != before:
        raise Finding(f"{what}: refused, but the optimizer has changed")
