"""The one family of errors.

Misses and throttling are values; only faults are exceptions. Foreign errors are translated into this
family where they enter, once.
"""

from __future__ import annotations


class KVTierError(Exception):
    """Base of everything kvtier raises on purpose."""


class ConfigError(KVTierError, ValueError):
    """A configuration key holds what it may not; the message is one line."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={value!r}: {allowed}")
        self.key = key
        self.value = value
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
