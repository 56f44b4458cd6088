"""What experts compute: grouped matrix products and the gated feed-forward, on rows in any layout of a dispatch."""
import numpy

from . import _core
from .arrays import Frame, as_array, frame_of, is_torch, on_cpu, tensor, torch_if_used
from .errors import UsageError


def on_device(array):
    """Whether it is a torch tensor on a GPU."""
    return is_torch(array) and array.device.type == "cuda"


class RowGroups:
    """Which rows each local expert computes. Expert g has places begins[g] .. begins[g] + counts[g] - 1; the others are padding, never
    read. Place p is row rows()[p] where rows are gathered (token_major, rank_slots), else row p.

    Made of CUDA tensors its numbers stay on the device, nobody waits for them, and counts and begins are tensors.
    """

    def __init__(self, core, local_ids=None, tables=None):
        self._core = core  # on the host; None where only the device knows
        self._tables = tables or {}  # by device
        self.local_ids = local_ids  # of gathered rows: what unpermute() folds by

    @staticmethod
    def of(received, num_local_experts) -> "RowGroups":
        """Of a Received, in its layout; on CUDA token_major needs a gather map."""
        core, frame = received._lease(), received._frame
        is_gathered = received.handle.layout in ("token_major", "rank_slots")
        if frame.device == "cpu":
            return RowGroups(_core.RowGroups.of(core, num_local_experts), core.local_ids(frame.place) if is_gathered else None)
        if not is_gathered:
            capacity = received.rows.shape[1] if received.handle.layout == "expert_padded" else 0
            return RowGroups._on_device(received.expert_counts, received.expert_offsets, capacity, likely=_core.likely_places(core))
        if received.handle.layout == "rank_slots" or received.expert_rows is None:
            raise UsageError("these rows have no map from experts to rows; dispatch token_major with gather_map=True, or use RowGroups.gathered(local_ids)")
        return RowGroups._on_device(received.expert_counts, received.expert_offsets, 0, received.expert_rows, received.local_ids,
                                    _core.likely_places(core))

    @staticmethod
    def of_counts(counts) -> "RowGroups":
        """Groups of so many rows, one behind the other."""
        counts = numpy.asarray(counts, numpy.int64).reshape(-1)
        return RowGroups.of_offsets(counts, numpy.concatenate([[0], numpy.cumsum(counts)]))

    @staticmethod
    def of_offsets(counts, offsets) -> "RowGroups":
        """expert_major: counts [L], offsets [L+1], int32 or int64."""
        if on_device(counts):
            return RowGroups._on_device(counts, offsets)
        return RowGroups(_core.RowGroups.of_offsets(tensor(on_cpu(counts, "counts"), "counts"), tensor(on_cpu(offsets, "offsets"), "offsets")))

    @staticmethod
    def padded(counts, capacity) -> "RowGroups":
        """expert_padded: counts [L], rows [L,capacity,..]."""
        if on_device(counts):
            return RowGroups._on_device(counts, None, capacity)
        return RowGroups(_core.RowGroups.padded(tensor(on_cpu(counts, "counts"), "counts"), capacity))

    @staticmethod
    def gathered(local_ids, num_local_experts) -> "RowGroups":
        """token_major, rank_slots: local_ids [..,K], negative for none; by local expert, then (row, k)."""
        if on_device(local_ids):
            torch = torch_if_used()
            ids = local_ids.reshape(-1).long()
            ids = torch.where(ids < 0, num_local_experts, ids)
            counts = torch.zeros(num_local_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))[:-1]
            rows = torch.argsort(ids, stable=True) // local_ids.shape[-1]
            return RowGroups._on_device(counts, counts.cumsum(0) - counts, 0, rows, local_ids.int())
        local_ids = on_cpu(local_ids, "local_ids")
        return RowGroups(_core.RowGroups.gathered(tensor(local_ids, "local_ids"), num_local_experts), local_ids)

    @staticmethod
    def _on_device(counts, begins, capacity=0, rows=None, local_ids=None, likely=0):
        table = {"counts": counts.int().clone(), "begins": None if begins is None else begins.int().clone(), "capacity": capacity,
                 "rows": None if rows is None else rows.int().clone(), "likely": likely}
        return RowGroups(None, local_ids, {counts.device: table})

    def _host(self):
        if self._core is None:
            raise UsageError("the numbers of these groups are on a GPU; make RowGroups of CPU tensors for what the CPU computes or is to know")
        return self._core

    def table(self, x):
        """{counts, begins, capacity, rows} on the GPU of x, and likely: how many places are probably taken, 0 for all."""
        if x.device not in self._tables:
            torch, core = torch_if_used(), self._host()

            def there(numbers):
                return torch.tensor(numbers, dtype=torch.int32, device=x.device)

            self._tables[x.device] = {"counts": there(core.counts), "begins": there(core.begins), "capacity": 0,
                                      "rows": there(self.rows()) if self.is_gathered else None, "likely": 0}
        return self._tables[x.device]

    def places_of(self, x):
        """How many places there are (at most, on a GPU): those of rows x [N,..]."""
        if self._core is not None:
            return self._core.places
        rows = next(iter(self._tables.values()))["rows"]
        return x.shape[0] if rows is None else rows.numel()

    def device_core(self, x, places):
        """(the C++ groups for a GPU, what they look at)."""
        table = self.table(x)
        views = [None if table[name] is None else tensor(table[name], name) for name in ("counts", "begins", "rows")]
        groups = _core.DeviceRowGroups(places, views[0], views[1], table["capacity"], views[2])
        groups.likely = table["likely"]
        return groups, (table, views)

    def _number(self, name):
        return getattr(self._core, name) if self._core is not None else next(iter(self._tables.values()))[name]

    places = property(lambda self: self._host().places, doc="How many places there are, padding included.")
    begins = property(lambda self: self._number("begins"), doc="[L]: where each expert's places begin.")
    counts = property(lambda self: self._number("counts"), doc="[L]: how many places each expert has.")
    is_gathered = property(lambda self: self.local_ids is not None, doc="Whether places are rows in another order.")

    def rows(self, framework="numpy"):
        """[places] int64 of gathered rows: the row of each place."""
        return self._host().rows(frame_of(framework).place)

    def has_padding(self) -> bool:
        """Whether some places belong to no expert; True where only the device knows."""
        return self._core is None or self.places != sum(self.counts)


class Cpu:
    """The functions of experts.h, as Gpu has them."""

    def __init__(self, groups, x):
        self._groups = groups._host()

    def product(self, x, w, bias, y):
        _core.grouped_gemm(x, self._groups, w, bias, y)

    def dgrad(self, dy, w, dx):
        _core.grouped_gemm_dgrad(dy, self._groups, w, dx)

    def wgrad(self, dy, x, dw):
        _core.grouped_gemm_wgrad(dy, x, self._groups, dw)

    def unpermute(self, places, local_ids, row_weights, out):
        _core.unpermute(places, local_ids, row_weights, self._groups, out)

    def forward(self, what, x, y, saves, x_scales=None):
        if x_scales is not None:
            raise UsageError("x_scales of rows on the CPU; experts take float8 rows on GPUs alone: widen them with dequantise()")
        saved = _core.ExpertActivations() if saves else None
        what.core.forward(x, self._groups, y, saved)
        return saved

    def backward(self, what, x, saved, dy, dx, gradients):
        what.core.backward(x, dy, saved, self._groups, dx, gradients)


class Gpu:
    """The functions of device_experts.h, on torch's current stream."""

    _experts = {}  # by (device, stream): the calls of one run in order

    def __init__(self, groups, x):
        torch = torch_if_used()
        self._x, self._stream = x, torch.cuda.current_stream(x.device).cuda_stream
        self._places = groups.places_of(x)
        self._groups, self._keep = groups.device_core(x, self._places)
        key = x.device.index, self._stream
        if key not in Gpu._experts:
            Gpu._experts[key] = _core.DeviceExperts(x.device.index)
        self._core = Gpu._experts[key]

    def clear_padding(self, rows):
        self._core.clear_padding(self._groups, rows, self._stream)

    def product(self, x, w, bias, y):
        self._core.grouped_gemm([x, w, bias], self._groups, y, self._stream)

    def scaled_product(self, x, w, bias, y):
        """x and w: (values, scales)."""
        self._core.grouped_gemm_scaled([*x, *w, bias], self._groups, y, self._stream)

    def dgrad(self, dy, w, dx):
        self._core.grouped_gemm_dgrad([dy, w], self._groups, dx, self._stream)

    def wgrad(self, dy, x, dw):
        self._core.grouped_gemm_wgrad([dy, x], self._groups, dw, self._stream)

    def unpermute(self, places, local_ids, row_weights, out):
        self._core.unpermute([places, local_ids, row_weights], self._groups, out, self._stream)

    def forward(self, what, x, y, saves, x_scales=None):
        gate_up = None
        if saves:
            gate_up = torch_if_used().empty((self._places, 2 * what.arrays[0].shape[2]), dtype=self._x.dtype, device=self._x.device)
        self._core.forward(what.core, [x, y, None if gate_up is None else tensor(gate_up, "gate_up"), x_scales], self._groups, self._stream)
        return gate_up

    def backward(self, what, x, saved, dy, dx, gradients):
        self._core.backward(what.core, [x, tensor(saved, "gate_up"), dy, dx], self._groups, gradients, self._stream)


def backend(groups, x):
    """What computes where x is."""
    return (Gpu if on_device(x) else Cpu)(groups, x)


def by_place(compute, like, groups, columns, dtype=None, of=None):
    """Memory [places, columns] where `like` [N,..] is; padding is zero. compute: the backend; of: the type on a GPU, unless that of `like`."""
    shape = (groups.places_of(like), columns)
    if on_device(like):
        out = like.new_empty(shape, dtype=of)
        if groups.has_padding():
            compute.clear_padding(tensor(out, "y"))
        return out
    out = Frame.of(like).empty(shape, dtype or tensor(like, "x").dtype)
    if groups.has_padding():
        out[...] = 0
    return out


def _beside(array, what, x):
    """The array, which has to be where x is."""
    if on_device(x):
        if not on_device(array) or array.device != x.device:
            raise UsageError(f"{what} is {'on ' + str(array.device) if is_torch(array) else 'a ' + type(array).__name__}, and x on {x.device}; move it there")
        return array
    return on_cpu(array, what)


def _flat(x, what):
    """[N,K], also of the [L,C,K] and [R,M,K] that some layouts have."""
    x = as_array(x, what)
    x = x if on_device(x) else on_cpu(x, what)
    if len(x.shape) not in (2, 3):
        raise UsageError(f"{what} has the shape {list(x.shape)}; expected [N,K], or [L,C,K] of expert_padded")
    return x.reshape(-1, x.shape[-1])


def _wants_gradients(*arrays):
    torch = torch_if_used()
    return torch is not None and torch.is_grad_enabled() and any(is_torch(array) and array.requires_grad for array in arrays)


def product(x, groups, w, bias, dtype=None):
    """grouped_gemm() without gradients."""
    x = _flat(x, "x")
    w, bias = _beside(w, "w", x), None if bias is None else _beside(bias, "bias", x)
    if len(w.shape) != 3:
        raise UsageError(f"w has the shape {list(w.shape)}; expected [L,M,K]")
    compute = backend(groups, x)
    y = by_place(compute, x, groups, w.shape[1], dtype)
    compute.product(tensor(x, "x", dtype), tensor(w, "w", dtype), None if bias is None else tensor(bias, "bias", dtype), tensor(y, "y", dtype))
    return y


def _of_float8(x, dtype):
    """The type of what is made of float8 weights on a GPU: that of 16-bit rows, else as asked, or bfloat16. None on the CPU: as ever."""
    if not on_device(x):
        return None
    torch = torch_if_used()
    if x.dtype in (torch.bfloat16, torch.float16):
        return x.dtype
    if dtype not in (None, "bfloat16", "float16"):
        raise UsageError(f"dtype = {dtype!r}; what is made of float8 is bfloat16 or float16")
    return getattr(torch, dtype or "bfloat16")


def _scales(array, what, x):
    return None if array is None else tensor(_beside(array, what, x), what)


def _scaled_product(x, groups, w, bias, scales, dtype):
    """grouped_gemm() of float8; scales: of x and of w."""
    if any(array is None for array in scales):
        raise UsageError(f"{'x' if scales[0] is None else 'w'}_scales are absent; a product of float8 numbers has scales of x and of w: give both, or none")
    if _wants_gradients(bias):
        raise UsageError("float8 products go forward alone, and bias requires gradients; detach it, or use torch.no_grad()")
    x = _flat(x, "x")
    if not on_device(x):
        raise UsageError("x is on the CPU; products of float8 are for CUDA tensors: widen rows and weights with dequantise()")
    w, bias = _beside(w, "w", x), None if bias is None else tensor(_beside(bias, "bias", x), "bias")
    compute = backend(groups, x)
    y = by_place(compute, x, groups, w.shape[1], of=_of_float8(x, dtype))
    values = [tensor(array, what, "float8_e4m3") for array, what in ((x, "x"), (w, "w"))]
    compute.scaled_product((values[0], _scales(scales[0], "x_scales", x)), (values[1], _scales(scales[1], "w_scales", x)), bias, tensor(y, "y"))
    return y


def grouped_gemm(x, groups, w, bias=None, *, x_scales=None, w_scales=None, dtype=None):
    """y[p] = x[row of p] w[g]^T + bias[g] for the places p of every expert g: [P,M]; 0 in padding.

    x [N,K] (or [L,C,K]), w [L,M,K], bias [L,M], all float32, bfloat16 or float16; dtype where the arrays cannot say. Products and sums
    are float32, each result is rounded once. Torch tensors that require gradients get them: of x through a product with w, of w and
    bias in float32, rounded once. On the CPU, or, for CUDA tensors, on torch's current stream. UsageError names what does not fit.

    With scales, x and w are float8_e4m3 CUDA tensors (Hopper): x_scales [N, ceil(K/128)] as dispatch delivers them, w_scales
    [L, ceil(M/128), ceil(K/128)], float32. The result is bfloat16, or dtype = "float16", as the bias; without gradients.
    """
    if x_scales is not None or w_scales is not None:
        return _scaled_product(as_array(x, "x"), groups, w, bias, (x_scales, w_scales), dtype)
    if _wants_gradients(x, w, bias):
        from .torch.experts import grouped_gemm as with_gradients

        return with_gradients(x, groups, w, bias)
    return product(as_array(x, "x"), groups, w, bias, dtype)


class FeedForward:
    """Weights and activation of the gated feed-forward, checked and as views that keep them alive; all where x is."""

    def __init__(self, x, weights, activation, dtype=None, scales=(None, None)):
        """weights: w13, w2, and their biases or None. scales: of float8 weights."""
        self._dtype, self._is_float8 = dtype, any(array is not None for array in scales)
        names = ("w13", "w2", "w13_bias", "w2_bias")
        types = ("float8_e4m3",) * 2 if self._is_float8 else (dtype,) * 2
        self.arrays = [None if a is None else _beside(a, name, x) for name, a in zip(names, weights)]
        self._views = [None if a is None else tensor(a, name, of) for name, a, of in zip(names, self.arrays, (*types, dtype, dtype))]
        self._views += [_scales(a, f"{name}_scale", x) for name, a in zip(names, scales)]
        self.core = _core.FeedForward(self._views, activation)

    def forward(self, x, groups, saves=False, x_scales=None):
        """(y, what backward needs)."""
        x = _flat(x, "x")
        compute = backend(groups, x)
        if not self._is_float8:
            y = by_place(compute, x, groups, x.shape[1], self._dtype)
            return y, compute.forward(self, tensor(x, "x", self._dtype), tensor(y, "y", self._dtype), saves)
        y = by_place(compute, x, groups, x.shape[1], self._dtype, of=_of_float8(x, self._dtype))
        rows = tensor(x, "x", self._dtype if x_scales is None else "float8_e4m3")
        kept = None if on_device(x) else self._dtype
        return y, compute.forward(self, rows, tensor(y, "y", kept), saves, _scales(x_scales, "x_scales", x))


def feed_forward(x, groups, w13, w2, *, w13_bias=None, w2_bias=None, w13_scale=None, w2_scale=None, x_scales=None, activation="silu", limit=7.0,
                 alpha=1.702, dtype=None):
    """y[p] = w2 act(w13 x[row of p] + w13_bias) + w2_bias of the expert of each place p: [P,H]; 0 in padding.

    x [N,H] (or [L,C,H]), w13 [L,2,I,H] (gate, up), w2 [L,H,I], w13_bias [L,2,I], w2_bias [L,H] (with tensor parallelism on shard 0
    alone). activation: "silu", or "clamped" with limit and alpha (gpt-oss). Elements, gradients and errors as in grouped_gemm().

    With w13_scale [L, 2, I/128, ceil(H/128)] and w2_scale [L, ceil(H/128), I/128] the weights are float8_e4m3 (uint8 in NumPy), as DeepSeek's
    checkpoints have them, and go forward alone. On a GPU (Hopper) rows become float8, too, or are, with x_scales [N, ceil(H/128)], as dispatch
    delivers them; the result is of x's type, of float8 rows bfloat16 or dtype = "float16". The CPU widens the weights.
    """
    scales = w13_scale, w2_scale
    given = sum(array is not None for array in scales)
    if x_scales is not None and given < 2:
        raise UsageError("x_scales without w13_scale and w2_scale; rows are float8 where weights are: widen them with dequantise(), or give the weights' scales")
    if given > 0:
        if given < 2:
            raise UsageError(f"{'w13' if w13_scale is None else 'w2'}_scale is absent; both weights are float8, or none: give both scales")
        if _wants_gradients(x, w13_bias, w2_bias):
            raise UsageError("float8 weights go forward alone, and x or a bias requires gradients; detach them, or use torch.no_grad()")
        x = as_array(x, "x")
        what = FeedForward(x, (w13, w2, w13_bias, w2_bias), (activation, limit, alpha), dtype, scales)
        return what.forward(x, groups, x_scales=x_scales)[0]
    if _wants_gradients(x, w13, w2, w13_bias, w2_bias):
        from .torch.experts import feed_forward as with_gradients

        return with_gradients(x, groups, w13, w2, w13_bias=w13_bias, w2_bias=w2_bias, activation=activation, limit=limit, alpha=alpha)
    x = as_array(x, "x")
    return FeedForward(x, (w13, w2, w13_bias, w2_bias), (activation, limit, alpha), dtype).forward(x, groups)[0]


def unpermute(places, groups, row_weights=None, *, dtype=None):
    """Gathered places back to rows: out[n] = sum over k of row_weights[n,k] * places[place of (n,k)], the fold of combine, bit for bit.

    places [P,H]; row_weights as the local ids of the groups, float32; absent: 1. Rows without a local expert are 0.
    """
    if not groups.is_gathered:
        raise UsageError("these rows are their places already: give them to combine, with weighting='at_expert'")
    places = _flat(places, "places")
    ids = groups.local_ids
    if on_device(places):
        ids = ids.to(places.device)
        out = places.new_empty((ids.numel() // ids.shape[-1], places.shape[1]))
    else:
        rows = int(numpy.prod(ids.shape[:-1]))
        out = Frame.of(places).empty((rows, places.shape[1]), dtype or tensor(places, "places").dtype)
    weights = None if row_weights is None else tensor(_beside(row_weights, "row_weights", places), "row_weights")
    backend(groups, places).unpermute(tensor(places, "places", dtype), tensor(_beside(ids, "local_ids", places), "local_ids"), weights, tensor(out, "out", dtype))
    return out
