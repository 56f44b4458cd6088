"""What experts compute: grouped matrix products and the gated feed-forward, on rows in any layout of a dispatch. On the CPU."""
from . import _core
from .arrays import Frame, as_array, frame_of, is_torch, on_cpu, tensor, torch_if_used
from .errors import UsageError


class RowGroups:
    """Which rows each local expert computes. Expert g has places begins[g] .. begins[g] + counts[g] - 1; the others are padding, never
    read. Place p is row rows()[p] where rows are gathered (token_major, rank_slots), else row p."""

    def __init__(self, core, local_ids=None):
        self._core = core
        self.local_ids = local_ids  # of gathered rows: what unpermute() folds by

    @staticmethod
    def of(received, num_local_experts) -> "RowGroups":
        """Of a Received, in its layout."""
        core, frame = received._lease(), received._frame
        if frame.device != "cpu":
            raise UsageError("these rows are on a GPU; experts are computed on the CPU here")
        groups = _core.RowGroups.of(core, num_local_experts)
        return RowGroups(groups, core.local_ids(frame.place) if received.handle.layout in ("token_major", "rank_slots") else None)

    @staticmethod
    def of_counts(counts) -> "RowGroups":
        """Groups of so many rows, one behind the other."""
        import numpy

        counts = numpy.asarray(counts, numpy.int64).reshape(-1)
        offsets = numpy.concatenate([[0], numpy.cumsum(counts)])
        return RowGroups.of_offsets(counts, offsets)

    @staticmethod
    def of_offsets(counts, offsets) -> "RowGroups":
        """expert_major: counts [L], offsets [L+1], int32 or int64."""
        return RowGroups(_core.RowGroups.of_offsets(tensor(on_cpu(counts, "counts"), "counts"), tensor(on_cpu(offsets, "offsets"), "offsets")))

    @staticmethod
    def padded(counts, capacity) -> "RowGroups":
        """expert_padded: counts [L], rows [L,capacity,..]."""
        return RowGroups(_core.RowGroups.padded(tensor(on_cpu(counts, "counts"), "counts"), capacity))

    @staticmethod
    def gathered(local_ids, num_local_experts) -> "RowGroups":
        """token_major, rank_slots: local_ids [..,K], negative for none; by local expert, then (row, k)."""
        local_ids = on_cpu(local_ids, "local_ids")
        return RowGroups(_core.RowGroups.gathered(tensor(local_ids, "local_ids"), num_local_experts), local_ids)

    places = property(lambda self: self._core.places, doc="How many places there are, padding included.")
    begins = property(lambda self: self._core.begins, doc="[L]: where each expert's places begin.")
    counts = property(lambda self: self._core.counts, doc="[L]: how many places each expert has.")
    is_gathered = property(lambda self: self.local_ids is not None, doc="Whether places are rows in another order.")

    def rows(self, framework="numpy"):
        """[places] int64 of gathered rows: the row of each place."""
        return self._core.rows(frame_of(framework).place)

    def has_padding(self) -> bool:
        """Whether some places belong to no expert."""
        return self.places != sum(self.counts)


def by_place(like, groups, columns, dtype=None):
    """Memory [places, columns] in the framework of `like`; padding is zero."""
    out = Frame.of(like).empty((groups.places, columns), dtype or tensor(like, "x").dtype)
    if groups.has_padding():
        out[...] = 0
    return out


def _flat(x, what):
    """[N,K], also of the [L,C,K] and [R,M,K] that some layouts have."""
    x = on_cpu(x, what)
    if len(x.shape) not in (2, 3):
        raise UsageError(f"{what} has the shape {list(x.shape)}; expected [N,K], or [L,C,K] of expert_padded")
    return x.reshape(-1, x.shape[-1])


def _optional(array, what, dtype):
    return None if array is None else tensor(on_cpu(array, what), what, dtype)


def _wants_gradients(*arrays):
    torch = torch_if_used()
    return torch is not None and torch.is_grad_enabled() and any(is_torch(array) and array.requires_grad for array in arrays)


def product(x, groups, w, bias, dtype=None):
    """grouped_gemm() without gradients."""
    x, w = _flat(x, "x"), on_cpu(w, "w")
    if len(w.shape) != 3:
        raise UsageError(f"w has the shape {list(w.shape)}; expected [L,M,K]")
    y = by_place(x, groups, w.shape[1], dtype)
    _core.grouped_gemm(tensor(x, "x", dtype), groups._core, tensor(w, "w", dtype), _optional(bias, "bias", dtype), tensor(y, "y", dtype))
    return y


def grouped_gemm(x, groups, w, bias=None, *, dtype=None):
    """y[p] = x[row of p] w[g]^T + bias[g] for the places p of every expert g: [P,M]; 0 in padding.

    x [N,K] (or [L,C,K]), w [L,M,K], bias [L,M], all float32, bfloat16 or float16; dtype where the arrays cannot say. Products and sums
    are float32, each result is rounded once. Torch tensors that require gradients get them: of x through a product with w, of w and
    bias in float32, rounded once. UsageError names what does not fit.
    """
    if _wants_gradients(x, w, bias):
        from .torch.experts import grouped_gemm as with_gradients

        return with_gradients(x, groups, w, bias)
    return product(as_array(x, "x"), groups, w, bias, dtype)


class FeedForward:
    """Weights and activation of the gated feed-forward, checked and as views that keep them alive."""

    def __init__(self, w13, w2, w13_bias, w2_bias, activation, dtype=None):
        names = ("w13", "w2", "w13_bias", "w2_bias")
        self.arrays = [None if a is None else on_cpu(a, name) for name, a in zip(names, (w13, w2, w13_bias, w2_bias))]
        self._views = [_optional(a, name, dtype) for name, a in zip(names, self.arrays)]
        self.core = _core.FeedForward(self._views, activation)

    def forward(self, x, groups, saved=None, dtype=None):
        x = _flat(x, "x")
        y = by_place(x, groups, x.shape[1], dtype)
        self.core.forward(tensor(x, "x", dtype), groups._core, tensor(y, "y", dtype), saved)
        return y


def feed_forward(x, groups, w13, w2, *, w13_bias=None, w2_bias=None, activation="silu", limit=7.0, alpha=1.702, dtype=None):
    """y[p] = w2 act(w13 x[row of p] + w13_bias) + w2_bias of the expert of each place p: [P,H]; 0 in padding.

    x [N,H] (or [L,C,H]), w13 [L,2,I,H] (gate, up), w2 [L,H,I], w13_bias [L,2,I], w2_bias [L,H] (with tensor parallelism on shard 0
    alone). activation: "silu", or "clamped" with limit and alpha (gpt-oss). Elements, gradients and errors as in grouped_gemm().
    """
    if _wants_gradients(x, w13, w2, w13_bias, w2_bias):
        from .torch.experts import feed_forward as with_gradients

        return with_gradients(x, groups, w13, w2, w13_bias=w13_bias, w2_bias=w2_bias, activation=activation, limit=limit, alpha=alpha)
    return FeedForward(w13, w2, w13_bias, w2_bias, (activation, limit, alpha), dtype).forward(as_array(x, "x"), groups, dtype=dtype)


def unpermute(places, groups, row_weights=None, *, dtype=None):
    """Gathered places back to rows: out[n] = sum over k of row_weights[n,k] * places[place of (n,k)], the fold of combine, bit for bit.

    places [P,H]; row_weights as the local ids of the groups, float32; absent: 1. Rows without a local expert are 0.
    """
    if not groups.is_gathered:
        raise UsageError("these rows are their places already: give them to combine, with weighting='at_expert'")
    places = on_cpu(places, "places")
    rows = int(groups.local_ids.numel() if is_torch(groups.local_ids) else groups.local_ids.size) // groups.local_ids.shape[-1]
    out = Frame.of(places).empty((rows, places.shape[1]), dtype or tensor(places, "places").dtype)
    _core.unpermute(tensor(places, "places", dtype), tensor(groups.local_ids, "local_ids"), _optional(row_weights, "row_weights", None), groups._core,
                    tensor(out, "out", dtype))
    return out
