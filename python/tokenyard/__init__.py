"""Expert-parallel dispatch and combine: tokens of a Mixture-of-Experts model to the ranks of their experts, and back.

    import tokenyard as ty

World, Placement, Exchange, Gate and route() follow the C++ library; tokenyard.torch has autograd functions and a dispatcher.
"""
from . import parallel, weights
from ._core import Gate, Instance, ModelPreset, Move, Placement, Replica, model_preset, model_presets, moves
from .collectives import Collectives
from .errors import Error, TransportError, UsageError
from .experts import RowGroups, feed_forward, grouped_gemm, unpermute
from .exchange import Exchange, plan_memory
from .launch import run_ranks
from .layer import Activations, DenseLayer, ExpertGroup, MoeLayer, mode_for_step
from .model import MoeModel, MoeWeights
from .norm import Normed, RmsNorm
from .received import Pending, Received
from .routing import Routing, dequantise, quantise, route
from .topology import Topo, topo
from .world import World

__version__ = "0.1.0"

__all__ = [
    "Activations", "Collectives", "DenseLayer", "Error", "Exchange", "ExpertGroup", "Gate", "Instance", "ModelPreset", "MoeLayer",
    "MoeModel", "MoeWeights", "Move", "Normed", "Pending", "Placement", "Received", "Replica", "RmsNorm", "Routing", "RowGroups", "Topo",
    "TransportError", "UsageError", "World", "dequantise", "feed_forward", "grouped_gemm", "mode_for_step", "model_preset", "model_presets", "moves",
    "parallel", "plan_memory", "quantise", "route", "run_ranks", "topo", "unpermute", "weights",
]
