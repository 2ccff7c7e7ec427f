"""An installed wheel, tried without pytest or any other package: one forward and backward of each op and model."""

import torch

import rankkernels as rk
from rankkernels import reference
from rankkernels.ops import _library


def main():
    assert _library.no_extension is None, _library.no_extension
    x = torch.randn(100, 39, 10, requires_grad=True)
    y = rk.fm_interaction(x)
    torch.testing.assert_close(y, reference.fm_interaction(x), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, x.sum(1, keepdim=True) - x)

    item = rk.SparseFeature("item", 50, 8, padding_idx=0)
    clicks = rk.SequenceFeature("clicks", 50, 8, pooling="concat", shared_with="item", padding_idx=0)
    batch = {"item": torch.randint(1, 50, (32,)), "clicks": torch.randint(0, 50, (32, 20))}
    for model in (
        rk.DIN([], [clicks], [item], {"dims": [16]}, {"dims": [36]}, mask_padding=True),
        rk.DeepFM([item], [item], {"dims": [16]}),
    ):
        p = model(batch)
        p.sum().backward()
        assert p.shape == (32,) and all(q.grad.isfinite().all() for q in model.parameters())
    try:
        rk.fm_interaction(torch.randn(3))
    except RuntimeError as error:
        assert "fm_interaction: x must have 3 dimensions, got 1" in str(error)
    isa = _library.cpu_isa
    print(f"rankkernels {rk.__version__} works beside torch {torch.__version__} ({isa})")


if __name__ == "__main__":
    main()
