"""Ranks on this host: run_ranks()."""
import gc
import multiprocessing
import pickle
import secrets
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait

from . import _core
from .errors import Error, TransportError, UsageError
from .world import World

GRACE_S = 5.0  # after a rank failed, time for the others to notice and report


class RankTraceback(Exception):
    """The cause of an error that run_ranks raises: where in which rank it happened."""

    def __str__(self):
        return self.args[0]


class RankDied(Error):
    """A rank's process ended without a result."""


def run_ranks(fn, ranks, *args, processes=True, start_method=None, timeout_ms=100_000):
    """Runs fn(world, *args) on `ranks` ranks of this host; the results in rank order.

    Ranks are processes, or threads of this one with processes=False. start_method: "fork" (default: fn may be defined anywhere;
    torch computes with one thread in each rank) or "spawn" (default once CUDA is in use here: fn and args are pickled, and a script
    needs `if __name__ == "__main__":`). When ranks fail, the others are told; the error that came first is raised, with its rank as
    .rank and in the cause's text; an error that is the consequence of another rank's (TransportError) only when there is no other.
    timeout_ms: the deadline of every wait.
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise UsageError(f"ranks = {ranks!r}: expected 1 or more")
    if not processes:
        return _run_threads(fn, ranks, args, timeout_ms)
    return _Processes(fn, ranks, args, start_method or _start_method(), timeout_ms).results()


def _start_method():
    torch = sys.modules.get("torch")
    return "spawn" if torch is not None and torch.cuda.is_initialized() else "fork"


def _raise_first(errors, ranks):
    """errors: (rank, exception, its traceback as text) in the order in which they came."""
    rank, error, text = next((e for e in errors if not isinstance(e[1], TransportError)), errors[0])
    if getattr(error, "rank", None) is None:
        error.rank = rank
    raise error from RankTraceback(f"rank {rank} of {ranks} failed:\n{text}")


def _run_threads(fn, ranks, args, timeout_ms):
    worlds = World.in_process(ranks, timeout_ms)
    results, errors = [None] * ranks, []

    def body(rank, world):
        try:
            results[rank] = fn(world, *args)
        except BaseException as error:  # noqa: B036 - handed to the caller
            errors.append((rank, error, traceback.format_exc()))
            world.leave()

    threads = [threading.Thread(target=body, args=(rank, world), daemon=True) for rank, world in enumerate(worlds)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        _core.cancel_waits()
        for world in worlds:
            world.leave()
        for thread in threads:
            thread.join(GRACE_S)
        raise
    if errors:
        _raise_first(errors, ranks)
    return results


def _picklable(error):
    try:
        return pickle.loads(pickle.dumps(error)) and error
    except Exception:
        return Error(f"{type(error).__name__}: {error}")


def _rank_main(pipe, fn, args, rank, ranks, token, timeout_ms):
    """In the process of a rank."""
    gc.freeze()  # what is the parent's is not collected here: its threads did not come along
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # nor did torch's
    world = None
    try:
        port = pipe.recv()
        world = World.connect(rank, ranks, port=port, local_rank=rank, token=token, store_elsewhere=True, timeout_ms=timeout_ms)
        message = ("result", fn(world, *args))
        pickle.dumps(message)
    except BaseException as error:  # noqa: B036 - handed to the parent
        message = ("error", _picklable(error), traceback.format_exc())
        if world is not None:
            world.leave()
    try:
        pipe.send(message)
    except OSError:
        pass  # the parent is gone, or has given up on this rank


class _Processes:
    """The processes of one run."""

    def __init__(self, fn, ranks, args, start_method, timeout_ms):
        context = multiprocessing.get_context(start_method)
        token = secrets.token_hex(16)
        self._ranks, self._errors, self._results = ranks, [], [None] * ranks
        self._processes, self._pipes = [], {}
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                process = context.Process(target=_rank_main, args=(theirs, fn, args, rank, ranks, token, timeout_ms))
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes[ours] = rank
            self._store = _core.Store("127.0.0.1", ranks, token)
            for pipe in self._pipes:
                pipe.send(self._store.port)
        except BaseException:
            self._end()
            raise

    def results(self):
        try:
            kill_at = None
            while self._pipes and (kill_at is None or time.monotonic() < kill_at):
                for pipe in wait(list(self._pipes), timeout=None if kill_at is None else max(0.0, kill_at - time.monotonic())):
                    self._hear(pipe)
                if self._errors and kill_at is None:
                    kill_at = time.monotonic() + GRACE_S
        finally:
            self._end()
        if self._errors:
            _raise_first(self._errors, self._ranks)
        return self._results

    def _hear(self, pipe):
        rank = self._pipes.pop(pipe)
        try:
            kind, *values = pipe.recv()
        except (EOFError, OSError):
            self._died(rank)
            return
        if kind == "result":
            self._results[rank] = values[0]
        else:
            self._errors.append((rank, *values))

    def _died(self, rank):
        process = self._processes[rank]
        process.join(GRACE_S)
        code = process.exitcode
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"ended with exit code {code}"
        self._store.lose(rank, how)
        self._errors.append((rank, RankDied(f"rank {rank} of {self._ranks} {how}"), "its process left no traceback"))

    def _end(self):
        for process in self._processes:
            if self._pipes:  # somebody is not done: an error elsewhere, or Ctrl-C
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
