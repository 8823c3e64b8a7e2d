"""The one family of errors.

Misses and throttling are values; only faults are exceptions. Foreign errors are translated into this
family where they enter, once.
"""

from __future__ import annotations

import errno
import os

from kvtier.foreign_text import MAX_QUOTED, one_line, shown
from kvtier.redaction import shown_option

_WAYS_OUT = {
    errno.EFBIG: "raise RLIMIT_FSIZE (ulimit -f, LimitFSIZE= of systemd)",
    errno.EMFILE: "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE= of systemd)",
    errno.ENOLCK: "the filesystem or the sandbox has to allow locks (flock)",
}


def describe(error: OSError) -> str:
    """Return the words of an error of the system, and the way out where a limit of the process is the cause."""
    words = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    return f"{words}; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else words


class KVTierError(Exception):
    """Base of everything kvtier raises on purpose; the message is one line, whatever it quotes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(KVTierError, ValueError):
    """A configuration key holds what it may not; neither the message nor `value` shows a secret."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.value = shown_option(key.rpartition(".")[2], value)
        super().__init__(f"{one_line(key, MAX_QUOTED)}={one_line(shown(self.value), MAX_QUOTED)}: {allowed}")
        self.key = key
        self.allowed = allowed


class KeyFormatError(KVTierError, ValueError):
    """A key that `make_offload_key` cannot have made, or of another length than its neighbours."""


class CapacityError(KVTierError):
    """The machine cannot hold what the configuration asks for."""


class BlockNotReadyError(KVTierError, KeyError):
    """`prepare_load` named a block that is not ready in the primary tier."""


class OverlappingCallError(KVTierError, RuntimeError):
    """A call would have changed a manager's state while another thread was in a call of it; it did nothing."""

    def __init__(self) -> None:
        super().__init__(
            "another thread is in a call of this manager, so this call did nothing: calls may come from any thread, "
            "but one at a time, with one lock around each of them"
        )


class StoreError(KVTierError):
    """A backend failed; the operation counts as a miss, the tier's breaker counts the failure."""


class StoreUnavailableError(StoreError):
    """A backend cannot start (locked, full, missing, foreign); the engine runs without its tier."""


class ProtocolError(KVTierError):
    """A message between a tier and its I/O process is malformed; treated as the process's death."""


class InvariantError(KVTierError, AssertionError):
    """`check_invariants()` found state that contradicts itself: a defect of kvtier or of a plug-in."""


class TraceError(KVTierError):
    """A trace that cannot be read; the message is one line and names the place."""
