"""torch.distributed.checkpoint of models whose experts are shards: nothing is left out, and any layout of ranks loads what another saved."""
import math

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict

from ..errors import UsageError
from .sharded import boxes_of, shard_of


class ShardedTensor(torch.Tensor):
    """A shard as torch.distributed.checkpoint takes it: of the full tensor's shape, with the elements of a map in `local`.

    It saves and loads in boxes, as DTensors do, and either reads what the other wrote. It computes nothing.
    """

    __slots__ = ["local", "map", "_boxes"]

    @staticmethod
    def __new__(cls, local, full_shape, map):
        if local.numel() != map.local_elements or math.prod(full_shape) != map.global_elements or not local.is_contiguous():
            raise UsageError(f"local is {list(local.shape)}, full_shape {list(full_shape)}; the map has {map.local_elements} of {map.global_elements} "
                             "elements, dense")
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(full_shape), dtype=local.dtype, device=local.device)
        self.local, self.map = local.detach(), map
        self._boxes = boxes_of(tuple(full_shape), map)
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].local, args[0].shape, args[0].map)
        raise NotImplementedError(f"{func} of a shard; compute with its `local`")

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self._boxes]

    def __create_write_items__(self, fqn, _):
        properties = TensorProperties.create_from_tensor(self.local)
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.shape))
                for chunk in self.__create_chunk_list__()]

    def __get_tensor_shard__(self, index):
        box = next(box for box in self._boxes if box.offsets == tuple(index.offset))
        return self.local.view(-1)[box.local_offset:box.local_offset + math.prod(box.sizes)].view(box.sizes)

    def __repr__(self, *, tensor_contents=None):
        return f"<ShardedTensor {list(self.shape)}, {self.map!r}>"


def _local(value):
    return value.local if isinstance(value, ShardedTensor) else value


class TrainingState:
    """A module and, where given, its optimizer, for torch.distributed.checkpoint:

        dcp.save({"training": TrainingState(module, optimizer)}, checkpoint_id=folder)
        dcp.load({"training": TrainingState(module, optimizer)}, checkpoint_id=folder)   # in this or any other layout of ranks

    Parameters of sharded_parameter() and expert_parameter(), and all state of an optimizer that has their shape, are saved and loaded
    by their shard maps, in place and bit for bit. Everything else (other parameters, buffers, steps, groups' settings) is the same on
    all ranks, as torch.distributed.checkpoint expects. As with torch's own functions, an optimizer that has not stepped yet gets its
    state by a step of gradients and a learning rate of zero.
    """

    def __init__(self, module, optimizer=None):
        self._module, self._optimizer = module, optimizer

    def _shards(self):
        return {name: (parameter.shape, shard) for name, parameter in self._module.named_parameters() if (shard := shard_of(parameter))}

    @staticmethod
    def _wrap(value, local_shape, shard):
        has_shape = isinstance(value, torch.Tensor) and value.shape == local_shape and value.dim() > 0
        return ShardedTensor(value, shard.full_shape, shard.map) if has_shape else value

    def state_dict(self) -> dict:
        """{"model": .., "optimizer": {"state": .., "param_groups": ..}}, shards as ShardedTensors of the memory that is in use."""
        shards = self._shards()
        model = {name: self._wrap(value, *shards[name]) if name in shards else value for name, value in get_model_state_dict(self._module).items()}
        if self._optimizer is None:
            return {"model": model}
        optimizer = get_optimizer_state_dict(self._module, self._optimizer)
        for name in optimizer["state"].keys() & shards.keys():
            optimizer["state"][name] = {key: self._wrap(value, *shards[name]) for key, value in optimizer["state"][name].items()}
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state) -> None:
        """Takes over what was loaded into state_dict()."""
        set_model_state_dict(self._module, {name: _local(value) for name, value in state["model"].items()})
        if self._optimizer is not None:
            given = dict(state["optimizer"])
            given["state"] = {name: {key: _local(value) for key, value in values.items()} for name, values in given["state"].items()}
            set_optimizer_state_dict(self._module, self._optimizer, given)
