"""The kinds of failure; docs/errors.md says what to do about each."""


class Error(RuntimeError):
    """Everything that tokenyard raises by itself."""

    rank: int | None = None  # set by run_ranks: the rank that raised it


class UsageError(Error, ValueError):
    """The caller passed something that can never work. The text has the value, the expectation and the remedy."""


class TransportError(Error):
    """Something failed while operating.

    kind is timeout, peer_lost, aborted, mismatch, overflow or system; rank is who reports, peer who is blamed, phase the wait in
    which it happened, epoch the number of the call; -1 and "none" where none applies.
    """

    def __init__(self, message, fields):
        super().__init__(message)
        self.fields = dict(fields)
        self.kind: str = fields["kind"]
        self.phase: str = fields["phase"]
        self.rank: int = fields["rank"]
        self.peer: int = fields["peer"]
        self.epoch: int = fields["epoch"]
        self.expected: int = fields["expected"]
        self.seen: int = fields["seen"]
        self.detail: str = fields["detail"]

    def __reduce__(self):
        return TransportError, (str(self), self.fields)
