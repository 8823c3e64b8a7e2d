"""What a tier and its executor say to each other, whether the executor is a process, threads or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier.keys import OffloadKey
from kvtier.types import FailureCause

MAX_REASON_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Options:
    """First message to the process: what to open and how (kept off the command line: it may hold secrets)."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ready:
    """The store is open; `num_slots` is 0 for stores addressed by key. The index follows."""

    num_slots: int


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The store cannot be opened, or is of no more use and must be opened anew; the tier ends the process."""

    reason: str


@dataclass(frozen=True, slots=True)
class IndexBatch:
    """Blocks that a former process left, oldest first."""

    slots: Sequence[int]
    keys: Sequence[OffloadKey]


@dataclass(frozen=True, slots=True)
class IndexEnd:
    """The index is complete: jobs are welcome."""


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring blocks of one job, to be moved.

    Attributes:
        serial: number of the job in its tier.
        first: index within the job of the first block.
        is_load: True reads the store into the arena.
        store_slots: slots of the store, or None if keys are the location.
        arena_slots: slots of the primary arena.
    """

    serial: int
    first: int
    is_load: bool
    keys: Sequence[OffloadKey]
    arena_slots: Sequence[int]
    store_slots: Sequence[int] | None = None

    def slice(self, start: int, stop: int) -> Part:
        """Return the blocks `start` to `stop` of this part as a part."""
        store_slots = None if self.store_slots is None else self.store_slots[start:stop]
        return Part(
            self.serial,
            self.first + start,
            self.is_load,
            self.keys[start:stop],
            self.arena_slots[start:stop],
            store_slots,
        )


@dataclass(frozen=True, slots=True)
class PartResult:
    """How a part, or a piece of one, ended: success per block, bytes moved, seconds, failed blocks by cause."""

    serial: int
    first: int
    successes: Sequence[bool]
    num_bytes: int = 0
    seconds: float = 0.0
    failures: Mapping[FailureCause, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask which of `keys` the store holds."""

    probe_id: int
    keys: Sequence[OffloadKey]


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """Whether each key of a probe is held; `failed` means the store could not say."""

    probe_id: int
    found: Sequence[bool]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class CancelWaiting:
    """Answer every part that waits for a thread as cancelled."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """How much of its medium a store has written beforehand, in bytes, and of how much."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Several:
    """Messages that travel in one packet, in their order."""

    messages: Sequence[Message]


Message = (
    Options
    | Ready
    | Unavailable
    | IndexBatch
    | IndexEnd
    | Part
    | PartResult
    | Probe
    | ProbeAnswer
    | CancelWaiting
    | Prepared
    | Several
)
