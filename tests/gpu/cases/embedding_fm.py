"""The embedding op with FM and linear term under the CPU shim, beside its TEST_CASES."""

from rankkernels.testing import embedding_fm_case

CASES = [
    # Groups of every number of lanes, packed and not, with fewer and more features than a warp has groups.
    *(embedding_fm_case([7], d, [0] * 3, ["none", "sum", "max"], B=9, L=2) for d in (1, 2, 12, 16, 40, 136, 300)),
    embedding_fm_case([7, 5], 4, [0, 1] * 9, ["none", "mean"] * 9, B=11, padding_idx=2),
    # More features than go with one launch, and more samples than a part of the linear weights' gradient.
    embedding_fm_case([3] * 90, 8, list(range(90)), ["sum", "none"] * 45, B=10),
    embedding_fm_case([3] * 90, 5, list(range(90)), ["none", "mean"] * 45, B=2, linear=False),
    embedding_fm_case([7], 4, [0, 0], ["none", "none"], B=4100, dense=3),
]
