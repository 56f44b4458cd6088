"""MoeModel: what configuration files say, and a rank's weights out of a checkpoint."""
import json

import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, numbers, on_ranks, torch
from tokenyard import weights as tw

if torch is not None:
    import tokenyard.torch as tokenyard_torch

# Of the published configuration files, what concerns MoE layers: with the preset they belong to.
PUBLISHED = {
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                      "intermediate_size": 6144, "norm_topk_prob": True},
    "deepseek-v3": {"model_type": "deepseek_v3", "hidden_size": 7168, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
                    "intermediate_size": 18432, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
                    "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "glm-4.5": {"model_type": "glm4_moe", "hidden_size": 5120, "n_routed_experts": 160, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
                "intermediate_size": 12288, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "gpt-oss-20b": {"model_type": "gpt_oss", "hidden_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880,
                    "swiglu_limit": 7.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    model, preset = ty.MoeModel.read(tmp_path), ty.model_preset(name)
    assert model.family == tw.family_name(name) == ty.MoeModel.read(tmp_path / "config.json").family
    for field in ("num_experts", "top_k", "hidden_size", "expert_width", "shared_expert_width"):
        assert getattr(model, field) == getattr(preset, field), field
    for field in ("top_k", "renormalise", "scale", "num_groups", "topk_groups"):
        assert getattr(model.gate, field) == getattr(preset.gate, field), field
    logits = np.random.default_rng(1).normal(size=(5, model.num_experts)).astype(np.float32)
    bias = {"bias": np.zeros(model.num_experts, np.float32)} if preset.has_gate_bias else {}
    for ours, theirs in zip(ty.route(logits, model.gate, **bias), ty.route(logits, preset.gate, **bias)):
        np.testing.assert_array_equal(ours, theirs)
    assert model.activation == ("clamped" if name.startswith("gpt") else "silu")


@pytest.mark.parametrize("content, text", [
    (None, "config.json: .*No such file"),
    ("{", "config.json"),
    ('{"model_type": "llama"}', "llama"),
    ('{"model_type": "qwen3_moe", "hidden_size": 8}', "config.json: it has no num_experts_per_tok; expected the configuration of a MoE model"),
])
def test_files_that_say_nothing(content, text, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ty.UsageError, match=text):
        ty.MoeModel.read(tmp_path if content is not None else tmp_path / "config.json")


def fp8_checkpoint(folder, model):
    """A layer as DeepSeek-V3's files have it, blocks of 128 x 128. ({name of a full tensor: in float32}, {the same: as in the files}, other tensors)"""
    rng, full, kept = np.random.default_rng(3), {}, {}
    plans = [("model.layers.4.mlp.gate.weight", "float32", [model.num_experts, model.hidden_size]),
             ("model.layers.4.mlp.gate.e_score_correction_bias", "float32", [model.num_experts])]
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, _, shape in plans}
    with_sources = []
    for prefix, shape, source_of in (("", model.shape, tw.expert_source), ("shared_", model.shared_shape, tw.shared_expert_source)):
        for tensor in ("w13", "w2"):
            sizes = tw.full_shape(tensor, shape)
            rows = rng.normal(size=(int(np.prod(sizes[:-1])), sizes[-1])).astype(np.float32)
            q, _ = ty.quantise(rows)  # any fp8 numbers
            scales = rng.uniform(0.5e-4, 2e-4, tw.full_shape(f"{tensor}_scale", shape)).astype(np.float32)
            values = ty.dequantise(q, np.ones((len(q), (sizes[-1] + 127) // 128), np.float32), "float32").reshape(sizes)
            full[prefix + tensor] = values * scales.repeat(128, -2).repeat(128, -1)[..., :sizes[-2], :sizes[-1]]
            for name, array, dtype in ((tensor, q, "float8_e4m3"), (f"{tensor}_scale", scales, "float32")):
                kept[prefix + name] = array
                source = source_of("deepseek_v3", 4, name, shape)
                plans += source.plans(dtype)
                with_sources.append((source, array, dtype))
    with tw.Writer(folder / "model.safetensors", plans) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        for source, array, dtype in with_sources:
            writer.write_full(source, array, dtype)
    return full, kept, arrays


FP8_MODEL = ty.MoeModel("deepseek_v3", 4, 2, 256, 512, ty.Gate.bias_corrected(2), shared_expert_width=128)


def on_fp8_groups(rank_main, **parallel):
    """rank_main(world, group) on ranks of EP 2 x TP 2, or as said."""
    parallel = {"ep": 2, "mlp_tp": 2, "dp": 4, "device_count": 4, **parallel}
    return on_ranks(lambda world: rank_main(world, ty.ExpertGroup.of_model(world, ty.parallel.solve(**parallel), FP8_MODEL, 4)), parallel["device_count"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fp8_experts_become_float32(framework, tmp_path):
    full, _, arrays = fp8_checkpoint(tmp_path, FP8_MODEL)

    def rank_main(world, group):
        loaded = FP8_MODEL.load(tw.Checkpoint(tmp_path), 4, group, framework=framework)
        assert loaded.w13_scale is None and loaded.w2_scale is None
        for tensor in ("w13", "w2"):
            expected = tw.cut(full[tensor], tw.expert_shard(tensor, FP8_MODEL.shape, group.placement(4), world.rank))
            assert is_of(getattr(loaded, tensor), framework)
            np.testing.assert_array_equal(numbers(getattr(loaded, tensor)).reshape(-1), expected)
            np.testing.assert_array_equal(numbers(getattr(loaded, f"shared_{tensor}")), full[f"shared_{tensor}"])
        np.testing.assert_array_equal(numbers(loaded.gate_weight), arrays["model.layers.4.mlp.gate.weight"])
        np.testing.assert_array_equal(numbers(loaded.selection_bias), arrays["model.layers.4.mlp.gate.e_score_correction_bias"])
        if framework == "torch":
            halves = FP8_MODEL.load(tw.Checkpoint(tmp_path), 4, group, framework=framework, dtype="bfloat16")
            assert (halves.w13 == loaded.w13.bfloat16()).all() and halves.w13.dtype == loaded.w13.bfloat16().dtype
        else:
            with pytest.raises(ty.UsageError, match="from float32 to bfloat16 in NumPy"):
                FP8_MODEL.load(tw.Checkpoint(tmp_path), 4, group, framework=framework, dtype="bfloat16")

    on_fp8_groups(rank_main)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fp8_experts_stay_so_when_asked_to(framework, tmp_path):
    """Bit for bit as in the files, with the scales of their blocks; and a layer of them gives what it gives of their numbers in float32."""
    full, kept, _ = fp8_checkpoint(tmp_path, FP8_MODEL)
    rows = np.random.default_rng(5).standard_normal((4, 4, 256), np.float32)

    def rank_main(world, group):
        checkpoint, options = tw.Checkpoint(tmp_path), {"framework": framework}
        loaded = FP8_MODEL.load(checkpoint, 4, group, keep_fp8=True, **options)
        for tensor in ("w13", "w2", "w13_scale", "w2_scale"):
            expected = tw.cut(kept[tensor], tw.expert_shard(tensor, FP8_MODEL.shape, group.placement(4), world.rank))
            array = getattr(loaded, tensor)
            assert is_of(array, framework)
            assert list(array.shape) == tw.local_shape(tensor, FP8_MODEL.shape, group.placement(4), world.rank)
            bits = array.view(torch.uint8) if framework == "torch" and tensor in ("w13", "w2") else array
            np.testing.assert_array_equal(np.asarray(bits).reshape(-1), expected)
        np.testing.assert_array_equal(numbers(loaded.shared_w13), full["shared_w13"])  # which no layer takes in fp8
        layer = ty.MoeLayer.from_checkpoint(group, checkpoint, 4, FP8_MODEL, keep_fp8=True, **options)
        wide = ty.MoeLayer.from_checkpoint(group, checkpoint, 4, FP8_MODEL, **options)
        out, expected = layer(rows[world.rank]), wide(rows[world.rank])
        np.testing.assert_array_equal(out, expected)
        assert np.abs(out).max() > 1e-3
        with pytest.raises(ty.UsageError, match="float8_e4m3 goes forward only.*widen the weights"):
            layer(rows[world.rank], saved=ty.Activations())
        if framework == "torch":
            module = tokenyard_torch.MoeLayer.from_checkpoint(group, checkpoint, 4, FP8_MODEL, keep_fp8=True)
            assert {"w13", "w2", "w13_scale", "w2_scale"} <= {name for name, _ in module.named_buffers()}
            with torch.no_grad():
                np.testing.assert_array_equal(module(torch.from_numpy(rows[world.rank])).numpy(), expected)

    on_fp8_groups(rank_main)


def test_fp8_shards_that_would_cut_a_scale(tmp_path):
    fp8_checkpoint(tmp_path, FP8_MODEL)

    def rank_main(world, group):
        with pytest.raises(ty.UsageError, match="w13_scale.*8"):
            FP8_MODEL.load(tw.Checkpoint(tmp_path), 4, group, keep_fp8=True)

    on_fp8_groups(rank_main, ep=1, mlp_tp=8, dp=8, device_count=8)
