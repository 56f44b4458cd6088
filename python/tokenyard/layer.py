"""The MoE feed-forward of a model, on ranks: gate, routing, dispatch, experts, combine, shared expert; forward and backward."""
from dataclasses import fields

from . import _core
from .arrays import Frame, as_array, current_stream, is_torch, on_cpu, tensor, torch_if_used, writable
from .collectives import Collectives
from .errors import UsageError
from .exchange import _set
from .model import MoeWeights
from .routing import Routing
from .world import World


class ExpertGroup:
    """The ranks that hold all experts together (ep * mlp_tp of a parallel.Config; one of outer_dp such groups), and what they meet with:
    one exchange and the collectives. One serves all layers of a model.

    Collective over a world of config.device_count ranks, with the same arguments. num_experts, top_k, hidden_size: the most of any
    layer; max_tokens_per_rank: of a step; dtype: the widest type of rows, on a GPU that of rows for fp8 experts. expert_tp: "virtual" (one
    exchange over all ranks) or "gathered" (an exchange over ep, collectives over the shards of a window). same_tokens: with ep = 1 and
    mlp_tp > 1, all ranks have the same tokens. dense_tp: ranks that share a shared expert's weights. device: "cuda" for layers that go forward on this rank's GPU
    (device_index, default the current one), of torch tensors there, on torch's current stream; make all layers before a graph is
    captured. gradients: there layers go backward, too, and hold memory for it. Further options: max_local_experts, receive_rows, max_expert_rows, sm_budget, depth, num_threads, trace, transport.
    """

    def __init__(self, world, config, *, num_experts, top_k, hidden_size, max_tokens_per_rank, dtype="float32", expert_tp="virtual",
                 same_tokens=False, dense_tp=1, device="cpu", gradients=False, timeout_ms=0, **options):
        options.update(num_experts=num_experts, top_k=top_k, hidden_size=hidden_size, max_tokens_per_rank=max_tokens_per_rank, dtype=dtype,
                       expert_tp=expert_tp, same_tokens=same_tokens, dense_tp=dense_tp, device=device, gradients=gradients, timeout_ms=timeout_ms)
        core = _core.ExpertGroupOptions()
        for name, value in options.items():
            if not hasattr(core, name):
                raise UsageError(f"an expert group has no option {name!r}; expected one of {', '.join(n for n in dir(core) if n[0] != '_')}")
            _set(core, name, value)
        self._core = _core.ExpertGroup(world._core, config._as_core(), core)
        self._world = World(self._core.world(), parent=world)
        self._collectives = {}
        self.config, self.dense_tp, self.expert_tp, self.dtype, self.device, self.gradients = config, dense_tp, expert_tp, dtype, device, gradients
        self._index = self._core.options().device_index  # the GPU

    @staticmethod
    def of_model(world, config, model, max_tokens_per_rank, **options) -> "ExpertGroup":
        """With the sizes of a MoeModel."""
        return ExpertGroup(world, config, num_experts=model.num_experts, top_k=model.top_k, hidden_size=model.hidden_size,
                           max_tokens_per_rank=max_tokens_per_rank, **options)

    world = property(lambda self: self._world, doc="Of this group: rank = ep_rank * mlp_tp + tp_rank.")

    def _collectives_of(self, name, make_world):
        """None of one rank. Not functools.cached_property, which makes ranks that are threads wait for each other."""
        if name not in self._collectives:
            world = make_world()
            self._collectives[name] = Collectives(world) if world.size > 1 else None
        return self._collectives[name]

    @property
    def replicas(self):
        """Collectives over all ranks, for what all of them hold; None where there is one rank. Collective when first asked for."""
        return self._collectives_of("all", lambda: self.world)

    @property
    def dense_replicas(self):
        """Collectives over the ranks with this dense_rank; None where there is one. Collective when first asked for."""
        return self._collectives_of("dense", lambda: self.world.split(self.dense_rank, self.world.rank))

    ep_rank = property(lambda self: self._core.ep_rank, doc="Which window of experts this rank holds.")
    tp_rank = property(lambda self: self._core.tp_rank, doc="Which shard of them.")
    dense_rank = property(lambda self: self._core.dense_rank, doc="Which shard of dense weights.")
    has_exchange = property(lambda self: self._core.has_exchange, doc="False with ep = 1: then there is none.")

    def placement(self, num_experts):
        """Where experts are unless a layer says otherwise, over `world`: what weights.expert_shard() takes."""
        return self._core.placement(num_experts)

    def check(self) -> None:
        """Raises what is known of steps that were only enqueued on a GPU; waits for nothing."""
        self._core.check()

    def _place(self, value, what):
        """As arrays.as_array(), where the layers of this group compute."""
        if self.device == "cpu":
            return on_cpu(value, what)
        array = as_array(value, what)
        if not is_torch(array) or not array.is_cuda or array.get_device() != self._index:
            where = array.device if is_torch(array) else "a NumPy array"
            raise UsageError(f"{what} is {where}; the layers of this group take torch tensors on cuda:{self._index}: move it there")
        return array

    def _frame(self, array):
        return Frame.of(array, self.device, max(self._index, 0))

    def _stream(self):
        return current_stream(self._index) if self.device == "cuda" else 0

    def _moved(self, weights):
        """MoeWeights whose torch tensors are where this group computes; parameters stay what they are."""
        if self.device == "cpu":
            return weights
        place, found = torch_if_used().device("cuda", self._index), MoeWeights()
        for name, array in weights.items():
            if isinstance(array, torch_if_used().nn.Parameter):
                array.data = array.data.to(place)
            elif is_torch(array):
                array = array.to(place)
            setattr(found, name, array)
        return found

    def take_spans(self) -> list:
        """PhaseSpans of layers since the last call: "route", "dispatch", "shared", "experts", "combine"; on a GPU also "gate", and it waits
        for them. Empty without trace=True."""
        return self._core.take_spans()


def mode_for_step(max_tokens_of_a_rank, latency_tokens=128) -> str:
    """"latency" for steps in which no rank has more tokens than latency_tokens, else "throughput". Every rank gives the same maximum."""
    return _core.mode_for_step(max_tokens_of_a_rank, latency_tokens)


class Activations:
    """What a forward leaves for its backward: one per micro-batch that is under way; used again it keeps its memory."""

    def __init__(self):
        self._core = _core.MoeActivations()
        self._keep = None  # the options of the forward, whose tensors backward reads
        self._frame = None

    @property
    def routing(self) -> Routing:
        """Of the forward, on the CPU. Of one on a GPU: make it again of `logits`."""
        return Routing(*self._core.routing(self._frame.place))

    @property
    def logits(self):
        """[T,E] float32."""
        if self._frame.device == "cuda":
            return self._core.device_logits(self._frame.place).clone()
        ids, _, load = self._core.routing(self._frame.place)
        out = self._frame.empty((ids.shape[0], load.shape[0]), "float32")
        self._core.copy_logits(tensor(out, "logits"))
        return out


class _Options:
    """Of a step, and the tensors that they look at."""

    def __init__(self, group, mode, mask, given_ids, sliced_out, logits=None):
        self._views = [None if value is None else tensor(group._place(value, name), name) for name, value in (("mask", mask), ("given_ids", given_ids))]
        self._views.append(None if logits is None else writable(group._place(logits, "logits"), "logits"))
        self._rest = mode, self._views, sliced_out
        self.use_stream(group)

    def use_stream(self, group):
        """The current one: that of a backward may be another."""
        self.core = _core.MoeStepOptions(*self._rest, group._stream())


class MoeLayer:
    """One layer of a group. Collective: ranks make layers, and call them, in the same order. Where its group computes; on a GPU rows and
    the weights of experts are of one dtype.

    weights: MoeWeights, of NumPy arrays or torch tensors, float32, bfloat16 or float16 each; their values may change between steps.
    Experts also in fp8 with block scales, for forward alone: on a GPU (Hopper) rows are then of the group's dtype, bfloat16 or float16.
    gate: a Gate. activation: "silu", or "clamped" with limit and alpha, of experts and shared expert. placement: of the experts over
    the exchange's ranks, ep * mlp_tp or (expert_tp="gathered") ep; default: even windows. UsageError names the tensor that does not fit.
    """

    def __init__(self, group, weights, gate, *, activation="silu", limit=7.0, alpha=1.702, placement=None):
        self.group, self.weights, self.gate = group, weights, gate
        self._views = [None if array is None else self._view(array, name) for name, array in weights.items()]
        self._core = _core.MoeLayer(group._core, self._views, gate, (activation, limit, alpha), placement)

    def _view(self, array, name):
        array = self.group._place(array, name)
        is_fp8 = name in ("w13", "w2") and self.weights.w13_scale is not None and str(array.dtype).endswith("uint8")
        return tensor(array, name, "float8_e4m3" if is_fp8 else None)

    @staticmethod
    def from_checkpoint(group, checkpoint, layer, model, *, framework="numpy", dtype=None, keep_fp8=False, placement=None) -> "MoeLayer":
        """A layer of a weights.Checkpoint and its MoeModel: this rank reads what it holds. dtype, keep_fp8: as for MoeModel.load().
        placement: as for MoeLayer, over all ranks."""
        loaded = model.load(checkpoint, layer, group, framework=framework, dtype=dtype, keep_fp8=keep_fp8, placement=placement)
        return MoeLayer(group, group._moved(loaded), model.gate, activation=model.activation, limit=model.limit, alpha=model.alpha,
                        placement=placement)

    def forward(self, x, out=None, *, mode="throughput", mask=None, given_ids=None, sliced_out=False, saved=None, logits=None, dtype=None):
        """x [T,H] -> [T,H], of one dtype: the weighted sum over each token's experts, plus the shared expert's row.

        mode: "throughput" or "latency", the same on all ranks; see mode_for_step(). mask [T]: 0 for tokens that no expert sees.
        given_ids [T,K]: replay, with the weights that the gate gives them. out: where to, may be x unless `saved` is given. sliced_out:
        with same_tokens, out is this rank's slice of the tokens. saved: Activations, for backward. logits [T,E] float32: where those of
        the gate are left. dtype: what x means in NumPy.
        """
        x = self.group._place(x, "x")
        frame, options = self.group._frame(x), _Options(self.group, mode, mask, given_ids, sliced_out, logits)
        view = tensor(x, "x", dtype)
        if out is None:
            tokens = self._slice(x.shape[0]) if sliced_out else x.shape[0]
            out = frame.empty((tokens, *x.shape[1:]), view.dtype)
        if saved is not None:
            saved._keep, saved._frame = options, frame
        self._core.forward(view, writable(out, "out", dtype), options.core, None if saved is None else saved._core)
        return out

    __call__ = forward

    def _slice(self, tokens):
        return _core.slice_counts(tokens, self.group.config.mlp_tp)[self.group.tp_rank]

    def backward(self, x, d_out, saved, gradients=None, *, d_logits=None, dtype=None) -> tuple:
        """(gradient of x [T,H], gradients of the weights), given x and out's gradient. The choice of experts is a constant.

        gradients: MoeWeights, float32, to add to; default: new ones of all. Of weights that several ranks hold (gate, whole shared
        expert, replicas) it is the share of this rank's tokens: their sum over the ranks is the gradient. d_logits [T,E] float32: of
        losses on the logits, added to what comes through the weights.
        """
        place = self.group._place
        x = place(x, "x")
        view, frame = tensor(x, "x", dtype), self.group._frame(x)
        gradients = gradients or self.zero_gradients(frame)
        d_x = frame.empty(tuple(x.shape), view.dtype)
        rows = [view, tensor(place(d_out, "d_out"), "d_out", dtype), None if d_logits is None else tensor(place(d_logits, "d_logits"), "d_logits")]
        into = [None if array is None else writable(array, f"gradient of {name}") for name, array in gradients.items()]
        into[1] = into[1] if self.weights.logit_bias is not None else None
        saved._keep.use_stream(self.group)
        self._core.backward(rows, saved._keep.core, saved._core, tensor(d_x, "d_x", dtype), into)
        return d_x, gradients

    def zero_gradients(self, frame=None) -> MoeWeights:
        """Zeros, float32, for every weight that has a gradient."""
        frame = frame or self.group._frame(self.weights.gate_weight)
        found = {}
        for field in fields(MoeWeights):
            weight = getattr(self.weights, field.name)
            if weight is not None and field.name not in ("selection_bias", "w13_scale", "w2_scale"):
                found[field.name] = frame.empty(tuple(weight.shape), "float32")
                found[field.name][...] = 0
        return MoeWeights(**found)

    def warm_up(self, token_counts) -> None:
        """Collective: runs steps of these numbers of tokens per rank, in each mode that takes them, with balanced routing, so that memory
        and products of those sizes are there before the first request."""
        self._core.warm_up(list(token_counts))


class DenseLayer:
    """The feed-forward of a model's dense layers: whole weights on every rank, or cut over the dense_tp ranks of a group (collective then).

    w13 [1,2,I,H] (gate, up), w2 [1,H,I], w13_bias [1,2,I], w2_bias [1,H]; with dense_tp this rank's shard: weights.expert_shard(tensor,
    shape of one expert, Placement.tensor_parallel(1, 1, dense_tp), group.dense_rank). gate [1,H]: rows are multiplied by
    sigmoid(<x, gate>). group: None without dense_tp, on the CPU; else arrays are where it computes.
    """

    def __init__(self, group, w13, w2, *, w13_bias=None, w2_bias=None, gate=None, activation="silu", limit=7.0, alpha=1.702):
        names = ("w13", "w2", "w13_bias", "w2_bias", "gate")
        self._place = on_cpu if group is None else group._place
        self._frame = Frame.of if group is None else group._frame
        self._stream = (lambda: 0) if group is None else group._stream
        self.weights = {name: None if array is None else self._place(array, name) for name, array in zip(names, (w13, w2, w13_bias, w2_bias, gate))}
        self._views = [None if array is None else tensor(array, name) for name, array in self.weights.items()]
        self._core = _core.DenseLayer(None if group is None else group._core, self._views, (activation, limit, alpha))

    def forward(self, x, out=None, *, saved=None, dtype=None):
        """x [T,H] -> [T,H], of one dtype. saved: what new_activations() gives, for backward."""
        x = self._place(x, "x")
        view = tensor(x, "x", dtype)
        out = self._frame(x).empty(tuple(x.shape), view.dtype) if out is None else out
        self._core.forward(view, writable(out, "out", dtype), saved, self._stream())
        return out

    __call__ = forward

    @staticmethod
    def new_activations():
        """What a forward leaves for its backward."""
        return _core.DenseActivations()

    def backward(self, x, d_out, saved, *, dtype=None) -> tuple:
        """(gradient of x [T,H], {name: gradient of a weight, float32}): of a whole weight the share of this rank's tokens."""
        x = self._place(x, "x")
        view, frame = tensor(x, "x", dtype), self._frame(x)
        gradients = {name: None if array is None else frame.empty(tuple(array.shape), "float32") for name, array in self.weights.items()}
        for gradient in gradients.values():
            if gradient is not None:
                gradient[...] = 0
        d_x = frame.empty(tuple(x.shape), view.dtype)
        into = [None if gradient is None else tensor(gradient, f"gradient of {name}") for name, gradient in gradients.items()]
        self._core.backward([view, tensor(self._place(d_out, "d_out"), "d_out", dtype)], saved, tensor(d_x, "d_x", dtype), into, self._stream())
        return d_x, {name: gradient for name, gradient in gradients.items() if gradient is not None}
