"""DeepEP's Python interface over tokenyard: docs/deep_ep.md says what is supported.

It adapts names, tuples and events; the exchange is tokenyard's. CPU tensors with a gloo group work as CUDA tensors do.
"""
from importlib.metadata import PackageNotFoundError, version

import torch

try:
    raise ImportError(f"DeepEP {version('deep_ep')} is installed, and this drop-in of tokenyard has its name: pip uninstall deep_ep, or do without "
                      "the drop-in")
except PackageNotFoundError:
    pass

topk_idx_t = torch.int64

from .buffer import Buffer  # noqa: E402
from .config import Config  # noqa: E402
from .elastic import ElasticBuffer, EPHandle  # noqa: E402
from .events import EventHandle, EventOverlap  # noqa: E402
from .utils.envs import get_logical_domain_size, get_physical_domain_size  # noqa: E402

__version__ = "2.1.0+tokenyard"

__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "get_logical_domain_size", "get_physical_domain_size",
           "topk_idx_t"]
