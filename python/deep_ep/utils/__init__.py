"""What DeepEP's callers and test programs take from deep_ep.utils."""
from ..events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
