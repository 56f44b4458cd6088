"""MoE blocks of Hugging Face transformers with small random weights, saved by it, and what they compute."""
import os

import torch

import tokenyard as ty

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up
EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 3, 32, 16
FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss")


def config_of(family):
    import transformers

    common = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
              "intermediate_size": WIDTH, "initializer_range": 0.3, "num_experts_per_tok": TOP_K, "tie_word_embeddings": False}
    own_gate = {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH, "first_k_dense_replace": 0, "n_shared_experts": 1}
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=WIDTH, norm_topk_prob=True, head_dim=16)
    if family == "deepseek_v3":
        return transformers.DeepseekV3Config(**common, **own_gate, n_group=4, topk_group=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
                                             qk_nope_head_dim=8, v_head_dim=8, routed_scaling_factor=2.5)
    if family == "glm4_moe":
        return transformers.Glm4MoeConfig(**common, **(own_gate | {"n_shared_experts": 2}), n_group=1, topk_group=1, head_dim=16, routed_scaling_factor=1.5)
    return transformers.GptOssConfig(**common, num_local_experts=EXPERTS, head_dim=16)


def save(family, dtype, folder, seed=0):
    """The block of a new model, which is then in `folder`, in the files' form."""
    import transformers

    torch.manual_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(config_of(family)).to(dtype)
    block = model.model.layers[0].mlp
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if "bias" in name:  # zero, as it comes
            tensor.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return block


def router_of(block):
    return block.router if hasattr(block, "router") else block.gate


def run(block, x):
    """(out [T,H], the experts of each token, ascending [T,K])."""
    ids = []
    hook = router_of(block).register_forward_hook(lambda _, __, found: ids.append(found[2]))
    out = block(x[None])
    hook.remove()
    return (out[0] if isinstance(out, tuple) else out)[0], ids[0].sort(1).values


def gradients_by_autograd(block, x, d_out):
    """{name of ours: gradient of the full tensor}, and that of x."""
    x = x.clone().requires_grad_()
    run(block, x)[0].backward(d_out)
    experts, found = block.experts, {"d_x": x.grad, "gate_weight": router_of(block).weight.grad}
    if hasattr(block, "router"):  # gpt-oss: [E,H,2I], gate and up alternating
        found["logit_bias"] = block.router.bias.grad
        found["w13"] = experts.gate_up_proj.grad.view(EXPERTS, HIDDEN, WIDTH, 2).permute(0, 3, 2, 1)
        found["w2"] = experts.down_proj.grad.transpose(1, 2)
        found["w13_bias"] = experts.gate_up_proj_bias.grad.view(EXPERTS, WIDTH, 2).transpose(1, 2)
        found["w2_bias"] = experts.down_proj_bias.grad
        return found
    found["w13"] = experts.gate_up_proj.grad.view(EXPERTS, 2, WIDTH, HIDDEN)
    found["w2"] = experts.down_proj.grad
    if hasattr(block, "shared_experts"):
        shared = block.shared_experts
        found["shared_w13"] = torch.stack([shared.gate_proj.weight.grad, shared.up_proj.weight.grad])[None]
        found["shared_w2"] = shared.down_proj.weight.grad[None]
    return found


def full_of(parts, maps, shape):
    """The full tensor of the parts of all ranks, that of each element summed."""
    full = torch.zeros(shape)
    for part, map in zip(parts, maps):
        whole = torch.zeros(shape)
        ty.weights.paste(part.float(), map, whole)
        full += whole
    return full
