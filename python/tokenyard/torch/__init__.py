"""tokenyard for torch: differentiable dispatch and combine, and a dispatcher with six stages for MoE layers.

Needs torch; the C++ module does not.
"""
from .autograd import Dispatched, combine, dispatch
from .dispatcher import MoEDispatcher
from .groups import world_from_group

__all__ = ["Dispatched", "MoEDispatcher", "combine", "dispatch", "world_from_group"]
