"""DIN attention out of a library's products, which a GPU runs where no fused kernel serves, against the reference: on
the CPU, in float64. Which configurations it serves: tests/gpu/absent_gpu/configurations.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_din_attention import FORMS, make_inputs, make_params

from rankkernels import reference
from rankkernels.ops import _library
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._attention_library import attend
from rankkernels.ops.attention_params import Flags, Inputs, unflatten

#: activation, batch_norm, training, widths, use_softmax, count_padding, return_scores, shared histories, dropout
CONFIGURATIONS = [
    ("dice", True, True, (6, 3), False, False, False, False, 0.0),
    ("dice", True, True, (5,), True, True, False, False, 0.3),
    ("dice", False, True, (5,), True, False, True, True, 0.0),
    ("dice_batch_norm", True, True, (6, 3), True, False, False, True, 0.3),
    ("dice_batch_norm", False, True, (5,), False, True, True, False, 0.0),
    ("dice_batch_norm", False, False, (6, 3), True, False, False, False, 0.0),
    ("prelu", True, False, (5,), False, False, True, False, 0.0),
    ("sigmoid", True, True, (4, 4, 4), False, False, False, False, 0.0),
    ("linear", False, False, (), True, False, False, False, 0.0),
    ("linear", False, False, (), False, True, True, True, 0.0),
]


@pytest.mark.parametrize("form, configuration", [*itertools.product(FORMS, CONFIGURATIONS)])
def test_it_equals_the_reference(form, configuration):
    activation, batch_norm, training, widths, use_softmax, count_padding, return_scores, shared, dropout = configuration
    generator = torch.Generator().manual_seed(1)
    history, target, where = make_inputs(form, 4, 6, 3, torch.float64, generator)
    if count_padding:
        history = history.nan_to_num(0.3)
    params, stats = make_params(3, widths, activation, batch_norm, torch.float64, generator)
    history, target, *params = (t.requires_grad_() for t in (history, target, *params))
    flags = Flags(list(ACTIVATIONS).index(activation), batch_norm, use_softmax, count_padding, return_scores, training,
                  1e-5, 1e-3, dropout, torch.tensor(77))  # fmt: skip
    rows = [where.get(name) for name in ("lengths", "mask", "offsets")]
    rows.append(torch.tensor([2, 0, 2, 3]) if shared else None)
    out, batch_stats = attend(Inputs(history, target, *rows, params, stats), flags)
    hidden, out_weight, out_bias = unflatten(params, stats, activation, batch_norm, 1e-5, 1e-3)
    expected, all_stats = reference.din_attention(
        history, target, hidden, out_weight, out_bias, **where, history_index=rows.pop(), use_softmax=use_softmax,
        count_padding=count_padding, return_scores=return_scores, training=training, dropout=dropout, seed=flags.seed,
    )  # fmt: skip
    flat = [t for s in all_stats if s is not None for t in s]
    torch.testing.assert_close(batch_stats, torch.cat(flat) if flat else batch_stats.new_empty(0))
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    of = dict(inputs=[history, target, *params], grad_outputs=grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(out, **of), torch.autograd.grad(expected, **of))


def test_it_is_differentiable_twice():
    generator = torch.Generator().manual_seed(1)
    history, target, where = make_inputs("offsets", 3, 4, 2, torch.float64, generator)
    params, _ = make_params(2, (3,), "sigmoid", True, torch.float64, generator)
    flags = Flags(list(ACTIVATIONS).index("sigmoid"), True, True, False, False, True, 1e-5, 1e-3, 0.0, None)

    def function(history, target, *params):
        return attend(Inputs(history, target, None, None, where["offsets"], None, [*params], []), flags)[0]

    inputs = [t.requires_grad_() for t in (history, target, *params)]
    assert torch.autograd.gradgradcheck(function, inputs)


def test_rows_outside_the_offsets_have_no_part_and_no_gradient():
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    params, stats = make_params(2, (3,), "dice", True, torch.float64, generator)
    for use_softmax in (False, True):
        flags = Flags(list(ACTIVATIONS).index("dice"), True, use_softmax, False, False, False, 1e-5, 1e-3, 0.0, None)
        outs = []
        for rows, offsets in ((history, [2, 2, 5, 7]), (history[2:7], [0, 0, 3, 5])):
            inputs = Inputs(rows, target, None, None, torch.tensor(offsets), None, params, stats)
            outs.append(attend(inputs, flags)[0])
        torch.testing.assert_close(*outs)
        (grad,) = torch.autograd.grad(outs.pop(0).sum(), history)
        assert not grad[:2].any() and not grad[7:].any() and grad[2:7].all()


def test_too_few_rows_to_take_statistics_of():
    flags = Flags(list(ACTIVATIONS).index("relu"), True, False, False, False, True, 1e-5, 1e-3, 0.0, None)
    params, _ = make_params(2, (3,), "relu", True, torch.float32, torch.Generator())
    with pytest.raises(ValueError, match="more than one valid row"):
        attend(Inputs(torch.zeros(1, 1, 2), torch.zeros(1, 2), None, None, None, None, params, []), flags)


@pytest.mark.parametrize("version, found", [("3.5.1", (3, 5)), ("3.11.0+git", (3, 11)), (None, (0, 0))])
def test_tritons_version_is_read_without_importing_it(version, found, tmp_path, monkeypatch):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = '{version}'\nraise ImportError\n" if version else "")
    monkeypatch.delitem(__import__("sys").modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert _library._triton_version() == found
