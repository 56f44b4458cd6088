"""Process groups and seeds of DeepEP's test programs. Without a GPU what they make on 'cuda' is on the CPU."""
import os
import random

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_local_rank = 0
_global_seed = 0


class _CudaIsCpu(TorchFunctionMode):
    """Tensors that are made on, or sent to, 'cuda' are on the CPU."""

    @staticmethod
    def _device(value):
        return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: self._device(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(map(self._device, args))
        if func.__name__ in ("all_gather_into_tensor", "all_gather_single") and len(args) > 1 and args[0].dim() == args[1].dim() + 1:
            args = (args[0].flatten(0, 1), *args[1:])  # gloo has no stacked form
        return func(*args, **kwargs)


def init_seed(global_seed: int) -> None:
    global _global_seed
    _global_seed = global_seed
    torch.manual_seed(global_seed + dist.get_rank())
    random.seed(global_seed + dist.get_rank())


def get_global_seed() -> int:
    return _global_seed


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0):
    """(rank, world size, group of all). MASTER_ADDR and MASTER_PORT say where; WORLD_SIZE and RANK count nodes. bfloat16 is the
    default type and, where there are GPUs, 'cuda' the default device."""
    global _local_rank
    _local_rank = local_rank
    address, port = os.getenv("MASTER_ADDR", "127.0.0.1"), int(os.getenv("MASTER_PORT", "8361"))
    nodes, node = int(os.getenv("WORLD_SIZE", "1")), int(os.getenv("RANK", "0"))
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_rank)
        torch.set_default_device("cuda")
    else:
        _CudaIsCpu().__enter__()  # for the rest of the process
        torch.cuda.synchronize = lambda device=None: None
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=f"tcp://{address}:{port}", world_size=nodes * num_local_ranks,
                            rank=node * num_local_ranks + local_rank)
    torch.set_default_dtype(torch.bfloat16)
    init_seed(seed)
    return dist.get_rank(), dist.get_world_size(), dist.new_group(list(range(nodes * num_local_ranks)))


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints on all ranks, or on the first of each node; then all wait for each other."""
    if not once_in_node or _local_rank == 0:
        print(s, flush=True)
    dist.barrier()


def get_physical_domain_size(group) -> tuple[int, int]:
    """(ranks over a network, ranks in a link domain)."""
    return 1, group.size()


def get_logical_domain_size(group, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    return 1, group.size()
