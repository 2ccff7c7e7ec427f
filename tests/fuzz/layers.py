"""FM, LR, Dice, MLP and ActivationUnit against torch-rechub's."""

from __future__ import annotations

import copy

import torch
from draw import Draw, Finding
from kernels import spoiled
from modules import Trial, check, check_wrong, refused_or_right
from torch import Tensor, nn
from torch_rechub.basic import activation as rechub_activation
from torch_rechub.basic import layers as rechub
from torch_rechub.models.ranking import din as rechub_din

import rankkernels as rk
from rankkernels import reference

ACTIVATIONS = ("sigmoid", "relu", "dice", "prelu", "softmax", "leakyrelu", "Dice", "RELU", nn.Tanh)
KINKED = ("relu", "prelu", "leakyrelu", "RELU")


def pair(draw: Draw, ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, training: bool) -> tuple:
    """Both with the same random weights and running statistics; ``theirs`` in float64."""
    with torch.no_grad():
        for m in theirs.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.weight.normal_(), m.bias.normal_()
                m.num_batches_tracked.fill_(draw.randint(0, 3))
            elif isinstance(m, nn.Embedding):
                m.weight.normal_()
    theirs.to(dtype)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    if type(theirs).__module__.startswith("torch_rechub.") and draw.chance(0.2):  # theirs, made ours
        ours = rk.accelerate(copy.deepcopy(theirs))
    return ours.train(training), theirs.double()


def precision(draw: Draw) -> torch.dtype:
    return draw.choice((torch.float32, torch.float64))


def rows(draw: Draw, training: bool) -> int:
    """In training the statistics of a few rows amplify rounding."""
    return max(draw.size(draw.choice((40, 300, 1200))), 8 if training else 0)


def fm(draw: Draw) -> Trial:
    reduce_sum, dtype = draw.chance(0.5), draw.dtype()
    x = draw.strided(draw.normal((draw.size(), draw.randint(1, 40), draw.width()), dtype))
    return Trial("FM", rk.FM(reduce_sum), rechub.FM(reduce_sum), [x], dtype)


def lr(draw: Draw) -> Trial:
    width, sigmoid, dtype, training = max(draw.size(), 1), draw.chance(0.5), precision(draw), draw.chance(0.5)
    ours, theirs = pair(draw, rk.LR(width, sigmoid), rechub.LR(width, sigmoid), dtype, training)
    return Trial("LR", ours, theirs, [draw.strided(draw.normal((draw.size(), width), dtype))], dtype)


def dice(draw: Draw) -> Trial:
    epsilon, dtype = draw.choice((1e-3, 1e-8, 0.5)), precision(draw)
    ours, theirs = pair(draw, rk.Dice(epsilon), rechub_activation.Dice(epsilon), dtype, draw.chance(0.5))
    shape = (draw.size(), max(draw.size(), 2), *([draw.randint(1, 5)] if draw.chance(0.2) else []))
    return Trial("Dice", ours, theirs, [draw.strided(draw.normal(shape, dtype))], dtype)


def mlp_arguments(draw: Draw) -> dict:
    return {
        "dims": [max(draw.size(90), 1) for _ in range(draw.randint(0, 3))],
        "activation": draw.choice(ACTIVATIONS),
        "dropout": draw.choice((0, 0, 0.3)),
    }


def mlp(draw: Draw) -> Trial:
    width, dtype, training = max(draw.size(), 1), precision(draw), draw.chance(0.5)
    arguments = {"input_dim": width, "output_layer": draw.chance(0.7), **mlp_arguments(draw)}
    ours, theirs = pair(draw, rk.MLP(**arguments), rechub.MLP(**arguments), dtype, training)
    x = draw.strided(draw.normal((rows(draw, training), width), dtype))
    return Trial("MLP", ours, theirs, [x], dtype, arguments["activation"] not in KINKED)


class Unit(rechub_din.ActivationUnit):
    """torch-rechub's, of the valid rows alone where a keyword says which these are."""

    def forward(self, history: Tensor, target: Tensor, **form: Tensor) -> Tensor:
        offsets = form.get("offsets")
        valid, sample, _ = reference.valid_rows(history, form.get("lengths"), form.get("mask"), offsets)
        score = self.attention(reference.attention_input(valid, target, sample)).squeeze(1)
        return reference.attention_pool(score, valid, sample, target.size(0), self.use_softmax)


def form_of(draw: Draw, B: int, L: int) -> tuple[str, dict, Tensor]:
    """Which rows of a history are valid: its name, the keyword, and a mask."""
    form = draw.choice(("padded", "lengths", "mask", "offsets"))
    counts = torch.randint(0, L + 1, (B,), generator=draw.generator)
    counts[: B // 2 + 1] = L
    mask = torch.arange(L) < counts[:, None]
    if form == "mask":
        mask = mask[:, torch.randperm(L, generator=draw.generator)]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    keywords = {"lengths": {"lengths": counts}, "mask": {"mask": mask}, "offsets": {"offsets": offsets}}
    return form, keywords.get(form, {}), mask


def activation_unit(draw: Draw) -> Trial:
    dtype, training, softmax = precision(draw), draw.chance(0.5), draw.chance(0.4)
    B, L, D = max(draw.size(40), 4), max(draw.size(60), 4), max(draw.size(40), 1)
    dims = [max(draw.size(60), 1) for _ in range(draw.randint(0, 2))]
    arguments = {"emb_dim": D, "dims": dims, "activation": draw.choice(ACTIVATIONS), "use_softmax": softmax}
    form, keywords, mask = form_of(draw, B, L)
    kind = rechub_din.ActivationUnit if form == "padded" else Unit
    dropout = draw.choice((0, 0.3)) if not training else 0  # its mask is of a generator of its own
    ours, theirs = pair(draw, rk.ActivationUnit(**arguments, dropout=dropout), kind(**arguments), dtype, training)
    history, target = draw.normal((B, L, D), dtype), draw.strided(draw.normal((B, D), dtype))
    history = history[mask] if form == "offsets" else draw.strided(history) if form != "padded" else history
    smooth = arguments["activation"] not in KINKED
    return Trial(f"ActivationUnit, {form}", ours, theirs, [history, target], dtype, smooth, keywords)


LAYERS = {"fm": fm, "lr": lr, "dice": dice, "mlp": mlp, "activation_unit": activation_unit}


def valid(name: str):
    return lambda draw: check(draw, LAYERS[name](draw))


def wrong(draw: Draw) -> None:
    """One tensor of another shape, dtype, layout or device."""
    trial = draw.choice(list(LAYERS.values()))(draw)
    i = draw.randrange(len(trial.inputs) + len(trial.keywords or {}))
    if i < len(trial.inputs):
        trial.inputs[i] = spoiled(draw, trial.inputs[i])
    else:
        ((name, value),) = trial.keywords.items()
        changed = value.clone()
        if draw.chance(0.5) and name != "mask":
            changed[draw.randrange(len(value))] = draw.choice((-1, 2**40, 10**4, -(2**63)))
            trial.keywords = {name: changed}
        else:
            trial.keywords = {name: spoiled(draw, value)}
    trial.what = f"{trial.what}, {'keyword' if i >= len(trial.inputs) else f'input {i}'}"
    check_wrong(draw, trial)


#: Arguments that no layer can have been meant to get, beside right ones.
ODD = (-1, 0, 1.5, float("nan"), None, "x", [], [-1], [0], [3, "x"], [2.5], object, nn.Linear, torch.ones(2))
BUILDERS = (
    (rk.FM, rechub.FM, {"reduce_sum": True}, (5, 2, 3)),
    (rk.LR, rechub.LR, {"input_dim": 3, "sigmoid": False}, (9, 3)),
    (rk.Dice, rechub_activation.Dice, {"epsilon": 1e-3}, (9, 3)),
    (
        rk.MLP,
        rechub.MLP,
        {"input_dim": 3, "output_layer": True, "dims": [4], "dropout": 0.1, "activation": "relu"},
        (9, 3),
    ),
    (rk.ActivationUnit, Unit, {"emb_dim": 3, "dims": [4], "activation": "dice", "use_softmax": False}, (9, 4, 3)),
)


def wrong_constructor(draw: Draw) -> None:
    """One argument of a layer's constructor is odd: refused clearly, or taken as torch-rechub takes it."""
    ours, theirs, arguments, shape = draw.choice(BUILDERS)
    name, value = draw.choice(list(arguments)), draw.choice(ODD)
    arguments = {**arguments, name: value}
    what = f"{ours.__name__}({name}={value!r})"
    module = refused_or_right(what, lambda: ours(**arguments))
    if module is None or value == [0]:  # layers without units work, where torch's activations stop
        return
    try:
        like = theirs(**arguments)
    except Exception as error:
        raise Finding(f"{what}: accepted, where theirs says {type(error).__name__}: {error}") from error
    module, like = pair(draw, module, like, torch.float32, draw.chance(0.5))
    inputs = [draw.normal(shape, torch.float32)]
    if ours is rk.ActivationUnit:
        inputs.append(draw.normal((shape[0], shape[2]), torch.float32))
    check_wrong(draw, Trial(what, module, like, inputs, torch.float32))
