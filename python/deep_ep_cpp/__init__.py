"""DeepEP's compiled module, as far as callers of its Python interface touch it."""
from deep_ep import Config, EventHandle, topk_idx_t

__all__ = ["Config", "EventHandle", "topk_idx_t"]
