"""The ops, one file each: schema, fake, default, CUDA implementation, autograd, autocast, public function."""

import rankkernels.ops.bilinear_interaction  # noqa: F401 (an op of a layer)
import rankkernels.ops.cross_layer  # noqa: F401 (an op of a layer)
import rankkernels.ops.ffm_interaction  # noqa: F401 (an op of a layer)
import rankkernels.ops.mixed_cross_layer  # noqa: F401 (an op of a layer)
import rankkernels.ops.mixed_experts  # noqa: F401 (an op of a layer)
import rankkernels.ops.rank  # noqa: F401 (defines an op; its public side is rankkernels.serve)
import rankkernels.ops.sparse_norm  # noqa: F401 (registers a kernel)
from rankkernels.ops.augru import augru
from rankkernels.ops.cross_network import cross_network
from rankkernels.ops.din_attention import din_attention
from rankkernels.ops.embedding_bag import embedding_bag, table_batched_embedding_bag
from rankkernels.ops.embedding_fm import embedding_fm
from rankkernels.ops.fm_interaction import fm_interaction
from rankkernels.ops.norm_activation import norm_activation
from rankkernels.ops.pairwise_dot import pairwise_dot
from rankkernels.ops.target_attention import target_attention

__all__ = [
    "augru",
    "cross_network",
    "din_attention",
    "embedding_bag",
    "embedding_fm",
    "fm_interaction",
    "norm_activation",
    "pairwise_dot",
    "table_batched_embedding_bag",
    "target_attention",
]
