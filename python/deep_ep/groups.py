"""The world of a DeepEP group: of torch, of any backend, or of mpi4py."""
import os

from tokenyard.torch.groups import meet, world_from_group


def world_of(group, comm, timeout_ms=None):
    """timeout_ms: of every wait; default TOKENYARD_TIMEOUT_MS, or 100 s."""
    timeout_ms = timeout_ms or int(os.getenv("TOKENYARD_TIMEOUT_MS", "100000"))
    if group is not None:
        return world_from_group(group, timeout_ms=timeout_ms)
    if comm is None:
        raise ValueError("neither group nor comm: give a torch process group, or an mpi4py communicator")
    return meet(comm.Get_rank(), comm.Get_size(), comm.allgather, timeout_ms)
