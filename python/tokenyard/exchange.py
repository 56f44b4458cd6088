"""The exchange: dispatch sends rows to the ranks of their experts, combine brings sums back."""
import contextlib
import numbers

from . import _core
from .arrays import Frame, TorchMemory, as_array, check_dtype, current_stream, is_torch, opaque, shown_as, tensor, torch_if_used, writable
from .errors import Error, UsageError
from .received import Pending, Received
from .world import World


# The words and numbers of a dispatch, which its options are made of once, with their defaults.
_WORDS = {"layout": "token_major", "sizing": None, "mode": None, "gather_map": False, "alignment": 1, "zero_padding": False,
          "expert_capacity": 0, "drop": False, "copy_out": False, "token_base": 0, "quantise": None}
_COPY_OUT, _QUANTISE = (list(_WORDS).index(name) for name in ("copy_out", "quantise"))


def _set(options, name, value):
    """options.name = value, whose type may be wrong."""
    try:
        setattr(options, name, value)
    except TypeError:
        current = getattr(options, name)
        raise UsageError(f"{name} = {value!r} is a {type(value).__name__}; expected something like {current!r}") from None


def _options(fields):
    options = _core.ExchangeOptions()
    for name, value in fields.items():
        if not hasattr(options, name):
            raise UsageError(f"an exchange has no option {name!r}; expected one of {', '.join(n for n in dir(options) if n[0] != '_')}")
        _set(options, name, value)
    return options


def _shape_options(placements, hidden_size, dtype, combine_dtype, options):
    """Options in bytes and counts, from hidden_size, dtypes and placements."""
    check_dtype(dtype, "dtype")
    element = max(_core.size_of(dtype), _core.size_of(check_dtype(combine_dtype or dtype, "combine_dtype")))
    if not isinstance(hidden_size, numbers.Integral):
        raise UsageError(f"hidden_size = {hidden_size!r} is a {type(hidden_size).__name__}; expected an integer")
    options.setdefault("max_row_bytes", hidden_size * element)
    options.setdefault("max_local_experts", max((p.max_local_experts for p in placements), default=1))
    options.setdefault("max_fanout", max((p.max_fanout for p in placements), default=1))
    return options


def plan_memory(ranks, placement=None, *, hidden_size, top_k, max_tokens_per_rank, dtype="bfloat16", combine_dtype=None, **options):
    """What an exchange with these arguments allocates on each of `ranks` ranks: a list of MemoryItem, without allocating."""
    options.update(top_k=top_k, max_tokens_per_rank=max_tokens_per_rank)
    return _core.memory_plan(_options(_shape_options(_as_list(placement), hidden_size, dtype, combine_dtype, options)), ranks)


def _scales_dtype(quantise):
    return torch_if_used().int32 if quantise == "ue8m0" else torch_if_used().float32


def _more_of_combine(source_weights, row_weights, bias, dtype):
    """[(name, array, dtype)] of what most calls do not give."""
    more = []
    if source_weights is not None:
        more.append(("source_weights", source_weights, None))
    if row_weights is not None:
        more.append(("row_weights", row_weights, None))
    if bias is not None:
        biases = bias if isinstance(bias, (tuple, list)) else (bias,)
        if len(biases) > 2:
            raise UsageError(f"{len(biases)} biases; combine adds at most two")
        more += [(f"bias{i}", one, dtype) for i, one in enumerate(biases)]
    return more


def _as_list(placement):
    placements = list(placement) if isinstance(placement, (list, tuple)) else [] if placement is None else [placement]
    for one in placements:
        if not isinstance(one, _core.Placement):
            raise UsageError(f"placement = {one!r} is a {type(one).__name__}; expected a Placement, or a list of them")
    return placements


def _handle(handle):
    if not isinstance(handle, _core.Handle):
        raise UsageError(f"handle is a {type(handle).__name__}; expected the .handle of what a dispatch returned")
    return handle


class Exchange:
    """Owns buffers, epochs and links for a maximum shape; one serves all layers of a model.

    Collective: all ranks make it with the same arguments (TransportError "mismatch" otherwise). Calls on one exchange are made one
    after the other, in the same order by all ranks. UsageError: this call was rejected, the peers' same call fails with the reason,
    and the next call is fine. TransportError: sticky until clear(), or recover() after ranks were lost. Ctrl-C ends a wait with
    KeyboardInterrupt; for the exchange and the peers that is a failure like the others.

    placement: the default one, or a list whose first is the default; add() registers more. dtype: the widest element of rows;
    combine_dtype: of what experts return, when it is wider. mode: the default of dispatch, "throughput" or "latency".
    Further options are those of the C++ ExchangeOptions: max_scale_bytes, max_local_experts, max_fanout, receive_rows,
    max_expert_rows, depth, expert_rows, unfolded, reduction_groups, transport, device_index, nccl_communicator (an ncclComm_t, as a
    number), sm_budget, num_threads, validate, trace.

    Letters in shapes: T tokens of this rank, H hidden size, K top_k. Arrays are NumPy's or torch's, results come in the framework
    of the input; bfloat16 and fp8 are uint16 and uint8 in NumPy. With device="cuda" work is ordered on torch's current stream.
    """

    def __init__(self, world, placement=None, *, hidden_size, top_k, max_tokens_per_rank, dtype="bfloat16", combine_dtype=None,
                 device="cpu", mode="throughput", timeout_ms=0, **options):
        placements = _as_list(placement)
        options.update(top_k=top_k, max_tokens_per_rank=max_tokens_per_rank, device=device, mode=mode, timeout_ms=timeout_ms)
        if not isinstance(world, World):
            raise UsageError(f"world is a {type(world).__name__}; expected a World: World.from_group(group) makes one of a torch process group")
        self._core = _core.Exchange(world._core, _options(_shape_options(placements, hidden_size, dtype, combine_dtype, options)))
        self.hidden_size, self.top_k, self.dtype, self.device = hidden_size, top_k, dtype, device
        self._world = world
        self._in_flight = []  # started calls whose inputs may still be read
        self._on_gpu = device == "cuda"
        self._index = self._core.options().device_index  # the GPU
        self._mode = mode
        self._numbers = {}
        self._known_options = {}  # made once for every combination of words and numbers that is used
        self._frames = {}
        for one in placements:
            self.add(one)

    def add(self, placement) -> int:
        """Collective: registers a placement (agreed by hash) and returns its number."""
        number = self._core.add(placement)
        self._numbers.setdefault(placement.hash, number)
        return number

    def _number_of(self, placement):
        if isinstance(placement, int):
            return placement
        if not isinstance(placement, _core.Placement):
            raise UsageError(f"placement = {placement!r}; expected a Placement, or the number that add() gave it")
        if placement.hash not in self._numbers:
            raise UsageError(f"{placement!r} is not registered with this exchange; call add(placement) on all ranks first")
        return self._numbers[placement.hash]

    def _check_place(self, array):
        if self.device == "cpu":
            if is_torch(array) and not array.is_cpu:
                raise UsageError(f"a tensor on {array.device} for an exchange with device='cpu'; move it, or make the exchange with device='cuda'")
        elif not is_torch(array) or not array.is_cuda:
            raise UsageError("an exchange with device='cuda' takes torch tensors on its GPU")

    def _placed(self, value, what):
        """As as_array(), where this exchange is."""
        if is_torch(value) and (value.is_cuda if self._on_gpu else value.is_cpu):
            return value  # as most are
        self._check_place(array := as_array(value, what))
        return array

    def _added_to(self, waits):
        self._check_place(waits)
        return writable(waits, "waits")

    def _frame(self, array):
        frame = self._frames.get(type(array))
        if frame is None:
            frame = self._frames[type(array)] = Frame.of(array, self.device, max(self._index, 0))
        return frame

    def _stream(self):
        return current_stream(self._index) if self._on_gpu else 0

    def _use_stream(self, options):
        if self._on_gpu:
            options.stream = current_stream(self._index)

    def _is_capturing(self):
        return self._on_gpu and torch_if_used().cuda.is_current_stream_capturing()

    def _dispatch_call(self, x, topk_ids, topk_weights, words, handle, scales, placement, out_rows, out_scales, waits, dtype):
        """(what must stay alive, arguments of the core, how its result is shown); words: values for _WORDS."""
        if topk_ids is None and handle is None:
            raise UsageError("dispatch without topk_ids; give them, or the handle of an earlier dispatch whose routing is to be used again")
        if handle is not None:
            _handle(handle)
        x = self._placed(x, "x")
        frame = self._frame(x)
        rows = opaque(x, "x", dtype)
        ids = None if topk_ids is None else tensor(self._placed(topk_ids, "topk_ids"), "topk_ids")
        weights = None if topk_weights is None else tensor(self._placed(topk_weights, "topk_weights"), "topk_weights")
        rows_scales = scales_dtype = None
        if scales is not None:
            scales = self._placed(scales, "scales")
            rows_scales, scales_dtype = opaque(scales, "scales"), scales.dtype
        copy_out, quantise = words[_COPY_OUT], words[_QUANTISE]
        rows_dtype = frame.float8 if quantise else x.dtype
        rows_out = None if out_rows is None else writable(out_rows, "out_rows")
        scales_out = None if out_scales is None else writable(out_scales, "out_scales")
        added = None if waits is None else self._added_to(waits)
        memory = None
        if copy_out and out_rows is None and self._on_gpu:
            memory = TorchMemory(self._index)
            if quantise:
                scales_dtype = _scales_dtype(quantise)
        arguments = (rows, rows_scales, ids, weights), self._dispatch_options(words, placement), handle, (memory, rows_out, scales_out, added)
        return arguments, arguments, lambda core: Received(core, frame, rows_dtype, scales_dtype, memory)

    def _dispatch_options(self, words, placement):
        try:
            options = self._known_options.get(words)
        except TypeError:  # a list, say: no option is one
            words, options = tuple(words), self._new_dispatch_options(words)
        if options is None:
            options = self._known_options[words] = self._new_dispatch_options(words)
        options.placement = None if placement is None else self._number_of(placement)
        self._use_stream(options)
        return options

    def _new_dispatch_options(self, words):
        options, given = _core.DispatchOptions(), dict(zip(_WORDS, words))
        _set(options, "sizing", given["sizing"] or ("capacity" if (given["mode"] or self._mode) == "latency" else "exact"))
        for name, value in given.items():
            if value is not None:
                _set(options, name, value)
        return options

    def dispatch(self, x, topk_ids=None, topk_weights=None, *, handle=None, scales=None, placement=None, layout="token_major", sizing=None,
                 mode=None, gather_map=False, alignment=1, zero_padding=False, expert_capacity=0, drop=False, copy_out=False, out_rows=None,
                 out_scales=None, token_base=0, quantise=None, waits=None, dtype=None) -> Received:
        """Sends every row of x to the ranks of its experts. Collective.

        x [T,H], any element type, rows of a multiple of 16 bytes; topk_ids [T,K] int64 or int32, negative: no expert; topk_weights
        [T,K] float32 travel along (absent: 1); scales [T,S] travel along. With `handle` of an earlier dispatch instead of topk_ids,
        x [T,H] follows that one's routing (cached dispatch).
        layout: token_major, expert_major, expert_padded, rank_slots (latency mode). sizing: "exact" waits for the number of rows,
        "capacity" does not and shapes results for receive_rows; default: exact in throughput mode. gather_map: token_major, also
        expert_rows and expert_offsets. alignment: expert_major, groups start at multiples. expert_capacity, drop: limits per expert.
        copy_out: rows in memory of their own (or in out_rows, out_scales; on cuda of torch's allocator) instead of a lease. token_base shifts the choice of
        replicas. quantise: "float32", "float32_pow2" or "ue8m0" scales, rows become fp8. waits [R] int64: the nanoseconds that this rank
        has to wait for each rank are added, also by every replay of a graph; not over MPI. dtype: what x means where the array cannot say.
        """
        words = layout, sizing, mode, gather_map, alignment, zero_padding, expert_capacity, drop, copy_out, token_base, quantise  # as _WORDS
        _keep, arguments, shown = self._told(self._dispatch_call, x, topk_ids, topk_weights, words, handle, scales, placement, out_rows, out_scales, waits, dtype)
        return shown(self._core.dispatch(*arguments))

    def start_dispatch(self, x, topk_ids=None, topk_weights=None, *, handle=None, scales=None, placement=None, out_rows=None, out_scales=None,
                       waits=None, dtype=None, **options) -> Pending:
        """The first half of dispatch, with its arguments: never waits. x and the others stay untouched until finish()."""
        for name in options.keys() - _WORDS.keys():
            raise TypeError(f"dispatch has no argument {name!r}")
        words = tuple({**_WORDS, **options}.values())
        keep, arguments, shown = self._told(self._dispatch_call, x, topk_ids, topk_weights, words, handle, scales, placement, out_rows, out_scales, waits, dtype)
        return self._start(self._core.start_dispatch, keep, arguments, shown)

    def _told(self, prepare, *arguments, **options):
        """What a call is made of. When that is refused here the others, who wait in the same call, learn why; the C++ side tells what it refuses."""
        try:
            return prepare(*arguments, **options)
        except UsageError as error:
            with contextlib.suppress(Error):  # of an earlier call, which they know of
                if not self._is_capturing():
                    self.abandon(str(error))
            raise

    def _start(self, call, keep, arguments, shown):
        pending = Pending(call(*arguments), (self, keep), shown)
        capturing = self._is_capturing()  # then nobody may ask an event, and what was finished is enough to know
        self._in_flight = [other for other in self._in_flight if not (other.is_finished() if capturing else other.is_over())] + [pending]
        return pending

    def _combine_call(self, rows, handle, weighting="none", order="rank_ascending", fold=True, source_weights=None, row_weights=None,
                      bias=None, out=None, waits=None, dtype=None):
        _handle(handle)
        rows = self._placed(rows, "rows")
        frame = self._frame(rows)
        keep = [y := tensor(rows, "rows", dtype)]
        more = _more_of_combine(source_weights, row_weights, bias, dtype)
        options = self._combine_options(weighting, order, fold, known=not more and waits is None)
        for name, value, kind in more:
            keep.append(view := tensor(self._placed(value, name), name, kind))
            setattr(options, name, view)
        if waits is not None:
            keep.append(view := self._added_to(waits))
            options.waits = view
        target = None
        if out is not None:
            keep.append(target := writable(self._placed(out, "out"), "out"))
        elif self._on_gpu:
            out = rows.new_empty((handle.num_tokens, rows.shape[-1]))
            keep.append(target := tensor(out, "out", dtype))
        self._use_stream(options)

        def shown(core):
            sums = out if out is not None else shown_as(core.out(frame.place), rows.dtype)
            return sums if row_weights is None else (sums, core.combined_weights(frame.place))

        return keep, (y, handle, options, target), shown

    def _combine_options(self, weighting, order, fold, known):
        """known: nothing else is set, so that one made before will do."""
        try:
            options = self._known_options.get(key := (weighting, order, fold)) if known else None
        except TypeError:  # a list, say: no option is one
            known, options = False, None
        if options is None:
            options = _core.CombineOptions()
            for name, value in (("weighting", weighting), ("order", order), ("fold", fold)):
                _set(options, name, value)
            if known:
                self._known_options[key] = options
        return options

    def combine(self, rows, handle, *, weighting="none", order="rank_ascending", fold=True, source_weights=None, row_weights=None, bias=None,
                out=None, waits=None, dtype=None):
        """Sums what the experts made of every token: [T,H]. Collective.

        rows: in the shape of the dispatch's rows, float64 (cpu), float32, bfloat16 or float16. weighting: "none", "at_input" (rows were
        weighted before the expert), "at_expert" (by the weights that travelled) or "at_source" (by source_weights [T,K] float32, given
        now); the last two for the expert layouts. order of the ranks' partial sums: "rank_ascending" or "topk". fold=False: every
        (token, k) row travels on its own. bias: one or two [T,H] in the dtype of rows, added first. out [T,H]: where sums go, and their
        dtype. row_weights float32, in the shape of Received.row_weights: the result is then (sums, combined weights [T,K]). waits: as for
        dispatch.
        Sums are taken in float32 in a defined order: the same bits on every backend.
        """
        _keep, arguments, shown = self._told(self._combine_call, rows, handle, weighting, order, fold, source_weights, row_weights, bias, out, waits, dtype)
        return shown(self._core.combine(*arguments))

    def start_combine(self, rows, handle, **options) -> Pending:
        """The first half of combine, with its arguments: never waits. rows and the others stay untouched until finish()."""
        keep, arguments, shown = self._told(self._combine_call, rows, handle, **options)
        return self._start(self._core.start_combine, keep, arguments, shown)

    def dispatch_backward(self, handle, grad_rows, grad_row_weights=None, *, dtype=None) -> tuple:
        """(gradient of x [T,H], gradient of topk_weights [T,K] float32 or None), from those of rows and row_weights. Collective."""
        grad_rows = self._placed(grad_rows, "grad_rows")
        frame = self._frame(grad_rows)
        weights = None if grad_row_weights is None else tensor(as_array(grad_row_weights, "grad_row_weights"), "grad_row_weights")
        gradient = self._core.dispatch_backward(_handle(handle), tensor(grad_rows, "grad_rows", dtype), weights)
        return shown_as(gradient.rows(frame.place), grad_rows.dtype), gradient.topk_weights(frame.place)

    def combine_backward(self, handle, grad_out, rows=None, *, weighting="none", source_weights=None, dtype=None) -> tuple:
        """(Received with the gradient of rows in the layout of the dispatch, gradient of the weights [T,K] float32 or None), from that
        of the sums; rows as they were combined, for at_expert and at_source. Collective."""
        grad_out = self._placed(grad_out, "grad_out")
        frame = self._frame(grad_out)
        _, (view, _, options, _), _ = self._combine_call(grad_out, handle, weighting=weighting, source_weights=source_weights, dtype=dtype)
        saved = None if rows is None else tensor(as_array(rows, "rows"), "rows", dtype)
        gradient = self._core.combine_backward(handle, view, saved, options)
        return Received(gradient.rows, frame, grad_out.dtype), gradient.topk_weights(frame.place)

    def expert_rows(self, handle, like, dtype=None):
        """Memory [N,H] (or [R,M,H]) for rows from which combine needs no copy, in the framework of the array `like`; dtype: default
        that of the exchange. UsageError without the option expert_rows=True."""
        frame = self._frame(self._placed(like, "like"))
        return self._core.expert_rows(_handle(handle), dtype or self.dtype, self.hidden_size, frame.place, self._stream())

    def abandon(self, reason) -> None:
        """Instead of this rank's next dispatch or combine, which it cannot make: that of the others fails with the reason, and the one after is fine."""
        self._core.abandon(reason)

    def check(self) -> None:
        """Raises the sticky error, if any."""
        self._core.check()

    def status(self):
        """failure (text of the sticky error, or None), invalid_ids, lost_ids."""
        return self._core.status()

    def clear(self) -> None:
        """Collective: ends an error on all ranks, none of which may be lost."""
        self._core.clear()

    def recover(self) -> list[int]:
        """Collective over the ranks that are left after some were lost: go on as a smaller world (see .world), with what is left of
        every placement. Returns the former rank of each rank. Earlier handles are refused; leases stay valid."""
        former = self._core.recover()
        self._world = World(self._core.world(), parent=self._world)
        return former

    @property
    def world(self) -> World:
        """The world of this exchange; after recover() the smaller one."""
        return self._world

    @property
    def options(self):
        """The C++ options, with defaults filled in."""
        return self._core.options()

    @property
    def transport(self) -> str:
        """What moves rows: "inproc", "shm", "mpi", "cuda_peer" or "nccl_window"."""
        return self._core.transport()

    def link_bytes(self) -> list[int]:
        """Bytes of rows and scales sent to each rank so far."""
        return self._core.link_bytes()

    def peer_waits(self) -> tuple[list[int], list[int]]:
        """Nanoseconds that this rank has waited for each rank so far, in dispatch and in combine. Empty over MPI, and on cuda: there waits= of a call tells."""
        return self._core.peer_waits()

    def take_spans(self) -> list:
        """PhaseSpans since the last call; empty without the option trace=True."""
        return self._core.take_spans()

    def __del__(self):
        self._core = None  # ends what is in flight, so that nobody reads its inputs any more
