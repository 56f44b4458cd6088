"""ty.weights: shard maps, their movement between ranks, checkpoints in safetensors."""
import json
import os
import struct

import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, make, numbers, on_ranks
from tokenyard import weights as tw

SHAPE = tw.ExpertShape(num_experts=4, hidden_size=6, expert_width=8)
LAYOUTS = [(1, 1), (2, 2), (1, 4), (4, 1)]
TENSORS = ("w13", "w2", "w13_bias", "w2_bias")


def placement_of(layout):
    return ty.Placement.tensor_parallel(SHAPE.num_experts, *layout)


def maps_of(tensor, layout, shape=SHAPE):
    return [tw.expert_shard(tensor, shape, ty.Placement.tensor_parallel(shape.num_experts, *layout), rank) for rank in range(layout[0] * layout[1])]


def full_of(tensor):
    shape = tw.full_shape(tensor, SHAPE)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def cut_by_hand(tensor, full, layout, rank):
    """By what each axis means."""
    window, shard = divmod(rank, layout[1])
    experts = full[SHAPE.num_experts // layout[0] * window:][:SHAPE.num_experts // layout[0]]
    if tensor == "w2_bias":
        return experts if shard == 0 else experts[:0]
    width = SHAPE.expert_width // layout[1]
    return experts[:, :, shard * width:(shard + 1) * width]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_shards_against_slices(tensor, framework):
    full = full_of(tensor)
    for layout in LAYOUTS:
        rebuilt = make(np.full_like(full, -1), "float32", framework)
        for rank, map in enumerate(maps_of(tensor, layout)):
            shard = tw.cut(make(full, "float32", framework), map)
            expected = cut_by_hand(tensor, full, layout, rank)
            shape = tw.local_shape(tensor, SHAPE, placement_of(layout), rank)
            assert is_of(shard, framework) and tuple(shape) == expected.shape
            np.testing.assert_array_equal(numbers(shard).reshape(shape), expected)
            tw.paste(shard, map, rebuilt)
        np.testing.assert_array_equal(numbers(rebuilt), full)


def test_the_example_of_the_specification():
    shape = tw.ExpertShape(num_experts=2, hidden_size=1, expert_width=4)
    rows = [tw.cut(np.arange(16), map).tolist() for map in maps_of("w13", (2, 2), shape)]
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    map = maps_of("w13", (2, 2), shape)[1]
    assert [(run.global_offset, run.local_offset, run.length) for run in map.runs] == [(2, 0, 2), (6, 2, 2)]
    assert map == tw.ShardMap.of_ranges(16, [(2, 2), (6, 2)]) and map != tw.ShardMap.whole(16)


def test_a_further_even_cut():
    map = maps_of("w13", (2, 2))[3]
    parts = [map.part(3, i, unit=SHAPE.hidden_size) for i in range(3)]
    assert [part.local_elements for part in parts] == [36, 30, 30]
    full = full_of("w13")
    np.testing.assert_array_equal(np.concatenate([tw.cut(full, part) for part in parts]), tw.cut(full, map))


@pytest.mark.parametrize("call, text", [
    (lambda: tw.expert_shard("w13", SHAPE, ty.Placement.tensor_parallel(4, 1, 3), 0), "w13.*8"),
    (lambda: tw.expert_shard("w4", SHAPE, placement_of((1, 1)), 0), "tensor w4; expected w13"),
    (lambda: tw.ShardMap.of_ranges(4, [(0, 2), (1, 2)]), "overlap"),
    (lambda: tw.cut(np.zeros(5), tw.ShardMap.whole(4)), "full has 5 elements; the map is of a tensor of 4"),
    (lambda: tw.paste(np.zeros(4), tw.ShardMap.whole(4), np.zeros((2, 4))[:, :2]), "full is not dense"),
    (lambda: tw.initialise("w", tw.ShardMap.whole(4), framework="jax"), "framework = 'jax'"),
    (lambda: tw.initialise("w", tw.ShardMap.whole(4), distribution="cauchy"), "distribution cauchy"),
    (lambda: tw.expert_source("llama", 0, "w13", SHAPE), "llama"),
    (lambda: tw.expert_source("qwen3_moe", 0, "w13_bias", SHAPE), "w13_bias: qwen3_moe has no expert biases"),
    (lambda: tw.shared_expert_source("qwen3_moe", 0, "w2", SHAPE), "qwen3_moe has no shared expert"),
    (lambda: tw.dense_layer_source("gpt_oss", 0, "w2", SHAPE), "gpt_oss"),
    (lambda: tw.Checkpoint("/nowhere"), "/nowhere"),
])
def test_errors(call, text):
    with pytest.raises(ty.UsageError, match=text):
        call()


def test_experts_cut_differently_have_no_common_shape():
    placement = ty.Placement.custom(3, [[ty.Replica([0, 1]), ty.Replica([2])], [ty.Replica([1])]])
    shape = tw.ExpertShape(num_experts=2, hidden_size=1, expert_width=2)
    assert tw.local_shape("w13", shape, placement, 0) == [1, 2, 1, 1]
    with pytest.raises(ty.UsageError, match="w13: experts of rank 1 are cut into 1 and 2 shards"):
        tw.local_shape("w13", shape, placement, 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_again(framework, dtype):
    """(2,2) -> (1,4) -> (2,2), bit for bit; and the full tensor on a rank."""
    full = {tensor: make(full_of(tensor) % 128, dtype, framework) for tensor in TENSORS}

    def rank_main(world):
        collectives = ty.Collectives(world, timeout_ms=20_000)
        for tensor in TENSORS:
            before, after = maps_of(tensor, (2, 2)), maps_of(tensor, (1, 4))
            shard = tw.cut(full[tensor], before[world.rank])
            moved = tw.reshard(collectives, before, after, shard)
            np.testing.assert_array_equal(numbers(moved, dtype), numbers(tw.cut(full[tensor], after[world.rank]), dtype))
            np.testing.assert_array_equal(numbers(tw.reshard(collectives, after, before, moved), dtype), numbers(shard, dtype))
            whole = tw.gather_full(collectives, after, moved, root=2)
            assert (whole is None) == (world.rank != 2)
            if whole is not None:
                assert is_of(whole, framework) and whole.dtype == full[tensor].dtype
                np.testing.assert_array_equal(numbers(whole, dtype), numbers(full[tensor], dtype).reshape(-1))

    on_ranks(rank_main, 4)


def test_reshard_plan_moves_what_is_not_there():
    before, after = maps_of("w13", (2, 2)), maps_of("w13", (1, 4))
    plan = tw.reshard_plan(before, after)
    assert sum(piece.length for piece in plan) == SHAPE.num_experts * 2 * SHAPE.expert_width * SHAPE.hidden_size
    assert {piece.from_rank for piece in plan if piece.to_rank == 0} == {0, 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initialisation_knows_no_layout(dtype):
    whole = tw.initialise("layers.3.w13", maps_of("w13", (1, 1))[0], seed=7, scale=0.5, dtype=dtype)
    assert np.std(numbers(whole, dtype)) == pytest.approx(0.5, rel=0.1)
    for layout in LAYOUTS:
        for map in maps_of("w13", layout):
            np.testing.assert_array_equal(tw.initialise("layers.3.w13", map, seed=7, scale=0.5, dtype=dtype), tw.cut(whole, map))
    assert not np.array_equal(tw.initialise("layers.4.w13", maps_of("w13", (1, 1))[0], seed=7, scale=0.5, dtype=dtype), whole)
    assert np.abs(tw.initialise("u", tw.ShardMap.whole(1000), distribution="uniform", scale=0.25)).max() == pytest.approx(0.25, rel=0.02)


def hand_written(family, layer, tensor, full):
    """{name: array} of a full tensor, by the names and orders of the family's own files."""
    mlp = f"model.layers.{layer}.mlp."
    if family == "gpt_oss":
        if tensor == "w13":
            return {mlp + "experts.gate_up_proj": full.transpose(0, 3, 2, 1).reshape(4, 6, 16)}  # gate and up alternate
        if tensor == "w2":
            return {mlp + "experts.down_proj": full.transpose(0, 2, 1)}
        if tensor == "w13_bias":
            return {mlp + "experts.gate_up_proj_bias": full.transpose(0, 2, 1).reshape(4, 16)}
        return {mlp + "experts.down_proj_bias": full}
    if tensor == "w13":
        return {f"{mlp}experts.{e}.{name}.weight": full[e, p] for e in range(4) for p, name in enumerate(("gate_proj", "up_proj"))}
    return {f"{mlp}experts.{e}.down_proj.weight": full[e] for e in range(4)}


def write_file(path, tensors):
    """A safetensors file, by the format's description and nothing of the library."""
    header, data = {}, b""
    for name, array in tensors.items():
        array = np.ascontiguousarray(array)
        header[name] = {"dtype": {"float32": "F32", "uint16": "BF16"}[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


FAMILY_TENSORS = [(family, tensor) for family in ("qwen3_moe", "deepseek_v3", "glm4_moe") for tensor in ("w13", "w2")] + [("gpt_oss", t) for t in TENSORS]


@pytest.mark.parametrize("family, tensor", FAMILY_TENSORS)
def test_families(family, tensor, tmp_path):
    """Files as the family has them are read as our full tensors' shards, and written the same again."""
    full, expected = full_of(tensor), hand_written(family, 3, tensor, full_of(tensor))
    write_file(tmp_path / "model.safetensors", expected)
    checkpoint, source = tw.Checkpoint(tmp_path), tw.expert_source(family, 3, tensor, SHAPE)
    assert source.names == list(expected) and checkpoint.dtype_of(source) == "float32"
    for layout in LAYOUTS:
        for map in maps_of(tensor, layout):
            np.testing.assert_array_equal(checkpoint.read_shard(source, map), tw.cut(full, map))
    with tw.Writer(tmp_path / "again.safetensors", source.plans("float32"), {"format": "pt"}) as writer:
        writer.write_full(source, full)
    again = tw.Checkpoint(tmp_path / "again.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(again.read(name), array)


def test_names_of_gates_and_shared_experts():
    assert tw.gate_names("gpt-oss-20b", 1) == ("model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.bias")
    assert tw.gate_names("qwen3_moe", 0) == ("model.layers.0.mlp.gate.weight", "")
    assert tw.gate_names("glm4_moe", 2)[1] == "model.layers.2.mlp.gate.e_score_correction_bias"
    one = tw.ExpertShape(num_experts=1, hidden_size=6, expert_width=8)
    assert tw.shared_expert_source("deepseek_v3", 2, "w2", one).names == ["model.layers.2.mlp.shared_experts.down_proj.weight"]
    assert tw.dense_layer_source("glm4_moe", 0, "w2", one).names == ["model.layers.0.mlp.down_proj.weight"]
    assert tw.family_name("glm-4.5-air") == "glm4_moe"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_any_tensor_of_a_file(framework, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"scalar": make(2.5, "float32", framework).reshape(()), "bf": make(np.ones((2, 3)), "bfloat16", framework),
               "none": make(np.zeros((0, 4)), "float64", framework), "ids": make(np.arange(5), "int64", framework)}
    plans = [("scalar", "float32", []), ("bf", "bfloat16", [2, 3]), ("none", "float64", [0, 4]), ("ids", "int64", [5])]
    with tw.Writer(path, plans, {"who": "test"}) as writer:
        assert not path.exists()
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    checkpoint = tw.Checkpoint(path)
    assert checkpoint.names() == sorted(tensors) and "bf" in checkpoint and "gate" not in checkpoint
    for name, dtype, shape in plans:
        read = checkpoint.read(name, framework)
        assert (checkpoint.dtype(name), checkpoint.shape(name), list(read.shape)) == (dtype, shape, shape)
        assert is_of(read, framework) and read.dtype == tensors[name].dtype
        np.testing.assert_array_equal(numbers(read, dtype), numbers(tensors[name], dtype))
    with pytest.raises(ty.UsageError, match="bff"):
        checkpoint.read("bff")


def test_a_file_that_was_not_finished(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ty.UsageError, match="b"):
        with tw.Writer(path, [("a", "float32", [2]), ("b", "float32", [2])]) as writer:
            writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(RuntimeError, match="something else"):
        with tw.Writer(path, [("a", "float32", [2])]) as writer:
            raise RuntimeError("something else")
    del writer
    assert list(tmp_path.iterdir()) == []
    with tw.Writer(path, [("a", "float32", [2])]) as writer:
        with pytest.raises(ty.UsageError, match="a"):
            writer.write("a", np.zeros(3, np.float32))
        writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ty.UsageError, match="finished"):
        writer.write("a", np.zeros(2, np.float32))


def test_broken_files(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(ty.UsageError, match='model.safetensors: tensor "w": F32 of shape .2. are 8 bytes'):
        tw.Checkpoint(tmp_path)
    write_file(path, {"model.layers.0.mlp.experts.0.down_proj.weight": np.zeros((8, 6), np.float32)})
    with pytest.raises(ty.UsageError, match="down_proj.weight: its shape is .8, 6., expected .6, 8."):
        tw.Checkpoint(path).dtype_of(tw.expert_source("qwen3_moe", 0, "w2", SHAPE))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's list of mapped pages")
def test_only_owned_runs_are_read(tmp_path):
    """Of 32 MiB, a rank with an eighth of the experts has an eighth in memory."""
    shape = tw.ExpertShape(num_experts=8, hidden_size=512, expert_width=1024)
    path, source = tmp_path / "model.safetensors", tw.expert_source("qwen3_moe", 0, "w13", shape)
    full = np.zeros(tw.full_shape("w13", shape), np.float32)
    with tw.Writer(path, source.plans("float32")) as writer:
        writer.write_full(source, full)
    checkpoint = tw.Checkpoint(path)
    read = checkpoint.read_shard(source, tw.expert_shard("w13", shape, ty.Placement.uniform(8, 8), 5))
    mapped = resident = 0
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0]:
            is_ours = str(path) in line
        elif is_ours and line.startswith(("Size:", "Rss:")):
            mapped += int(line.split()[1]) if line.startswith("Size:") else 0
            resident += int(line.split()[1]) if line.startswith("Rss:") else 0
    assert mapped >= 32 * 1024 and len(read) * 4 == 4 << 20
    assert 4 * 1024 <= resident < 5 * 1024
