"""What lives at the end of the interpreter: it neither holds the process nor is reported as leaked."""
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest

import tokenyard as ty
from support import torch
from tokenyard.world import FAREWELL_MS

PATIENCE_MS = 30_000  # where nobody is to be waited for: far more than a busy machine takes to end a process
OF_GROUP = """
import sys, time, torch, torch.distributed as dist, tokenyard as ty, deep_ep
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[1]), world_size=2)
group, x, ids = dist.group.WORLD, torch.ones(4, 256), torch.tensor([[0, 1]] * 4)
def make(): return ty.Exchange(ty.World.from_group(group), ty.Placement.uniform(4, 2), hidden_size=256, top_k=2, max_tokens_per_rank=4, dtype="float32")
"""
KEPT = {
    "world": "kept = ty.World.from_group(group)",
    "results": "out = make().dispatch(x, ids); kept = out, out.handle, out.rows, make().start_dispatch(x, ids)",
    "cycle": "kept = make(); kept.itself = kept",
    "buffers": """
kept = deep_ep.Buffer(group, low_latency_mode=True), deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=256)
results = kept[0].low_latency_dispatch(x.bfloat16(), ids, 4, 4, use_fp8=False), kept[1].dispatch(x.bfloat16(), ids, num_experts=4)
""",
}
END = f"\nty.world.FAREWELL_MS = {PATIENCE_MS}; dist.barrier(); print(time.time(), flush=True)\n"
SILENT = "\nif dist.get_rank(): time.sleep(60)\nprint(time.time(), flush=True)\n"
OF_ENVIRONMENT = """
import time, tokenyard as ty
world = ty.World.from_env()
kept = ty.Exchange(world, ty.Placement.uniform(4, 2), hidden_size=8, top_k=1, max_tokens_per_rank=4)
if world.rank: time.sleep(60)
print(time.time(), flush=True)
"""


def start(program, rank, *arguments, **environment):
    return subprocess.Popen([sys.executable, "-c", program, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def seconds_to_exit(process, timeout=60):
    """Between what the program printed last, the time, and the end of its process."""
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0 and "nanobind: leaked" not in errors, errors
    return time.time() - float(output)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
@pytest.mark.parametrize("kept", KEPT)
def test_globals_do_not_hold_the_process(kept, tmp_path):
    ranks = [start(OF_GROUP + KEPT[kept] + END, rank, f"file://{tmp_path}/meeting") for rank in range(2)]
    try:
        assert max(seconds_to_exit(process) for process in ranks) < 0.8e-3 * PATIENCE_MS
    finally:
        for process in ranks:
            process.kill()


def check_a_silent_rank(ranks):
    """Rank 0 holds the store, which rank 1, asleep, has not let go of."""
    try:
        assert 0.9e-3 * FAREWELL_MS < seconds_to_exit(ranks[0]) < 5e-3 * FAREWELL_MS
        assert ranks[1].poll() is None
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_a_silent_rank_of_a_group_holds_it_for_some_seconds(tmp_path):
    check_a_silent_rank([start(OF_GROUP + "kept = make()" + SILENT, rank, f"file://{tmp_path}/meeting") for rank in range(2)])


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_so_it_does_when_its_world_has_ended(tmp_path):
    check_a_silent_rank([start(OF_GROUP + "kept = make()\nif dist.get_rank() == 0: del kept" + SILENT, rank, f"file://{tmp_path}/meeting")
                         for rank in range(2)])


def test_a_silent_rank_of_the_environment_holds_it_for_some_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    check_a_silent_rank([start(OF_ENVIRONMENT, rank, RANK=str(rank), WORLD_SIZE="2", TOKENYARD_PORT=port) for rank in range(2)])


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_a_store_outlives_its_world_while_others_use_it():
    """The process of rank 0 is done and ends; the others go on meeting."""
    def rank_main(world):
        from tokenyard.torch.groups import meet

        def all_gather(value):
            return [pickle.loads(one) for one in world.all_gather(pickle.dumps(value))]

        part = meet(world.rank, world.size, all_gather, 20_000).split(min(world.rank, 1))
        if world.rank:
            time.sleep(1)
            return part.split(0).all_gather(bytes([world.rank]))

    assert ty.run_ranks(rank_main, 3) == [None, [b"\1", b"\2"], [b"\1", b"\2"]]
