"""Weights of experts: which elements of a full tensor a rank holds, where they are in a checkpoint, and how they get from one layout
of ranks to another. Everything moves bits; nothing here rounds.

Full tensors, whatever a checkpoint makes of them (E experts, I expert_width, H hidden_size): "w13" [E,2,I,H] = gate and up of each
expert, "w2" [E,H,I], "w13_bias" [E,2,I], "w2_bias" [E,H], "w13_scale" and "w2_scale" per block. Tensor parallelism cuts I; w2_bias is
held by shard 0 alone. A shard is one-dimensional: the elements of its map, in order; local_shape() says how to look at it.
Arrays are NumPy's or torch's (framework="numpy" or "torch" where none comes in); bfloat16 and fp8 are uint16 and uint8 in NumPy.
"""
import numpy

from . import _core
from ._core import ExpertShape, ExpertSource, Run, ShardMap, TensorPlan, Transfer
from .arrays import Frame, frame_of, is_torch, on_cpu, opaque, tensor, torch_if_used, writable
from .errors import UsageError

__all__ = [
    "Checkpoint", "ExpertShape", "ExpertSource", "Run", "ShardMap", "TensorPlan", "Transfer", "Writer", "cut", "dense_layer_source", "expert_shard", "expert_source",
    "family_name", "full_shape", "gate_names", "gather_full", "initialise", "local_shape", "paste", "reshard", "reshard_plan",
    "shared_expert_source",
]


def full_shape(tensor, shape) -> list[int]:
    """The shape of a full tensor: "w13", "w2", "w13_bias", "w2_bias", "w13_scale" or "w2_scale" of experts of an ExpertShape."""
    return _core.full_shape(tensor, shape)


def expert_shard(tensor, shape, placement, rank) -> ShardMap:
    """What a rank of the placement holds of a full tensor: of each of its local experts, ascending, the part of its shard.

    UsageError when the number of shards does not divide expert_width, or would cut a scale block.
    """
    return _core.expert_shard(tensor, shape, placement, rank)


def local_shape(tensor, shape, placement, rank) -> list[int]:
    """The shape of expert_shard(): [L,2,I/tp,H] of w13, [L,H,I/tp] of w2, and so on; [0,H] of w2_bias where shard 0 is elsewhere.

    UsageError when the rank's experts are cut into different numbers of shards: their parts have no common shape.
    """
    counts = {len(replica.shard_ranks) for expert in placement.local_experts(rank) for replica in placement.replicas(expert)
              if rank in replica.shard_ranks}
    if len(counts) > 1:
        raise UsageError(f"{tensor}: experts of rank {rank} are cut into {' and '.join(map(str, sorted(counts)))} shards; look at them one by one")
    sizes = full_shape(tensor, shape)
    axis = {"w13": 2, "w13_bias": 2, "w13_scale": 2, "w2": 2, "w2_scale": 2}.get(tensor)
    local = list(sizes)
    if axis is not None:
        local[axis] = sizes[axis] // max(counts, default=1)
    per_expert = int(numpy.prod(local[1:]))
    local[0] = expert_shard(tensor, shape, placement, rank).local_elements // per_expert if per_expert else 0
    return local


def _elements(array, what):
    """The array's elements in row-major order, as one dimension."""
    array = on_cpu(array, what)
    return array.reshape(-1)


def _indices(map, array):
    return map._indices(Frame.of(array).place)


def cut(full, map):
    """The shard [local elements] of a full array of any shape."""
    elements = _elements(full, "full")
    if len(elements) != map.global_elements:
        raise UsageError(f"full has {len(elements)} elements; the map is of a tensor of {map.global_elements}")
    return elements[_indices(map, elements)]


def paste(shard, map, full):
    """Writes a shard to its elements of `full`, an array of any shape that is dense in memory."""
    shard, full = _elements(shard, "shard"), on_cpu(full, "full")
    elements = full.reshape(-1)  # of a dense array a view
    if len(shard) != map.local_elements or len(elements) != map.global_elements:
        raise UsageError(f"a shard of {len(shard)} elements and full of {len(elements)}; the map has {map.local_elements} of {map.global_elements}")
    if not (full.is_contiguous() if is_torch(full) else full.flags.c_contiguous):
        raise UsageError("full is not dense in memory; give a contiguous array")
    elements[_indices(map, elements)] = shard


def _empty_like(array, count):
    return torch_if_used().empty(count, dtype=array.dtype) if is_torch(array) else numpy.empty(count, array.dtype)


def reshard_plan(before, after) -> list[Transfer]:
    """The pieces that travel, or stay, when before[r], what rank r holds, becomes after[r]; ordered by (to_rank, to_offset)."""
    return _core.reshard_plan(before, after)


def reshard(collectives, before, after, shard):
    """Collective: this rank's shard [before[rank] elements] as [after[rank] elements], bit for bit. Maps of all ranks, alike on all."""
    shard = _elements(shard, "shard")
    out = _empty_like(shard, after[collectives.world.rank].local_elements)
    _core.reshard(collectives._core, before, after, opaque(shard, "shard"), opaque(out, "out"))
    return out


def gather_full(collectives, maps, shard, root=0):
    """Collective: the full tensor [global elements] on rank `root`, None on the others."""
    shard = _elements(shard, "shard")
    out = _empty_like(shard, maps[0].global_elements) if collectives.world.rank == root else None
    _core.gather_full(collectives._core, maps, opaque(shard, "shard"), root, None if out is None else opaque(out, "out"))
    return out


def initialise(name, map, *, dtype="float32", distribution="normal", scale=0.02, seed=0, framework="numpy"):
    """Random weights of a shard: each element is a function of (seed, name, its global index), so every layout of ranks and every
    machine starts from the same bits. distribution: "normal" (scale: the standard deviation) or "uniform" (the bound)."""
    out = frame_of(framework).empty(map.local_elements, dtype)
    _core.initialise(name, distribution, scale, seed, map, writable(out, "out", dtype))
    return out


def family_name(text) -> str:
    """"qwen3_moe", "deepseek_v3", "glm4_moe" or "gpt_oss", from the model_type of a configuration file or a preset's name."""
    return _core.family_name(text)


def expert_source(family, layer, tensor, shape) -> ExpertSource:
    """Where a family's checkpoints keep a layer's full tensor. UsageError when it has no such tensor."""
    return _core.expert_source(family, layer, tensor, shape)


def shared_expert_source(family, layer, tensor, shape) -> ExpertSource:
    """The same of the shared expert, as a tensor of one expert: shape.num_experts is 1."""
    return _core.shared_expert_source(family, layer, tensor, shape)


def dense_layer_source(family, layer, tensor, shape) -> ExpertSource:
    """The same of the feed-forward of a layer that has no experts. UsageError for gpt_oss, which has none."""
    return _core.dense_layer_source(family, layer, tensor, shape)


def gate_names(family, layer) -> tuple[str, str]:
    """The names of the gate's weight [E,H] and bias [E] (added to the logits in gpt_oss, bias_corrected's elsewhere); "" for none."""
    return _core.gate_source(family, layer)


class Checkpoint:
    """A model in safetensors: one file, or a folder with model.safetensors or with an index and the files it names. Mapped: what is
    read is read from the disk then, and nothing else. A broken file is a UsageError naming file, tensor and reason."""

    def __init__(self, path):
        self._core = _core.Checkpoint.open(str(path))

    def names(self) -> list[str]:
        """Of all tensors, ascending."""
        return self._core.names()

    def __contains__(self, name) -> bool:
        return self._core.contains(name)

    def file_of(self, name) -> str:
        """The file that holds a tensor."""
        return self._core.file_of(name)

    def shape(self, name) -> list[int]:
        """Of a tensor, read from the file's header."""
        return self._core.shape(name)

    def dtype(self, name) -> str:
        """Of a tensor. UsageError for a type that this library does not know."""
        dtype = self._core.dtype(name)
        if dtype is None:
            raise UsageError(f"{self.file_of(name)}: tensor {name}: its type is {self._core.type(name)}, which no array here has")
        return dtype

    def read(self, name, framework="numpy"):
        """A whole tensor, as an array of its own."""
        frame, shape = frame_of(framework), self.shape(name)
        out = frame.empty(shape, self.dtype(name))
        elements = out.reshape(-1)
        taken = self._core.bytes(name, frame.place)
        if len(taken):
            _bytes_of(elements)[:] = taken
        return out

    def dtype_of(self, source) -> str:
        """The dtype of a source's tensors. UsageError naming file and tensor when one is missing, or has another shape or type."""
        return _core.source_dtype(self._core, source)

    def read_shard(self, source, map, framework="numpy"):
        """The shard [local elements] of a source's full tensor: reads the runs of the map, and nothing else."""
        dtype = self.dtype_of(source)
        out = frame_of(framework).empty(map.local_elements, dtype)
        _core.load_shard(self._core, source, map, writable(out, "out", dtype))
        return out


def _bytes_of(array):
    return array.view(torch_if_used().uint8) if is_torch(array) else array.view(numpy.uint8)


class Writer:
    """A safetensors file, written one tensor at a time in any order: no more than one has to be in memory.

    tensors: TensorPlans, or (name, dtype, shape). The file appears under its name at finish(), which the end of `with` calls; before,
    it is `path`.partial, and it is removed when an exception ends the `with`, or this object.
    """

    def __init__(self, path, tensors, metadata=None):
        plans = [plan if isinstance(plan, TensorPlan) else TensorPlan(*plan) for plan in tensors]
        self._dtypes = {plan.name: plan.dtype for plan in plans}
        self._core = _core.SafetensorsWriter(str(path), plans, metadata or {})

    def _open(self):
        if self._core is None:
            raise UsageError("this file is finished; make another Writer")
        return self._core

    def write(self, name, array) -> None:
        """A planned tensor, dense. UsageError for a name that was not planned or is written, or another number of bytes."""
        self._open().write(name, opaque(_elements(array, name), name, self._dtypes.get(name)))

    def write_full(self, source, full, dtype=None) -> None:
        """A full expert tensor in the form of the checkpoint; the source's plans(dtype) were among the tensors."""
        _core.save_full(self._open(), source, tensor(_elements(full, "full"), "full", dtype))

    def finish(self) -> None:
        """The file is there. UsageError names a tensor that was not written."""
        self._open().finish()
        self._core = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.finish()
        self._core = None
