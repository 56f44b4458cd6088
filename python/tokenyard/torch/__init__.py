"""tokenyard for torch: differentiable dispatch and combine, what experts compute, the MoE layer and a dispatcher
with six stages for other ones, and parameters that are shards, with checkpoints.

Needs torch; the C++ module does not.
"""
from .autograd import Dispatched, combine, dispatch
from .dispatcher import MoEDispatcher
from .experts import feed_forward, grouped_gemm
from .gate import Gated, route
from .groups import world_from_group
from .layer import MoeLayer
from .sharded import Shard, as_dtensor, expert_parameter, shard_of, sharded_parameter

__all__ = [
    "Dispatched", "Gated", "MoEDispatcher", "MoeLayer", "Shard", "ShardedTensor", "TrainingState", "as_dtensor", "combine", "dispatch", "expert_parameter",
    "feed_forward", "grouped_gemm", "route", "shard_of", "sharded_parameter", "world_from_group",
]


def __getattr__(name):
    if name in ("ShardedTensor", "TrainingState"):  # torch.distributed.checkpoint takes a second to import
        from . import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
