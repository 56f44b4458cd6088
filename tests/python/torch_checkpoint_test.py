"""Shards in torch.distributed.checkpoint: saved by one layout of gloo processes, loaded by another, bit for bit; and as DTensors."""
import math
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402
from tokenyard.torch.sharded import boxes_of  # noqa: E402

SHAPE = ty.weights.ExpertShape(num_experts=4, hidden_size=6, expert_width=8)
TENSORS = ("w13", "w2", "w13_bias", "w2_bias")


class Layer(torch.nn.Module):
    """Experts of one rank of a layout, and what all ranks have alike."""

    def __init__(self, placement, rank, seed):
        super().__init__()
        for tensor in TENSORS:
            setattr(self, tensor, tyt.expert_parameter(tensor, SHAPE, placement, rank, name=f"layers.0.{tensor}", seed=seed))
        self.gate = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("gate_bias", torch.randn(4, generator=torch.Generator().manual_seed(seed + 1)))

    def train_a_step(self, optimizer, step):
        """Gradients are functions of the global element, as those of a real layer."""
        for name, parameter in self.named_parameters():
            shard = tyt.shard_of(parameter)
            if shard is None:
                parameter.grad = torch.full_like(parameter, 0.5 + step)
            else:
                parameter.grad = ty.weights.initialise(f"gradient {name} {step}", shard.map, scale=1.0, framework="torch").view(parameter.shape)
        optimizer.step()
        self.gate_bias += 0.25


def tensors_of(layer, optimizer):
    """{name: (tensor, its map or None)}: everything that training changes."""
    found = {"gate_bias": (layer.gate_bias, None)}
    for name, parameter in layer.named_parameters():
        map = shard.map if (shard := tyt.shard_of(parameter)) else None
        found[name] = parameter.detach(), map
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value, map if value.dim() else None
    return found


def make(layout, rank, seed):
    placement = layout if isinstance(layout, ty.Placement) else ty.Placement.tensor_parallel(4, *layout)
    layer = Layer(placement, rank, seed)
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.1 * seed, betas=(0.8, 0.9))


@contextmanager
def gloo(world, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def reference():
    """What one process has after the same steps."""
    layer, optimizer = make((1, 1), 0, seed=1)
    for step in range(3):
        layer.train_a_step(optimizer, step)
    return {name: value.reshape(-1) for name, (value, _) in tensors_of(layer, optimizer).items()}, optimizer.param_groups[0]["lr"]


def check(layer, optimizer, expected, lr):
    found = tensors_of(layer, optimizer)
    assert found.keys() == expected.keys() and len(found) == 1 + 5 * 4
    for name, (value, map) in found.items():
        want = expected[name] if map is None else ty.weights.cut(expected[name], map)
        assert torch.equal(value.reshape(-1), want), name
    assert optimizer.param_groups[0]["lr"] == lr and optimizer.param_groups[0]["betas"] == (0.8, 0.9)


REPLICATED = ty.Placement.custom(4, [[ty.Replica([0]), ty.Replica([2])], [ty.Replica([1])], [ty.Replica([1]), ty.Replica([0])], [ty.Replica([3])]]).to_json()


def test_there_and_back_again(tmp_path):
    """(ep,tp) = (2,2) -> (1,4) -> uneven with replicas -> (2,2): parameters, buffers, optimizer state and its settings."""
    expected, lr = reference()

    def rank_main(world):
        import torch.distributed.checkpoint as dcp

        with gloo(world, tmp_path):
            layer, optimizer = make((2, 2), world.rank, seed=1)
            for step in range(3):
                layer.train_a_step(optimizer, step)
            check(layer, optimizer, expected, lr)  # no layout trains differently
            dcp.save({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=tmp_path / "0")
            for number, layout in enumerate(((1, 4), ty.Placement.from_json(REPLICATED), (2, 2))):
                layer, optimizer = make(layout, world.rank, seed=5)
                dcp.load({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=tmp_path / str(number))
                check(layer, optimizer, expected, lr)
                dcp.save({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=tmp_path / str(number + 1))
            layer.train_a_step(optimizer, 3)  # and training goes on

    ty.run_ranks(rank_main, 4, timeout_ms=60_000)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_loads_it_all(tmp_path):
    """A checkpoint of four ranks, without process groups, as plain tensors: it has the full shapes and values."""
    import torch.distributed.checkpoint as dcp

    def rank_main(world):
        with gloo(world, tmp_path):
            layer, _ = make((2, 2), world.rank, seed=1)
            dcp.save(tyt.TrainingState(layer).state_dict(), checkpoint_id=tmp_path / "saved")

    ty.run_ranks(rank_main, 4, timeout_ms=60_000)
    whole, _ = make((1, 1), 0, seed=1)
    state = {"model": {name: torch.full_like(value, 7) for name, value in whole.state_dict().items()}}
    dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(state["model"][name], value), name


def test_dtensors_and_shards_read_each_other(tmp_path):
    def rank_main(world):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh

        with gloo(world, tmp_path):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
            layer, _ = make((2, 2), world.rank, seed=1)
            ours = {name: tyt.as_dtensor(getattr(layer, name), mesh) for name in ("w13", "w2", "w13_bias")}
            whole, _ = make((1, 1), 0, seed=1)
            for name, dtensor in ours.items():
                assert torch.equal(dtensor.full_tensor(), getattr(whole, name).detach())
                assert dtensor.to_local().data_ptr() == getattr(layer, name).data_ptr()
            dcp.save(ours, checkpoint_id=tmp_path / "dtensors")
            other, _ = make((1, 4), world.rank, seed=2)
            wanted, _ = make((1, 4), world.rank, seed=1)
            shards = tyt.TrainingState(other).state_dict()["model"]
            dcp.load({name: shards[name] for name in ours}, checkpoint_id=tmp_path / "dtensors")
            for name in ours:
                assert torch.equal(getattr(other, name), getattr(wanted, name)), name
            dcp.save({name: tyt.TrainingState(wanted).state_dict()["model"][name] for name in ours}, checkpoint_id=tmp_path / "shards")
            with torch.no_grad():
                for name in ours:
                    getattr(layer, name).zero_()
            dcp.load(ours, checkpoint_id=tmp_path / "shards")
            again, _ = make((2, 2), world.rank, seed=1)
            for name in ours:
                assert torch.equal(getattr(layer, name), getattr(again, name)), name
            with pytest.raises(ty.UsageError, match="no axis that tp cuts"):
                tyt.as_dtensor(layer.w2_bias, mesh)
            with pytest.raises(ty.UsageError, match="the shard holds 96 elements, not"):
                tyt.as_dtensor(other.w13, mesh)
            with pytest.raises(ty.UsageError, match="the parameter is no shard"):
                tyt.as_dtensor(layer.gate, mesh)

    ty.run_ranks(rank_main, 4, timeout_ms=60_000)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("unit", [1, 6])
def test_a_further_cut_over_a_data_parallel_group(unit, tmp_path):
    """(dp,ep,tp) = (2,2,2): FSDP's even parts of shards, in rows or in the middle of them, read as a whole."""
    import torch.distributed.checkpoint as dcp

    maps = {(dp, rank): ty.weights.expert_shard("w13", SHAPE, ty.Placement.tensor_parallel(4, 2, 2), rank).part(2 if unit == 6 else 5, dp, unit)
            for rank in range(4) for dp in range(2 if unit == 6 else 5)}
    full = torch.arange(math.prod(ty.weights.full_shape("w13", SHAPE)), dtype=torch.float32)
    shape = tuple(ty.weights.full_shape("w13", SHAPE))
    seen = torch.zeros_like(full)
    for map in maps.values():
        shard = ty.weights.cut(full, map)
        for box in boxes_of(shape, map):
            size = math.prod(box.sizes)
            part = full.view(shape)[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes))]
            assert torch.equal(part.reshape(-1), shard[box.local_offset:box.local_offset + size])
            seen[part.reshape(-1).long()] += 1
    assert (seen == 1).all()
    loaded = tyt.sharded_parameter(ty.weights.cut(full, maps[1, 2]) * 0, shape, maps[1, 2])
    module = torch.nn.Module()
    module.w13 = loaded
    dcp.save({"w13": full.view(shape)}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"w13": tyt.TrainingState(module).state_dict()["model"]["w13"]}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(loaded, ty.weights.cut(full, maps[1, 2]))


def test_shards_are_few_boxes():
    """One per expert, however the tensor is cut."""
    placement = ty.Placement.tensor_parallel(4, 2, 2)
    for tensor in TENSORS:
        for rank in range(4):
            boxes = boxes_of(tuple(ty.weights.full_shape(tensor, SHAPE)), ty.weights.expert_shard(tensor, SHAPE, placement, rank))
            assert len(boxes) == (0 if tensor == "w2_bias" and rank % 2 else 2)


def test_what_is_no_shard():
    map = ty.weights.ShardMap.whole(24)
    with pytest.raises(ty.UsageError, match=r"data has 5 elements and full_shape \[4, 6\] 24; the map has 24 of 24"):
        tyt.sharded_parameter(torch.zeros(5), (4, 6), map)
    with pytest.raises(ty.UsageError, match="local is"):
        tyt.ShardedTensor(torch.zeros(6, 4).t(), (4, 6), map)
    with pytest.raises(NotImplementedError, match="compute with its `local`"):
        tyt.ShardedTensor(torch.zeros(24), (4, 6), map) + 1
    assert tyt.shard_of(torch.nn.Parameter(torch.zeros(3))) is None
