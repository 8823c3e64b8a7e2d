"""All exceptions of kvtier.

Misses and throttling are return values; only faults are exceptions. Code that calls a library or the system turns its
errors into one of these.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from kvtier.foreign_text import MAX_QUOTED, one_line, shown
from kvtier.redaction import shown_option

_WAYS_OUT = {
    errno.EFBIG: "raise RLIMIT_FSIZE (ulimit -f, LimitFSIZE= of systemd)",
    errno.EMFILE: "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE= of systemd)",
    errno.ENOLCK: "the filesystem or the sandbox has to allow locks (flock)",
}


def describe(error: OSError) -> str:
    """Return the message of a system error and, if a limit of the process is the cause, what to change."""
    words = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    return f"{words}; {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else words


class KVTierError(Exception):
    """Base of all exceptions of kvtier. The message is one line, whatever it quotes."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes raise it: Python would call the constructor with the message as its only argument."""
        return _remake, (type(self), self.args, vars(self))


def _remake(kind: type[KVTierError], args: tuple[object, ...], values: dict[str, Any]) -> KVTierError:
    error = kind.__new__(kind, *args)
    vars(error).update(values)
    return error


class ConfigError(KVTierError, ValueError):
    """A configuration key has a wrong value. Neither the message nor `value` shows a secret."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.value = shown_option(key.rpartition(".")[2], value)
        super().__init__(f"{one_line(key, MAX_QUOTED)}={one_line(shown(self.value), MAX_QUOTED)}: {allowed}")
        self.key = key
        self.allowed = allowed


class KeyFormatError(KVTierError, ValueError):
    """A key that `make_offload_key` did not make, or of another length than the other keys."""


class CapacityError(KVTierError):
    """The machine has less memory or space than the configuration asks for."""


class BlockNotReadyError(KVTierError, KeyError):
    """`prepare_load` named a block that is not ready in the primary tier."""


class OverlappingCallError(KVTierError, RuntimeError):
    """A manager was called while another thread was in a call of it; the call changed nothing."""

    def __init__(self) -> None:
        super().__init__(
            "another thread is in a call of this manager, so this call did nothing: calls may come from any thread, "
            "but one at a time, with one lock around each of them"
        )


class StoreError(KVTierError):
    """A store failed. The operation counts as a miss, and the tier's circuit breaker counts the failure."""


class StoreUnavailableError(StoreError):
    """A store cannot be opened (locked, full, missing, not of kvtier); the engine runs without its tier."""


class ProtocolError(KVTierError):
    """A message between a tier and its I/O process is malformed; the tier ends the process and starts a new one."""


class InvariantError(KVTierError, AssertionError):
    """`check_invariants()` found state that contradicts itself: a bug in kvtier or in a plug-in."""


class TraceError(KVTierError):
    """A trace cannot be read. The message is one line and says where the fault is."""
