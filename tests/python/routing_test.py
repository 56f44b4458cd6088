"""Gates against plain NumPy, placements' builders, presets, plans of memory, topo."""
import json

import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, make, numbers, torch


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_gate(renormalise, framework):
    logits = np.random.default_rng(1).standard_normal((6, 9)).astype(np.float32)
    routing = ty.route(make(logits, "float32", framework), ty.Gate.softmax(top_k=3, renormalise=renormalise, scale=2.0))
    ids, weights, load = map(numbers, routing)
    assert all(is_of(array, framework) for array in routing)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(ids, expected)
    chosen = np.take_along_axis(logits if renormalise else softmax(logits), expected, 1)
    np.testing.assert_allclose(weights, 2 * (softmax(chosen) if renormalise else chosen), rtol=1e-5)
    np.testing.assert_array_equal(load, np.bincount(expected.ravel(), minlength=9))


def test_sigmoid_bias_mask_and_replay():
    rng = np.random.default_rng(2)
    logits, bias = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32) * 3
    scores = 1 / (1 + np.exp(-logits))
    routing = ty.route(logits, ty.Gate.bias_corrected(top_k=2, renormalise=False), bias=bias, mask=np.array([1, 1, 0, 1, 1], bool))
    expected = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :2]
    expected[2] = -1
    np.testing.assert_array_equal(routing.topk_ids, expected)
    np.testing.assert_allclose(routing.topk_weights[3], scores[3][expected[3]], rtol=1e-5)
    assert (routing.topk_weights[2] == 0).all()
    given = np.array([[7, 0]] * 5)
    replay = ty.route(logits, ty.Gate.sigmoid(top_k=2), given_ids=given)
    np.testing.assert_array_equal(replay.topk_ids, given)
    np.testing.assert_allclose(replay.topk_weights, scores[:, [7, 0]], rtol=1e-5)


def test_grouped_gates_stay_in_their_groups():
    logits = np.random.default_rng(3).standard_normal((20, 16)).astype(np.float32)
    grouped = ty.route(logits, ty.Gate.grouped_max(top_k=3, num_groups=4, topk_groups=1)).topk_ids
    assert (grouped // 4 == grouped[:, :1] // 4).all()
    per_group = ty.route(logits, ty.Gate.per_group(top_k=4, num_groups=4)).topk_ids
    assert (np.sort(per_group // 4, 1) == np.arange(4)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_half_precision(dtype):
    logits = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(ty.route(make(logits, dtype, "numpy"), ty.Gate.softmax(2)).topk_ids, [[5, 4], [5, 4]])


def test_placements():
    uniform = ty.Placement.uniform(num_experts=7, ranks=3)
    assert [uniform.local_experts(rank) for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert (uniform.num_experts, uniform.ranks, uniform.max_local_experts, uniform.max_fanout, uniform.max_replicas) == (7, 3, 3, 1, 1)
    tensor_parallel = ty.Placement.tensor_parallel(num_experts=4, ep=2, tp=2)
    assert [(i.rank, i.local_index) for i in tensor_parallel.instances()] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    replicated = ty.Placement.replicated(4, 2, load=[9, 1, 1, 1], redundant=1)
    assert len(replicated.replicas(0)) == 2 and len(replicated.replicas(1)) == 1
    custom = ty.Placement.custom(2, [[ty.Replica([1])], [ty.Replica([0]), ty.Replica([1], share=3)]])
    assert repr(custom.replicas(1)[1]) == "Replica([1], share=3)"
    assert {custom.replica_for(1, 0, token) for token in range(50)} == {0, 1}
    again = ty.Placement.from_json(custom.to_json())
    assert again == custom and hash(again) == hash(custom) and again != uniform
    assert json.loads(custom.to_json())["ranks"] == 2
    assert custom.restricted_to([1]).local_experts(0) == [0, 1]
    moved = ty.moves(uniform, ty.Placement.uniform(7, 3))
    assert moved == []
    assert [(m.expert, m.from_rank, m.to_rank) for m in ty.moves(ty.Placement.uniform(2, 2), ty.Placement.custom(2, [[ty.Replica([1])]] * 2))] == [(0, 0, 1)]


def test_presets():
    assert {"deepseek-v3", "qwen3-30b-a3b"} <= {preset.name for preset in ty.model_presets()}
    preset = ty.model_preset("deepseek-v3")
    assert (preset.num_experts, preset.top_k, preset.hidden_size, preset.has_gate_bias, preset.gate.num_groups) == (256, 8, 7168, True, 8)


def test_plan_of_memory_needs_no_memory():
    items = ty.plan_memory(64, ty.Placement.uniform(256, 64), hidden_size=7168, top_k=8, max_tokens_per_rank=4096)
    receive = next(item for item in items if "receive" in item.purpose)
    assert receive.bytes >= 2 * 64 * 4096 * 7168 * 2 and receive.formula
    assert ty.plan_memory(2, hidden_size=64, top_k=1, max_tokens_per_rank=1)


def test_topo():
    found = ty.topo()
    by_name = {backend.name: backend for backend in found.backends}
    assert by_name["shm"].availability == "available"
    assert all(backend.availability == "available" or (backend.reason and backend.remedy) for backend in found.backends)
    ranks = ty.topo(ty.World.in_process(3)[1])
    assert ranks.ranks == 3 and ranks.links[1][1] == "self" and len(ranks.hosts) == 3
    assert "shm: available" in str(found)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_torch_bfloat16_logits_and_bool_mask():
    routing = ty.route(torch.arange(6).repeat(2, 1).bfloat16(), ty.Gate.softmax(1), mask=torch.tensor([True, False]))
    assert routing.topk_ids.tolist() == [[5], [-1]]
