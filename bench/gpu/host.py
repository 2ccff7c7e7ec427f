"""What a call costs the host at least: how often it does what others have measured."""

from __future__ import annotations

#: Microseconds: an op that is defined in Python, https://github.com/pytorch/pytorch/issues/177109; an op of PyTorch's.
OP, TORCH_OP = 6.3, 4.0
#: A launch of Triton's, and each of its arguments; one that goes past Triton's look at them; one of CUDA C++.
#: https://github.com/meta-pytorch/tritonbench/pull/1003
LAUNCH, ARGUMENT, DIRECT, CUDA = 6.3, 0.4, 4.1, 4.0
ANCHORS = (
    f"{OP:g} µs of an op, {LAUNCH:g} and {ARGUMENT:g} an argument of a Triton launch, {DIRECT:g} of one that is known "
    f"again,\n{TORCH_OP:g} of an op of PyTorch's: [what others measured](../../docs/performance/gpu.md)."
)


def microseconds(call) -> float:
    """Of one call of an op, whose launches are Triton's, or of PyTorch's ops outside of such, by their launches."""
    if not call.op:
        return TORCH_OP * len(call.launches)
    launches = sum(DIRECT if k.direct else LAUNCH + ARGUMENT * k.arguments for k in call.kernels)
    return OP + launches + TORCH_OP * call.ops
