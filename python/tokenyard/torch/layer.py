"""The MoE layer as a torch module, where its group computes."""
import torch

from .. import layer as layers
from .._core import Placement
from ..errors import UsageError
from ..model import MoeWeights
from ..weights import Checkpoint, ShardMap, expert_shard, initialise
from .gate import route
from .sharded import expert_parameter

NAMES = [name for name, _ in MoeWeights().items()]
EXPERTS = ("w13", "w2", "w13_bias", "w2_bias")
SHARED = {f"shared_{name}": name for name in EXPERTS}


class _Step(torch.autograd.Function):
    """(out, logits [T,E] float32 when asked for): the logits carry the gradients of losses."""

    @staticmethod
    def forward(ctx, core, options, wants_logits, x, *weights):
        ctx.set_materialize_grads(False)
        needs_backward = any(ctx.needs_input_grad)
        saved = layers.Activations() if needs_backward or wants_logits else None
        out = core.forward(x, saved=saved, **options)
        ctx.core, ctx.saved = core, saved
        ctx.save_for_backward(x, *weights)
        ctx.wanted = [None if weight is None or not weight.requires_grad else weight.dtype for weight in weights]
        return out, saved.logits if wants_logits else None

    @staticmethod
    def backward(ctx, d_out, d_logits):
        x = ctx.saved_tensors[0]  # torch says so if somebody has changed it, or a weight
        d_out = torch.zeros_like(x) if d_out is None else d_out.contiguous()
        d_x, gradients = ctx.core.backward(x, d_out, ctx.saved, d_logits=None if d_logits is None else d_logits.contiguous())
        found = [None if wanted is None else gradient.to(wanted) for wanted, (_, gradient) in zip(ctx.wanted, gradients.items())]
        return None, None, None, d_x, *found


class MoeLayer(torch.nn.Module):
    """tokenyard.MoeLayer with gradients, its weights as parameters (selection_bias: a buffer) by the names of tokenyard.MoeWeights. On a
    GPU gradients need a group made with gradients=True. Experts in fp8, and their scales, are buffers: call such a layer in torch.no_grad().

    Collective, forward and backward: ranks make layers and call them in the same order. Parameters of experts are shards with a map
    (see shard_of()), so that TrainingState saves and loads them in any layout. Of parameters that several ranks hold (gate, shared
    expert, replicas) backward gives the share of this rank's tokens: call sum_gradients() before the optimizer's step.
    """

    def __init__(self, group, weights, gate, *, activation="silu", limit=7.0, alpha=1.702, placement=None, shape=None, shared_shape=None):
        """weights: MoeWeights of torch tensors or parameters. shape, shared_shape: ExpertShapes of what weights are shards of."""
        super().__init__()
        self.group, self.gate = group, gate
        self._activation = {"activation": activation, "limit": limit, "alpha": alpha}
        self._placement = placement
        held = placement or group.placement(weights.gate_weight.shape[0])
        for name, array in weights.items():
            if name in ("selection_bias", "w13_scale", "w2_scale") or (array is not None and array.dtype == torch.float8_e4m3fn):
                self.register_buffer(name, array)
                continue
            if array is not None and not isinstance(array, torch.nn.Parameter):
                if name in EXPERTS and shape is not None:
                    array = expert_parameter(name, shape, held, group.world.rank, data=array)
                elif name in SHARED and shared_shape is not None:
                    array = expert_parameter(SHARED[name], shared_shape, _dense_placement(group), group.dense_rank, data=array)
                else:
                    array = torch.nn.Parameter(array)
            self.register_parameter(name, array)
        self._core = self._made_of = None
        self._layer()

    @staticmethod
    def from_checkpoint(group, checkpoint, layer, model, *, dtype=None, keep_fp8=False, placement=None) -> "MoeLayer":
        """A layer of a tokenyard.weights.Checkpoint (or its path) and its tokenyard.MoeModel: this rank reads what it holds. dtype, keep_fp8:
        as for tokenyard.MoeModel.load()."""
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        return MoeLayer._of_model(group, model, placement, model.load(checkpoint, layer, group, framework="torch", dtype=dtype, keep_fp8=keep_fp8,
                                                                      placement=placement))

    @staticmethod
    def _of_model(group, model, placement, weights):
        return MoeLayer(group, group._moved(weights), model.gate, activation=model.activation, limit=model.limit, alpha=model.alpha, placement=placement,
                        shape=model.shape, shared_shape=model.shared_shape)

    @staticmethod
    def initialised(group, model, name, *, dtype=torch.float32, placement=None, **initialisation) -> "MoeLayer":
        """A layer of a tokenyard.MoeModel with random weights, functions of (seed, name, element) alone: every layout of ranks starts
        from the same bits. initialisation: seed, scale and distribution of tokenyard.weights.initialise(). Biases are zero."""
        held, rank = placement or group.placement(model.num_experts), group.world.rank
        made, gate_map = MoeWeights(), ShardMap.whole(model.num_experts * model.hidden_size)
        made.gate_weight = initialise(f"{name}.gate_weight", gate_map, dtype=str(dtype).removeprefix("torch."), framework="torch",
                                      **initialisation).view(model.num_experts, model.hidden_size)
        for tensor in ("w13", "w2"):
            setattr(made, tensor, expert_parameter(tensor, model.shape, held, rank, name=f"{name}.{tensor}", dtype=dtype, **initialisation))
            if model.shared_expert_width:
                setattr(made, f"shared_{tensor}", expert_parameter(tensor, model.shared_shape, _dense_placement(group), group.dense_rank,
                                                                   name=f"{name}.shared_{tensor}", dtype=dtype, **initialisation))
        if model.family == "gpt_oss":
            made.logit_bias = torch.zeros(model.num_experts, dtype=dtype)
            made.w13_bias = expert_parameter("w13_bias", model.shape, held, rank, dtype=dtype, scale=0.0)
            if expert_shard("w2_bias", model.shape, held, rank).local_elements:
                made.w2_bias = expert_parameter("w2_bias", model.shape, held, rank, dtype=dtype, scale=0.0)
        elif model.family in ("deepseek_v3", "glm4_moe"):
            made.selection_bias = torch.zeros(model.num_experts)
        return MoeLayer._of_model(group, model, placement, made)

    def _weights(self):
        return [getattr(self, name) for name in NAMES]

    def _layer(self):
        """The C++ layer, which looks at the memory of the parameters: another one when that has become another."""
        weights = self._weights()
        made_of = [None if weight is None else (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride()) for weight in weights]
        if made_of != self._made_of:
            for name, weight in zip(NAMES, weights):
                if weight is not None and not weight.is_contiguous():
                    raise UsageError(f"{name} is not dense; make it contiguous()")
            views = MoeWeights(*(None if weight is None else weight.detach() for weight in weights))
            self._core = layers.MoeLayer(self.group, views, self.gate, placement=self._placement, **self._activation)
            self._made_of = made_of
        return self._core

    def forward(self, x, *, mode="throughput", mask=None, given_ids=None, with_routing=False):
        """x [..,H] -> [..,H]: the weighted sum over each token's experts, plus the shared expert's row. mode, mask [T] and given_ids [T,K]
        as in tokenyard.MoeLayer.forward().

        with_routing: (out, Gated): the step's experts and weights, and losses() whose gradients go through this layer's gate. On a GPU
        they are on the CPU all the same, and the GPU is waited for.
        """
        rows = x.reshape(-1, x.shape[-1])
        if not self._wants_gradients(rows):
            return self._forward_alone(x, rows, mode, mask, given_ids, with_routing)
        options = {"mode": mode, "mask": mask, "given_ids": given_ids}
        out, logits = _Step.apply(self._layer(), options, with_routing, rows, *self._weights())
        out = out.view(x.shape)
        return (out, self._gated(logits, mask, given_ids)) if with_routing else out

    def _gated(self, logits, mask, given_ids):
        """On the CPU, with the logits' gradient."""
        bias, mask, given_ids = (None if tensor is None else tensor.cpu() for tensor in (self.selection_bias, mask, given_ids))
        return route(logits.cpu(), self.gate, bias=bias, mask=mask, given_ids=given_ids)

    def _wants_gradients(self, rows):
        wants = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (rows, *self._weights()))
        if wants and self.group.device == "cuda" and not self.group.gradients:
            raise UsageError("a forward that wants gradients, of a group on a GPU without them; make it with gradients=True, or call this in torch.no_grad()")
        return wants

    def _forward_alone(self, x, rows, mode, mask, given_ids, with_routing):
        logits = rows.new_empty((len(rows), len(self.gate_weight)), dtype=torch.float32) if with_routing else None
        out = self._layer().forward(rows.detach(), mode=mode, mask=mask, given_ids=given_ids, logits=logits).view(x.shape)
        return (out, self._gated(logits, mask, given_ids)) if with_routing else out

    def warm_up(self, token_counts) -> None:
        """Collective: as tokenyard.MoeLayer.warm_up()."""
        self._layer().warm_up(token_counts)

    def sum_gradients(self) -> None:
        """Collective, after backward: sums the gradients of gate, shared expert and experts with replicas over the ranks of the group
        that hold them, in float32 and in the order of ranks, respectively replicas, and gives every one the sum. Gradients of other
        experts are complete.
        """
        dense = [name for name in SHARED if self.group.dense_tp > 1]
        named = dict(self.named_parameters())
        for names, collectives in ((dense, self.group.dense_replicas), ([n for n in NAMES if n not in EXPERTS and n not in dense], self.group.replicas)):
            gradients = [named[name].grad for name in names if name in named and named[name].grad is not None]
            if gradients and collectives is not None:
                _sum(gradients, collectives)
        if self._placement is not None and self._placement.max_replicas > 1:
            _sum_replicas([named[name].grad for name in EXPERTS if name in named and named[name].grad is not None], self._placement, self.group)


def _sum(gradients, collectives):
    """All of them in one vector."""
    flat = torch.cat([gradient.float().reshape(-1) for gradient in gradients]).cpu()
    ranks = collectives.world.size
    counts = [len(flat) // ranks + (rank < len(flat) % ranks) for rank in range(ranks)]
    total = collectives.all_gather_v(collectives.reduce_scatter_v(flat, counts), counts)
    for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view(gradient.shape))


def _sum_replicas(gradients, placement, group):
    """gradients: of the local experts, [L, ..] each. Holders of the same shard of an expert send it to each other, and add in the order of
    replicas."""
    # a placement over all ranks, or with gathered shards over the windows of experts
    stride, offset = (1, 0) if placement.ranks == group.world.size else (group.config.mlp_tp, group.tp_rank)
    me, local = group.world.rank // stride, placement.local_experts(group.world.rank // stride)
    holders = {}
    for expert in local:
        replicas = placement.replicas(expert)
        shard = next(replica.shard_ranks.index(me) for replica in replicas if me in replica.shard_ranks)
        if len({len(replica.shard_ranks) for replica in replicas}) > 1:
            raise UsageError(f"the replicas of expert {expert} are cut into different numbers of shards; gradients of such are not summed")
        if len(replicas) > 1:
            holders[expert] = [replica.shard_ranks[shard] for replica in replicas]
    own = {expert: torch.cat([gradient[local.index(expert)].float().reshape(-1).cpu() for gradient in gradients]) for expert in holders}
    to = {peer * stride + offset: [expert for expert in holders if peer in holders[expert]] for peer in range(placement.ranks) if peer != me}
    counts = [sum(len(own[expert]) for expert in to.get(rank, ())) for rank in range(group.world.size)]
    sent = [own[expert] for rank in sorted(to) for expert in to[rank]]
    received = iter(group.replicas.all_to_all_v(torch.cat([torch.empty(0), *sent]), counts, counts).split([len(part) for part in sent]))
    parts = {(rank, expert): next(received) for rank in sorted(to) for expert in to[rank]}
    for expert, ranks in holders.items():
        total = sum(own[expert] if rank == me else parts[rank * stride + offset, expert] for rank in ranks)
        sizes = [gradient[0].numel() for gradient in gradients]
        for gradient, part in zip(gradients, total.split(sizes)):
            gradient[local.index(expert)].copy_(part.view(gradient.shape[1:]))


def _dense_placement(group):
    """Of one expert over the ranks that share dense weights."""
    return Placement.tensor_parallel(1, 1, group.dense_tp)
