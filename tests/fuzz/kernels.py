"""The other ops through ``rankkernels.testing``'s cases: interactions, norm_activation, din_attention; and
linear_weight_grad and deepfm."""

from __future__ import annotations

import torch
from draw import FLOATS, Draw, Finding, check_close, check_unchanged, refused, snapshot
from torch import Tensor

from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops.bilinear_interaction import KINDS
from rankkernels.testing import (
    TOLERANCE,
    OpCase,
    augru_case,
    bilinear_interaction_case,
    cross_layer_case,
    cross_network_case,
    din_attention_case,
    ffm_interaction_case,
    fm_interaction_case,
    mixed_cross_layer_case,
    mixed_experts_case,
    norm_activation_case,
    pairwise_dot_case,
    target_attention_case,
)

ops = torch.ops.rankkernels


def drawn_case(draw: Draw, op: str) -> OpCase:
    if op == "fm_interaction":
        return fm_interaction_case(draw.size(), draw.randint(1, 40), draw.width(), draw.chance(0.5))
    if op == "augru":
        form = draw.choice(("padded", "lengths"))
        sizes = draw.size(), draw.randint(0, 12), max(draw.size(70), 1), max(draw.size(70), 1)
        return augru_case(*sizes, draw.chance(0.5), form)
    if op == "target_attention":
        form, users = draw.choice(("padded", "lengths", "mask", "offsets")), draw.choice((None, draw.randint(1, 9)))
        sizes = max(draw.size(40), 2), draw.randint(1, 9), max(draw.size(150), 1), max(draw.size(70), 1)
        return target_attention_case(*sizes, form, users)
    if op == "cross_network":
        return cross_network_case(draw.size(), int(draw.width()), draw.randint(0, 7))
    if op == "pairwise_dot":
        return pairwise_dot_case(draw.size(), draw.randint(0, 40), draw.width(), draw.chance(0.5))
    if op == "cross_layer":
        return cross_layer_case(draw.size(), int(draw.width()), draw.chance(0.7))
    if op == "mixed_experts":
        return mixed_experts_case(draw.size(), draw.randint(1, 9), draw.size(70))
    if op == "mixed_cross_layer":
        return mixed_cross_layer_case(draw.size(), int(draw.width()), draw.randint(1, 9), draw.size(70))
    if op == "ffm_interaction":
        return ffm_interaction_case(draw.size(40), draw.randint(0, 9), draw.width(), draw.chance(0.5))
    if op == "bilinear_interaction":
        return bilinear_interaction_case(draw.size(), draw.randint(0, 9), max(draw.size(40), 1), draw.choice(KINDS))
    activation = draw.choice(list(ACTIVATIONS))
    training = draw.chance(0.5)
    if op == "norm_activation":
        batch_norm = activation == "dice_batch_norm" or draw.chance(0.5)
        N = max(draw.size(), 8 if training and batch_norm else 0)
        return norm_activation_case(N, max(draw.size(), 1), activation, batch_norm, draw.chance(0.7), training)
    B, L, form = max(draw.size(40), 2), max(draw.size(70), 2), draw.choice(("padded", "lengths", "mask", "offsets"))
    widths = [max(draw.size(70), 1) for _ in range(draw.randint(0, 2))]
    dropout = draw.choice((0.0, 0.0, 0.3))
    options = dict(batch_norm=draw.chance(0.5), use_softmax=draw.chance(0.4), training=training)
    options |= dict(count_padding=draw.chance(0.3), return_scores=draw.chance(0.2))
    options |= dict(users=draw.randint(1, 2 * B) if draw.chance(0.4) else None)
    return din_attention_case(B, L, max(draw.size(70), 1), widths, activation, form=form, dropout=dropout, **options)


def compare(draw: Draw, op: str, case: OpCase, dtype: torch.dtype) -> None:
    """Result and gradients against the reference in float64 on the same values, inputs in any strides."""
    inputs = [draw.strided(t.detach()).requires_grad_(t.is_floating_point()) for t in case.inputs(dtype)]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    before = snapshot(inputs)
    out, right = case.function(*inputs), case.reference(*exact)
    # Sums over pairs and batch statistics cancel: errors are of the size of what is summed.
    scale = max([t.detach().double().norm().item() for t in inputs if t.is_floating_point()], default=0.0)
    check_close(op, out, right, dtype, 0.1 * scale)
    grad = draw.strided(draw.normal(out.shape, dtype), overlap=True)
    found = torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad, allow_unused=True)
    wanted = [t for t in exact if t.requires_grad]
    expected = torch.autograd.grad(right, wanted, grad.double(), allow_unused=True)
    expected = [torch.zeros_like(x) if g is None else g for g, x in zip(expected, wanted)]
    floor = 0.1 * max([g.norm().item() for g in expected], default=0.0)
    floor = max(floor, 4 * torch.finfo(dtype).eps * grad.norm().item() / TOLERANCE[dtype])  # where all of them cancel
    if op == "target_attention":  # <g, x> - <g, out> cancels where one row weighs all
        rows = inputs[1].detach().double().norm(dim=-1).flatten().tolist()
        floor = max(floor, 0.1 * grad.norm().item() * max(rows, default=0.0) ** 2)
    moved = moved_by_rounding(case, exact, grad, expected)
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for i, (g, e, far) in enumerate(zip(found, expected, moved)):
        if g is None:
            raise Finding(f"{op}: no gradient of input {i}")
        check_close(f"the gradient of {op}, input {i}", g, e, dtype, max(floor, 16 * unit * far / TOLERANCE[dtype]))
    check_unchanged(before, op)


def moved_by_rounding(case: OpCase, exact: list[Tensor], grad: Tensor, expected: list[Tensor]) -> list[float]:
    """How far each gradient of the reference in float32 is from ``expected``: one unit between two normalizations has a
    gradient that is a difference a million times as small as its terms."""
    rough = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in exact]
    leaves = [t for t in rough if t.requires_grad]
    found = torch.autograd.grad(case.reference(*rough), leaves, grad.float(), allow_unused=True)
    return [0.0 if g is None else (g.double() - e).norm().item() for g, e in zip(found, expected)]


def valid(op: str):
    def run(draw: Draw) -> None:
        case = drawn_case(draw, op)
        # Nearly equal rows in 16 bits amplify rounding in batch statistics beyond any tolerance: these have a few rows.
        with_statistics = op in ("norm_activation", "din_attention")
        dtype = draw.choice((torch.float32, torch.float64)) if with_statistics else draw.dtype()
        compare(draw, op, case, dtype)

    return run


def spoiled(draw: Draw, t: Tensor) -> Tensor:
    """Another shape, dtype, layout or device."""
    ways = [t[None], torch.cat([t, t[:1]]) if t.dim() and t.size(0) else t[None, None]]
    if t.is_floating_point():
        ways += [t.to(torch.complex64), t.to(torch.int64)]
        ways += [t.to(d) for d in FLOATS if d != t.dtype and d.itemsize != 2][:1]
    else:
        ways += [t.to(torch.float32), t.to(torch.complex64)]
    if t.dim():
        ways += [t.to("meta"), t.to_sparse()]
    return draw.choice(ways)


def wrong(op: str):
    """One tensor of the schema, or its activation, wrong. Vectors may have another dtype than x in these ops, and FM
    takes any number of rows: such calls may be right, and are tried for crashes and for what they say."""

    def run(draw: Draw) -> None:
        case = drawn_case(draw, op)
        dtype = draw.choice(list(TOLERANCE))
        arguments = list(case.arguments(*[t.detach() for t in case.inputs(dtype)]))
        names = [a.name for a in case.overload._schema.arguments]
        overload, backward = case.overload, draw.chance(0.5)
        if backward:
            saved = case.overload(*arguments)
            saved = list(saved) if isinstance(saved, (list, tuple)) else [saved]
            overload = getattr(ops, f"{op}_backward").default
            names = [a.name for a in overload._schema.arguments]
            arguments = [torch.randn_like(saved[0]), *saved[1:], *arguments][: len(names)]
        i = draw.randrange(len(arguments))
        if draw.chance(0.1) and "activation" in names:
            i = names.index("activation")
        value = arguments[i]
        may_be_right = True
        if isinstance(value, Tensor):
            arguments[i] = spoiled(draw, value)
        elif isinstance(value, list) and value:
            j = draw.randrange(len(value))
            arguments[i] = [*value]
            if draw.chance(0.3):
                arguments[i] = value[:-1]
            else:
                arguments[i][j] = spoiled(draw, value[j])
        elif names[i] == "activation":
            arguments[i] = draw.choice((-1, 7, 2**40))
            may_be_right = False
        else:
            return
        what = f"{op}{'_backward' if backward else ''}, {names[i]}"
        try:
            refused(what, op, lambda: overload(*arguments), arguments)
        except Finding as finding:
            if not (may_be_right and str(finding).endswith(": accepted")):
                raise

    return run


def linear_weight_grad(draw: Draw) -> None:
    N, M, K = draw.size(), draw.size(), draw.size()
    dy, x = (draw.strided(draw.normal((N, n), torch.float32), overlap=True) for n in (M, K))
    out = ops.linear_weight_grad.default(dy, x)
    right = dy.double().t() @ x.double()
    check_close("linear_weight_grad", out, right, torch.float32, 0.1 * (dy.norm() * x.norm()).item())


def linear_weight_grad_wrong(draw: Draw) -> None:
    arguments = [draw.normal((max(draw.size(), 2), max(draw.size(), 2)), torch.float32) for _ in range(2)]
    i = draw.randrange(2)
    arguments[1] = arguments[1][:1].expand(arguments[0].size(0), -1)
    t = arguments[i].clone()
    arguments[i] = draw.choice((t[None], t[:-1], t.double(), t.half(), t.long(), t.cfloat(), t.flatten(), t.to_sparse(),
                                t.to("meta")))  # fmt: skip
    refused("linear_weight_grad", "linear_weight_grad", lambda: ops.linear_weight_grad.default(*arguments), arguments)


def deepfm_arguments(draw: Draw) -> dict:
    F, D, B = draw.randint(1, 12), max(draw.size(64), 1), draw.size()
    weights = [draw.normal((max(draw.size(), 1), D), torch.float32) for _ in range(F)]
    ids = [draw.ids(w.size(0), (B,)) for w in weights]
    n = draw.choice((0, 0, 1, 5))
    mlp, width = [], F * D + n
    for w in [*(max(draw.size(80), 1) for _ in range(draw.randint(1, 3))), 1]:
        mlp += [draw.normal((w, width), torch.float32) * width**-0.5, draw.normal((w,), torch.float32)]
        width = w
    return {
        "weights": weights, "indices": ids, "tables": list(range(F)),
        "names": "\n".join(f"feature_{f}" for f in range(F)),
        "linear_weight": draw.normal((1, F * D), torch.float32),
        "dense": draw.normal((B, n), torch.float32) if n else None,
        "mlp": mlp,
    }  # fmt: skip


def deepfm(draw: Draw) -> None:
    a = deepfm_arguments(draw)
    out = ops.deepfm.default(**a)
    x = torch.cat([w.double()[i.long()] for w, i in zip(a["weights"], a["indices"])], 1)
    fields = x.view(x.size(0), len(a["indices"]), a["weights"][0].size(1))
    fm = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1, keepdim=True)
    linear = x @ a["linear_weight"].double().t()
    y = x if a["dense"] is None else torch.cat([x, a["dense"].double()], 1)
    for i in range(0, len(a["mlp"]), 2):
        y = torch.nn.functional.linear(y.relu() if i else y, a["mlp"][i].double(), a["mlp"][i + 1].double())
    check_close("deepfm", out, fm + linear + y, torch.float32, 0.1 * fields.sum(1).square().sum(1).norm().item())


def deepfm_wrong(draw: Draw) -> None:
    a = deepfm_arguments(draw)
    key = draw.choice(("weights", "indices", "tables", "linear_weight", "dense", "mlp"))
    if key == "tables":
        a[key] = draw.choice((a[key][:-1], [*a[key], 0], [-1, *a[key][1:]], [len(a["weights"]), *a[key][1:]]))
    elif isinstance(a[key], list):
        i = draw.randrange(len(a[key]))
        t = a[key][i]
        a[key] = [*a[key]]
        a[key][i] = draw.choice((t[None], t.to(torch.float64), t.to(torch.complex64), t.new_zeros(()), t[..., None]))
    elif a[key] is None:
        a[key] = torch.randn(3)
    else:
        a[key] = draw.choice((a[key].double(), a[key].flatten()[1:], a[key].cfloat()))
    refused(f"deepfm, {key}", "", lambda: ops.deepfm.default(**a), a)
