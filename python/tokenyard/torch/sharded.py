"""Parameters that are shards of full tensors, and what torch.distributed's tensors and checkpoints need to know of them."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import UsageError
from ..weights import ShardMap, expert_shard, full_shape, initialise, local_shape


class Box(NamedTuple):
    """A box of a full tensor, row-major from element local_offset of the shard."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offset: int


def _boxes_of_run(begin, length, shape):
    """Boxes of `length` elements from `begin`, in order: from each place the largest that begins there."""
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    while length:
        axis = next(a for a, stride in enumerate(strides) if begin % stride == 0 and length >= stride)
        at, rest = [], begin
        for stride in strides:
            at.append(rest // stride)
            rest %= stride
        count = min(length // strides[axis], shape[axis] - at[axis])
        sizes = (1,) * axis + (count,) + tuple(shape[axis + 1:])
        yield tuple(at), sizes
        begin, length = begin + math.prod(sizes), length - math.prod(sizes)


def _joined(a, b):
    """Two boxes, one behind the other in the shard, as one; None where they are none. The first axis is left alone: replicas of an
    expert then are the same boxes on all ranks."""
    differ = [axis for axis in range(len(a.sizes)) if a.offsets[axis] != b.offsets[axis]]
    if len(differ) != 1 or differ[0] == 0:
        return None
    axis = differ[0]
    touch = a.offsets[axis] + a.sizes[axis] == b.offsets[axis]
    outer_is_one = all(size == 1 for size in a.sizes[:axis] + b.sizes[:axis])
    if not touch or not outer_is_one or a.sizes[axis + 1:] != b.sizes[axis + 1:]:
        return None
    return Box(a.offsets, (*a.sizes[:axis], a.sizes[axis] + b.sizes[axis], *a.sizes[axis + 1:]), a.local_offset)


def boxes_of(shape, map) -> list[Box]:
    """The shard as boxes, each in one index of the first axis (where it has others)."""
    boxes, rows = [], shape[1:] if len(shape) > 1 else shape
    stride = math.prod(rows) if len(shape) > 1 else 0
    for run in map.runs:
        begin, local, left = run.global_offset, run.local_offset, run.length
        while left:
            first = begin // stride if stride else 0
            length = min(left, (first + 1) * stride - begin) if stride else left
            for at, sizes in _boxes_of_run(begin - first * stride, length, rows):
                box = Box((first, *at), (1, *sizes), local) if stride else Box(at, sizes, local)
                local += math.prod(sizes)
                joined = _joined(boxes[-1], box) if boxes else None
                boxes[-1:] = [joined] if joined else [*boxes[-1:], box]
            begin, left = begin + length, left - length
    return boxes


@dataclass(frozen=True)
class Shard:
    """What a parameter is a shard of: the shape of the full tensor, and the map."""

    full_shape: tuple[int, ...]
    map: ShardMap

    def boxes(self) -> list[Box]:
        """The shard as boxes of the full tensor."""
        return boxes_of(self.full_shape, self.map)


def shard_of(parameter) -> Shard | None:
    """The Shard of a parameter that sharded_parameter() or expert_parameter() made; None of others."""
    return getattr(parameter, "tokenyard_shard", None)


def sharded_parameter(data, full_shape, map) -> torch.nn.Parameter:
    """A parameter of this rank's elements of a full tensor; data: a tensor of any shape with the map's elements, in order."""
    if data.numel() != map.local_elements or math.prod(full_shape) != map.global_elements:
        raise UsageError(f"data has {data.numel()} elements and full_shape {list(full_shape)} {math.prod(full_shape)}; the map has "
                         f"{map.local_elements} of {map.global_elements}")
    parameter = torch.nn.Parameter(data)
    parameter.tokenyard_shard = Shard(tuple(full_shape), map)
    return parameter


def expert_parameter(tensor, shape, placement, rank, *, name="", data=None, dtype=torch.float32, **initialisation) -> torch.nn.Parameter:
    """A rank's shard of "w13", "w2", "w13_bias" or "w2_bias" of experts of a tokenyard.weights.ExpertShape, in its local shape.

    data: its elements, as Checkpoint.read_shard() gives them; else random ones, a function of (seed, name, global index) alone:
    every layout of ranks starts from the same bits. initialisation: scale, seed and distribution of tokenyard.weights.initialise().
    """
    map = expert_shard(tensor, shape, placement, rank)
    if data is None:
        data = initialise(name or tensor, map, dtype=str(dtype).removeprefix("torch."), framework="torch", **initialisation)
    return sharded_parameter(data.view(local_shape(tensor, shape, placement, rank)), full_shape(tensor, shape), map)


def as_dtensor(parameter, mesh, placements=None):
    """The parameter as a DTensor that shares its memory, for w13 and w2 on a mesh of (ep, tp), or with more axes.

    placements: default Shard(0) for an axis "ep", Shard(2) for "tp", Replicate() for others. UsageError where the shard is not what
    they say: uneven windows, replicas, w2_bias with tp > 1. A ShardedTensor has no such limits.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as ShardAxis
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shard = shard_of(parameter)
    if shard is None:
        raise UsageError("the parameter is no shard; make it with sharded_parameter() or expert_parameter()")
    if placements is None:
        names = mesh.mesh_dim_names or ()
        if len(shard.full_shape) < 3 and "tp" in names and mesh.size(names.index("tp")) > 1:
            raise UsageError(f"a tensor of shape {list(shard.full_shape)} has no axis that tp cuts: the shard of w2_bias is whole on shard 0, and nothing "
                             "elsewhere, which no DTensor is")
        axes = {"ep": ShardAxis(0), "tp": ShardAxis(2)}
        placements = [axes.get(name, Replicate()) if len(shard.full_shape) > 2 or name == "ep" else Replicate() for name in names]
    sizes, offsets = compute_local_shape_and_global_offset(shard.full_shape, mesh, placements)
    index = torch.arange(shard.map.global_elements).view(shard.full_shape)
    for axis, (offset, size) in enumerate(zip(offsets, sizes)):
        index = index.narrow(axis, offset, size)
    mine = torch.as_tensor(shard.map._indices(_place()))
    if mine.numel() != index.numel() or not torch.equal(mine, index.reshape(-1)):
        raise UsageError(f"the shard holds {shard.map.local_elements} elements, not the {list(sizes)} at {list(offsets)} that {placements} on a mesh of "
                         f"{list(mesh.shape)} give this rank; see as_dtensor()")
    stride = torch.empty(shard.full_shape, device="meta").stride()
    return DTensor.from_local(parameter.detach().view(sizes), mesh, placements, run_check=False, shape=torch.Size(shard.full_shape), stride=stride)


def _place():
    from ..arrays import frame_of

    return frame_of("torch").place
