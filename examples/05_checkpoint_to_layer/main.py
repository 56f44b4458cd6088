"""A model's folder, its layer on EP 2 x TP 2, and the same on one rank: the sums agree."""
import json
import tempfile
from pathlib import Path

import numpy as np

import tokenyard as ty

SIZES = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 32, "moe_intermediate_size": 16, "norm_topk_prob": True}


def write_model(folder):
    """As Qwen3-MoE's files are: a configuration, and tensors by their names."""
    (folder / "config.json").write_text(json.dumps(SIZES))
    model, gate = ty.MoeModel.read(folder), ty.weights.gate_names("qwen3_moe", 0)[0]
    sources = [ty.weights.expert_source(model.family, 0, tensor, model.shape) for tensor in ("w13", "w2")]
    plans = [ty.weights.TensorPlan(gate, "float32", [8, 32]), *(plan for source in sources for plan in source.plans("float32"))]
    with ty.weights.Writer(folder / "model.safetensors", plans) as writer:
        writer.write(gate, ty.weights.initialise(gate, ty.weights.ShardMap.whole(8 * 32), scale=0.3))
        for source in sources:
            shape = ty.weights.full_shape(source.tensor, model.shape)
            writer.write_full(source, ty.weights.initialise(source.tensor, ty.weights.ShardMap.whole(int(np.prod(shape))), scale=0.3))


def rank_main(world, folder, ep, rows):
    model = ty.MoeModel.read(folder)                                                     # sizes, gate, activation
    config = ty.parallel.solve(device_count=world.size, ep=ep)                           # how the ranks are divided
    group = ty.ExpertGroup.of_model(world, config, model, max_tokens_per_rank=len(rows))  # once, for all layers
    layer = ty.MoeLayer.from_checkpoint(group, ty.weights.Checkpoint(folder), 0, model)   # this rank's part of the files
    mine = rows[world.rank::world.size]
    layer.warm_up([len(mine)])
    return layer(mine, mode=ty.mode_for_step(len(rows)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        x = np.random.default_rng(1).standard_normal((24, 32), np.float32)
        alone = ty.run_ranks(rank_main, 1, folder, 1, x)[0]
        for rank, sums in enumerate(ty.run_ranks(rank_main, 4, folder, 2, x)):
            assert np.allclose(sums, alone[rank::4], rtol=1e-5, atol=1e-5), f"EP 2 x TP 2 and one rank disagree on rank {rank}"
    print("24 tokens through 8 experts on 4 ranks, EP 2 x TP 2, as on one")
