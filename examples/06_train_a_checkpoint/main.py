"""A layer trained on EP 2 x TP 2, saved by torch.distributed.checkpoint, continued on EP 4: the losses go on falling."""
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import tokenyard as ty
import tokenyard.torch as tyt

MODEL = {"family": "deepseek_v3", "num_experts": 8, "top_k": 2, "hidden_size": 32, "expert_width": 16, "shared_expert_width": 16}


def train(world, folder, ep, steps, resumes):
    model = ty.MoeModel(**MODEL, gate=ty.Gate.bias_corrected(2, num_groups=4, topk_groups=2))
    group = ty.ExpertGroup.of_model(world, ty.parallel.solve(device_count=world.size, ep=ep), model, max_tokens_per_rank=24)
    layer = tyt.MoeLayer.initialised(group, model, "layers.0", scale=0.1)  # the same bits in every layout
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    if resumes:
        dcp.load({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=folder)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))[world.rank::world.size]
    losses = []
    for _ in range(steps):
        out, gated = layer(x, with_routing=True)
        loss = (out - x.roll(1, 1)).square().sum() / 24
        (loss + gated.losses(balance_alpha=0.01, world=world)).backward()
        layer.sum_gradients()  # of gate and shared expert, which all ranks hold
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(world_sum(loss.detach())))
    if not resumes:
        dcp.save({"training": tyt.TrainingState(layer, optimizer)}, checkpoint_id=folder)
    return losses


def world_sum(value):
    dist.all_reduce(value)
    return value


def rank_main(world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=world.rank, world_size=world.size)
    losses = train(world, f"{folder}/saved", ep=2, steps=15, resumes=False) + train(world, f"{folder}/saved", ep=4, steps=15, resumes=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = ty.run_ranks(rank_main, 4, folder)[0]
    assert losses[15] < losses[14] < losses[0] and losses[-1] < 0.8 * losses[0], losses
    print(f"loss {losses[0]:.2f} -> {losses[14]:.2f} on EP 2 x TP 2 -> {losses[-1]:.2f} on EP 4")
