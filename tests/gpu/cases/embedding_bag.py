"""The embedding op under the CPU shim, beside its TEST_CASES."""

from rankkernels.testing import embedding_bag_case

CASES = [
    # One row of a warp's width and more, packed and not; groups of every number of lanes.
    *(embedding_bag_case([7], [d], [0], ["mean"], B=9, L=5, weighted=True) for d in (1, 2, 4, 12, 16, 40, 136, 300)),
    embedding_bag_case([7], [24], [0], ["none"], B=70, L=1),
    embedding_bag_case([13], [72], [0, 0], ["max", "sum"], B=9, L=6, padding_idx=2),
    # Hot rows, whose runs cross many tiles and groups of a warp.
    embedding_bag_case([3], [16], [0], ["sum"], B=40, L=40, jagged=True),
    embedding_bag_case([1], [10], [0], ["mean"], B=30, L=30, weighted=True),
    # Tables of several widths in one tile, and more features and tables than go with one launch.
    embedding_bag_case([2, 3, 2], [8, 10, 48], [0, 1, 2, 1], ["sum", "mean", "none", "max"], B=6, L=3),
    embedding_bag_case([5] * 130, [4] * 130, list(range(130)), ["sum", "none"] * 65, B=3, L=2, padding_idx=1),
]
