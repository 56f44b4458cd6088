"""Worlds and ranks: environment, parts, processes that fail, die, or are interrupted."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tokenyard as ty
from support import HIDDEN, make_exchange, on_ranks


def test_from_env_without_ranks_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = ty.World.from_env()
    assert (world.rank, world.size, world.link(0)) == (0, 1, "self")


def test_from_env_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ty.UsageError, match="RANK=0 is set but WORLD_SIZE is not"):
        ty.World.from_env()


@pytest.mark.parametrize("processes", [False, True])
def test_collectives_of_a_world(processes):
    def rank_main(world):
        assert world.is_in_process != processes and world.local_rank == world.rank
        assert world.all_gather(bytes([world.rank]) * world.rank) == [b"", b"\1", b"\2\2", b"\3\3\3"]
        world.barrier()
        half = world.split(color=world.rank % 2, key=-world.rank)
        assert (half.rank, half.size) == (1 - world.rank // 2, 2)
        assert half.generation != world.generation
        assert world.split(-1 if world.rank else 0) is None or world.rank == 0
        assert world.alive(0) and world.link(1) == ("self" if world.rank == 1 else "peer") and world.host(0)
        return half.all_gather(bytes([world.rank]))

    assert on_ranks(rank_main, 4, processes) == [[b"\2", b"\0"], [b"\3", b"\1"]] * 2


def test_results_come_in_rank_order_and_arguments_arrive():
    big = np.arange(100_000)
    results = ty.run_ranks(lambda world, a, b: (world.rank, a + b, big), 3, 1, 2)
    assert [r[:2] for r in results] == [(0, 3), (1, 3), (2, 3)]
    np.testing.assert_array_equal(results[1][2], big)


@pytest.mark.parametrize("processes", [False, True])
def test_the_error_of_a_rank_is_raised_with_its_rank(processes):
    def rank_main(world):
        if world.rank == 2:
            raise KeyError("lost keys")
        world.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="lost keys") as caught:
        on_ranks(rank_main, 3, processes)
    assert caught.value.rank == 2
    assert "rank 2 of 3 failed" in str(caught.value.__cause__) and "lost keys" in str(caught.value.__cause__)
    assert time.monotonic() - start < 4


def test_a_rank_that_is_killed_is_named_and_the_others_learn_it_at_once():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 3))
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            exchange.dispatch(np.ones((2, HIDDEN), np.float32), np.zeros((2, 1), np.int64))
        except ty.TransportError as error:
            assert (error.kind, error.peer) == ("peer_lost", 1) and time.monotonic() - start < 3
            raise
        raise AssertionError("the dispatch went on without rank 1")

    with pytest.raises(ty.Error, match=r"rank 1 of 3 was killed by signal 9 \(SIGKILL\)"):
        on_ranks(rank_main, 3, processes=True)


def test_survivors_recover_and_go_on():
    def rank_main(world):
        exchange = make_exchange(world, ty.Placement.uniform(6, 3))
        if world.rank == 1:
            world.leave()
            return None
        with pytest.raises(ty.TransportError, match="peer_lost"):
            exchange.dispatch(np.ones((2, HIDDEN), np.float32), np.zeros((2, 1), np.int64))
        assert exchange.recover() == [0, 2]
        assert exchange.world.size == 2 and exchange.status().failure is None
        out = exchange.dispatch(np.ones((2, HIDDEN), np.float32), np.array([[0], [2]]))  # expert 2 was on rank 1
        assert exchange.status().lost_ids == 1
        return out.num_rows

    assert on_ranks(rank_main) == [2, None, 0]


def test_survivors_of_a_world():
    def rank_main(world):
        if world.rank == 0:
            world.leave()
            return None
        left, former = world.survivors()
        return left.rank, left.size, former

    assert on_ranks(rank_main) == [None, (0, 2, [1, 2]), (1, 2, [1, 2])]


@pytest.mark.parametrize("what", ["dispatch", "finish", "barrier", "rendezvous", "join", "processes"])
def test_ctrl_c_ends_a_wait(what, tmp_path):
    """The wait would last 60 s; its process is a child of its own, which gets SIGINT as from a terminal."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import threading, time, numpy as np, tokenyard as ty
if {what!r} == "rendezvous":
    print("waiting", flush=True)
    ty.World.connect(1, 2, port=1, timeout_ms=60_000)
if {what!r} == "join":
    def rank_main(world):
        if world.rank == 0: print("waiting", flush=True)
        world.barrier() if world.rank == 0 else time.sleep(2)
    ty.run_ranks(rank_main, 2, processes=False, timeout_ms=60_000)
if {what!r} == "processes":
    def rank_main(world):
        if world.rank == 0: print("waiting", flush=True)
        world.barrier() if world.rank == 0 else time.sleep(60)
    ty.run_ranks(rank_main, 2, timeout_ms=60_000)
worlds = ty.World.in_process(2, timeout_ms=60_000)
made = []
def make(world): made.append(ty.Exchange(world, ty.Placement.uniform(2, 2), hidden_size=8, top_k=1, max_tokens_per_rank=4, dtype="float32"))
other = threading.Thread(target=make, args=(worlds[1],), daemon=True)
other.start()
make(worlds[0]); other.join()
x, ids = np.ones((4, 8), np.float32), np.ones((4, 1), np.int64)
exchange = next(e for e in made if e.world.rank == 0)
print("waiting", flush=True)
if {what!r} == "dispatch": exchange.dispatch(x, ids)
if {what!r} == "finish": exchange.start_dispatch(x, ids).finish()
worlds[0].barrier()
""")
    child = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=15)
    finally:
        child.kill()
    assert "KeyboardInterrupt" in errors.splitlines()[-1], errors
    assert "nanobind: leaked" not in errors


def test_other_threads_run_while_a_rank_waits():
    """The GIL is free during waits: rank threads could not even meet otherwise."""
    def rank_main(world):
        if world.rank == 0:
            start = time.monotonic()
            world.barrier()
            return time.monotonic() - start
        total = sum(i * i for i in range(200_000))
        world.barrier()
        return total

    waited, total = on_ranks(rank_main, 2)
    assert total == sum(i * i for i in range(200_000)) and waited < 20


def size_times(world, factor):
    return world.size * factor


def test_spawned_ranks_get_what_is_pickled():
    assert ty.run_ranks(size_times, 2, 3, start_method="spawn") == [6, 6]


def test_a_result_that_cannot_travel_is_an_error_of_its_rank():
    with pytest.raises(Exception, match="pickle") as caught:
        ty.run_ranks(lambda world: (lambda: world.rank), 2)
    assert caught.value.rank in (0, 1)
