"""Events of DeepEP: a point on a CUDA stream. On CPUs a call has ended when it returns, and events are always past."""
from collections.abc import Callable

import torch

from tokenyard.torch.work import tensors_of


def uses_cuda(tensor=None) -> bool:
    return tensor.is_cuda if tensor is not None else torch.cuda.is_available() and torch.cuda.is_initialized()


class EventHandle:
    """Captures the current stream."""

    def __init__(self):
        self._event = torch.cuda.current_stream().record_event() if uses_cuda() else None

    def current_stream_wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """What an asynchronous call returns: wait for it, or use it around work that may run meanwhile.

    event is None exactly when the call was not asynchronous. extra_tensors live as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple | None = None):
        self.event, self.extra_tensors = event, extra_tensors
        self.hook_after_wait: Callable | None = None

    def register_hook_after_wait(self, hook_after_wait: Callable) -> None:
        self.hook_after_wait = hook_after_wait

    def current_stream_wait(self, release_handle: bool = False) -> None:
        if self.event is None:
            raise RuntimeError("this event has nothing to wait for: the call was not asynchronous; pass async_finish=True")
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            self.hook_after_wait()
        if release_handle:
            self.event = self.extra_tensors = None

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        self._release = release_handle
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.event is not None:
            self.current_stream_wait(getattr(self, "_release", False))


def wait_for(event) -> None:
    """The current stream waits for an EventOverlap, an EventHandle, or None."""
    handle = event.event if isinstance(event, EventOverlap) else event
    if handle is not None:
        handle.current_stream_wait()


class Lane:
    """Where the calls of a buffer run: on the caller's stream or, when they are to end asynchronously, on one of their own."""

    def __init__(self):
        self._stream = None

    @property
    def stream(self):
        if self._stream is None and torch.cuda.is_available():
            self._stream = torch.cuda.Stream()
        return self._stream

    def run(self, task, *, previous_event=None, before_end=None, asynchronous=False, like=None, reads=()):
        """(what task returned, its EventOverlap). before_end: an event that its results wait for, too. reads: tensors of the caller, who may let go
        of them and of the event."""
        if not asynchronous or not uses_cuda(like):
            wait_for(previous_event)
            wait_for(before_end)
            return task(), EventOverlap(EventHandle() if asynchronous else None)
        if previous_event is None or getattr(previous_event, "event", previous_event) is None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            wait_for(previous_event)
            wait_for(before_end)
            result = task()
            event = EventHandle()  # after everything that makes the result
        for tensor in tensors_of(result):
            tensor.record_stream(torch.cuda.current_stream())
        for tensor in tensors_of(reads):
            tensor.record_stream(self.stream)
        return result, EventOverlap(event, (task,))
