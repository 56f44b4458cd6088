"""What a dispatch gives back, at once or later."""
from .arrays import shown_as
from .errors import Error


class Received:
    """The rows of one dispatch.

    Unless copied out they are a lease on a receive buffer of the exchange: it goes back when this object and every array of rows
    or scales taken from it are gone (`with` and release() let go of this object's part). All arrays are in the framework of the
    input; metadata is int32, float32 for weights, and stays valid for good. -1, and weight 0, where there is no row. None for
    what a layout does not have. On cuda arrays are valid on the stream of the dispatch; other streams wait for it as for any tensor's.
    Rows copied out are in memory of torch's allocator: their record_stream() is torch's own. For a lease record_stream() here says that
    another stream reads it. Letters: N rows received, L local experts, C expert capacity, R ranks, M max_tokens_per_rank.
    """

    def __init__(self, core, frame, rows_dtype=None, scales_dtype=None, memory=None):
        self._core = core
        self._memory = memory  # of torch's allocator
        self._frame = frame
        self._rows_dtype = rows_dtype
        self._scales_dtype = scales_dtype
        self.handle = core.handle

    def _lease(self):
        if self._core is None:
            raise ValueError("the rows were released: take what is needed before release() or the end of `with`")
        return self._core

    @property
    def rows(self):
        """[N,H] token_major, [N',H] expert_major, [L,C,H] expert_padded, [R,M,H] rank_slots; the dtype of the input."""
        core = self._lease()
        return shown_as(core.rows(self._frame.place), self._rows_dtype) if self._memory is None else self._own(self._memory.rows, self._rows_dtype)

    @property
    def scales(self):
        """As rows, with S instead of H; None without scales."""
        core = self._lease()
        if self._memory is None:
            return shown_as(core.scales(self._frame.place), self._scales_dtype)
        return None if self._memory.scales is None else self._own(self._memory.scales, self._scales_dtype)

    def _own(self, memory, dtype):
        flat = memory.view(dtype)
        return flat.view(*self._core.rows_shape()[:-1], flat.shape[1])

    def record_stream(self, stream) -> None:
        """cuda: what this torch stream has been given by the time the rows are released still reads them."""
        self._lease().read_on(stream.cuda_stream)
        for memory in (self._memory.rows, self._memory.scales) if self._memory else ():
            if memory is not None:
                memory.record_stream(stream)

    @property
    def num_rows(self) -> int:
        """N; on cuda with sizing="capacity" -1: see num_rows_device."""
        return self._lease().num_rows

    def release(self) -> None:
        """Lets go of the rows: their buffer is free once the arrays taken from here are gone, too."""
        self._core = self._memory = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def __repr__(self):
        return f"<Received {self.handle.layout}{'' if self._core else ', released'}>"


def _metadata(name, doc):
    return property(lambda self: getattr(self._lease(), name)(self._frame.place), doc=doc)


for _name, _doc in {
    "num_rows_device": "[1] int32 on the device, cuda only: what num_rows would be.",
    "local_ids": "[N,K] or [R,M,K]: the local expert of each choice, -1 where it is elsewhere.",
    "row_weights": "[N,K], [R,M,K], or per row of an expert layout: the weights that travelled.",
    "source_rank": "[N], or per row of an expert layout: the rank that sent the row.",
    "source_token": "The index of the row among its sender's tokens.",
    "source_k": "Expert layouts: which of the token's choices the row is.",
    "expert_counts": "[L]: rows of each local expert.",
    "expert_offsets": "[L+1]: where each local expert begins in rows (expert_major) or in expert_rows (the gather map).",
    "expert_rows": "The gather map: row indices grouped by local expert.",
    "rank_counts": "[R]: rows from each source.",
    "sent_counts": "[R]: rows that this rank sent to each destination.",
    "ranges": "[L,R,2] of expert_padded: (begin, count) of each source within the expert.",
    "present": "[R,M] uint8 of rank_slots: where there is a row.",
}.items():
    setattr(Received, _name, _metadata(_name, _doc))


class Pending:
    """Started and not yet finished. finish() waits and hands the result over, once."""

    def __init__(self, core, keep, result):
        self._core = core
        self._keep = keep  # inputs, which are read until the operation has ended
        self._result = result

    def ready(self) -> bool:
        """Whether finish() would not wait. Never waits."""
        return self._core.ready()

    def is_finished(self) -> bool:
        """Whether finish() has returned, or failed."""
        return self._keep is None

    def is_over(self) -> bool:
        """Whether nobody reads the inputs any more."""
        return self._keep is None or self._core.ready()

    def finish(self):
        """The result; UsageError the second time. TransportError as the blocking call. Ctrl-C leaves the operation under way."""
        try:
            result = self._core.finish()
        except Error:
            self._keep = None
            raise
        self._keep = None
        return self._result(result)
