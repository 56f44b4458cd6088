"""Communication beside computation, and the two orders that keep it right.

Forward: what a stage returns is valid after its Work's wait(); the event behind it comes after everything that makes the outputs.
Backward: a stage's backward may return gradients that are still being written. Every differentiable input of the stage therefore
passes a node (wait_in_backward) whose own backward waits for them.
"""
from concurrent.futures import ThreadPoolExecutor

import torch


class Work:
    """A stage under way. wait() hands its result over, valid for the caller (on CUDA: for the current stream)."""

    def __init__(self, wait, ready):
        self._wait, self._ready = wait, ready

    def wait(self):
        return self._wait()

    def ready(self) -> bool:
        return self._ready()


def _done(result):
    return Work(lambda: result, lambda: True)


class Thread:
    """Runs CPU communication in order, beside the caller when asked to."""

    def __init__(self):
        self._executor = None
        self._last = None

    def run(self, task, beside) -> Work:
        if not beside and (self._last is None or self._last.done()):
            return _done(task())
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "tokenyard")
        self._last = future = self._executor.submit(task)  # behind what is under way, also when it is not to run beside
        return Work(future.result, future.done)

    def __del__(self):
        if self._executor is not None:
            self._executor.shutdown(wait=False)


class Stream:
    """Runs CUDA communication on a stream of its own when it is to run beside."""

    def __init__(self):
        self._stream = None

    def run(self, task, beside) -> Work:
        if not beside:
            return _done(task())
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())  # inputs are made there
        with torch.cuda.stream(self._stream):
            result = task()
            event = self._stream.record_event()  # after every kernel that makes an output

        def wait(keep=task):  # inputs live until the event has passed for the caller
            torch.cuda.current_stream().wait_event(event)
            for tensor in tensors_of(result):
                tensor.record_stream(torch.cuda.current_stream())
            return result

        return Work(wait, event.query)


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for one in result:
            yield from tensors_of(one)


class Gradients:
    """What the backward of one stage still writes."""

    def __init__(self):
        self.works = []

    def wait(self):
        while self.works:
            self.works.pop().wait()


class _WaitInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *tensors):
        ctx.gradients = gradients
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.gradients.wait()
        return None, *grads


def wait_in_backward(gradients, *tensors):
    """The tensors, whose gradients are taken only once `gradients` are written. One node for all of a stage's inputs: none of them
    can go ahead."""
    return _WaitInBackward.apply(gradients, *tensors)


class _Stage(torch.autograd.Function):
    """Puts results that are there into the graph; backward runs the stage's own communication.

    backward_task(grads) gives the gradients of inputs, in their shapes and dtypes.
    """

    @staticmethod
    def forward(ctx, runner, gradients, backward_task, results, *inputs):
        ctx.runner, ctx.gradients, ctx.backward_task = runner, gradients, backward_task
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        beside = ctx.gradients is not None
        task = ctx.backward_task
        if not beside:
            return None, None, None, None, *ctx.runner.run(lambda: task(*grads), False).wait()
        outs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]

        def fill():
            with torch.no_grad():
                for out, grad in zip(outs, task(*grads)):
                    out.copy_(grad)

        ctx.gradients.works.append(ctx.runner.run(fill, True))
        return None, None, None, None, *outs


def stage(runner, gradients, backward_task, results, inputs):
    """The results of a stage, differentiable with respect to inputs; gradients: None, or where an asynchronous backward is noted."""
    return _Stage.apply(runner, gradients, backward_task, [result.detach() for result in results], *inputs)
