"""The GPU kernels' cases, a module an op: Triton's run under the interpreter, those in CUDA C++ under the CPU shim.

What is compiled, reported and timed beside them has the shapes of ``bench.gpu.cases``. Tests fail where a kernel is
reached by no case.
"""

from gpu.cases import embedding_bag, embedding_fm
from gpu.cases.augru import AUGRU
from gpu.cases.bilinear_interaction import BILINEAR
from gpu.cases.cross_layer import LAYER
from gpu.cases.cross_network import CROSS
from gpu.cases.din_attention import DIN
from gpu.cases.embedding_catch_up import EXACT
from gpu.cases.ffm_interaction import FFM
from gpu.cases.fm_interaction import FM
from gpu.cases.mixed_experts import EXPERTS
from gpu.cases.norm_activation import NORM
from gpu.cases.pairwise_dot import PAIRS
from gpu.cases.target_attention import TARGET

INTERPRETED = [
    FM, CROSS, LAYER, EXPERTS, PAIRS, BILINEAR, FFM, DIN, TARGET, AUGRU, NORM, embedding_bag.BAG,
    embedding_fm.EMBEDDING_FM, EXACT,
]  # fmt: skip
#: By the op that they are cases of.
SHIM = {"embedding_bag": embedding_bag.CASES, "embedding_fm": embedding_fm.CASES}
