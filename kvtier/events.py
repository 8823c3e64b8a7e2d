"""Events: the tiering manager reports each once; metrics, logs, recordings and tests observe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.types import FailureCause


class BlocksStored(NamedTuple):
    """Blocks became ready in the primary tier; they came from the device (`source` None) or from the tier `source`."""

    keys: Sequence[OffloadKey]
    source: str | None = None


class BlocksEvicted(NamedTuple):
    """A tier's policy evicted blocks."""

    tier: str
    keys: Sequence[OffloadKey]


class BlocksRecomputed(NamedTuple):
    """The engine has computed blocks again that the tier had evicted."""

    tier: str
    num_blocks: int


class BlocksLoaded(NamedTuple):
    """Blocks of a request arrived on the device; `by_source` counts them per tier from which they came.

    They hold `num_tokens`, which the engine would have computed in about `seconds`; both are 0 if that is not known.
    """

    req_id: str
    by_source: Mapping[str, int]
    num_tokens: int = 0
    seconds: float = 0.0


class LoadFailed(NamedTuple):
    """A request's load to the device failed. The blocks `dropped` left the primary tier for it."""

    req_id: str
    dropped: Sequence[OffloadKey]


class JobFinished(NamedTuple):
    """A secondary tier answered a job of `num_blocks`, of which `num_successful` succeeded.

    Of these, `num_moved` were read or written; a store moves no block that the tier already has. The tier says how many
    `seconds` it worked. Until the manager had the answer, `latency` seconds passed.
    """

    tier: str
    is_promotion: bool
    num_blocks: int
    num_successful: int
    num_bytes: int
    seconds: float
    num_moved: int = 0
    latency: float = 0.0


class BlocksFailed(NamedTuple):
    """A tier could not load or store blocks."""

    tier: str
    cause: FailureCause
    num_blocks: int


class CascadeRefused(NamedTuple):
    """Blocks were not offered to a tier when they were stored: `reason` is "admission", "throttled" or "down". A tier
    that was too busy may get them later.
    """

    tier: str
    num_blocks: int
    reason: str


class TierState(Enum):
    """Health of a secondary tier."""

    STARTING = "starting"
    UP = "up"
    DOWN = "down"
    CLOSED = "closed"


class TierStateChanged(NamedTuple):
    """A tier's health changed."""

    tier: str
    state: TierState
    reason: str


class RequestGaveUp(NamedTuple):
    """A request stopped waiting for tiers, so `num_blocks` miss: `reason` is "deadline", "budget", "probe" or
    "slower".
    """

    req_id: str
    reason: str
    num_blocks: int


class WaitOutcome(Enum):
    """How a request went on after it had waited for tiers."""

    LOADED = "loaded"
    """It loaded blocks, those that it waited for or those that were there."""
    COMPUTED = "computed"
    """It loaded nothing: the engine computes."""
    CANCELLED = "cancelled"
    """It ended, or the cache was reset, before it went on."""


class RequestWaited(NamedTuple):
    """A request waited for tiers, `seconds` in all."""

    req_id: str
    outcome: WaitOutcome
    seconds: float


class CacheReset(NamedTuple):
    """The cache was reset. `quarantined` slots are still being copied; `epoch` is the namespace's new salt."""

    quarantined: int
    epoch: bytes


class HintIgnored(NamedTuple):
    """A request's hint was malformed. It is counted and logged once, and the request goes on without it."""

    req_id: str
    fault: str


class UnexpectedCall(NamedTuple):
    """A completion or a tier's result came that nothing waited for. It is counted and is no error."""

    what: str
    times: int


Event = (
    BlocksStored
    | BlocksEvicted
    | BlocksRecomputed
    | BlocksLoaded
    | LoadFailed
    | JobFinished
    | BlocksFailed
    | CascadeRefused
    | TierStateChanged
    | RequestGaveUp
    | RequestWaited
    | CacheReset
    | HintIgnored
    | UnexpectedCall
)


class Observer(Protocol):
    """Receives events, on the engine's thread: return at once, do no I/O, and do not call kvtier."""

    def on_event(self, event: Event) -> None:
        """Learn of an event; whatever this raises is logged once per kind, and changes nothing."""


class NullObserver:
    """Ignores events."""

    def on_event(self, event: Event) -> None:
        """Do nothing."""


class Observers:
    """Passes each event to several observers, in order. If one raises, the others still get the event.

    Attributes:
        held: `SystemExit`, `KeyboardInterrupt` and the like, raised by an observer, or by a signal's handler while an
            observer ran. They are kept until the step ends: events come in the middle of changes of state, and of calls
            whose answers must not be lost.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers: list[tuple[Observer, tuple[type, ...]]] = [(observer, ()) for observer in observers]
        self._failed: set[tuple[type, type]] = set()
        self.held: list[BaseException] = []

    @classmethod
    def over(cls, observer: Observer) -> Observers:
        """Return `observer` as `Observers`, so that its exceptions are caught."""
        return observer if isinstance(observer, Observers) else cls([observer])

    def add(self, observer: Observer, *kinds: type[Event]) -> None:
        """Pass events to this observer, too, from now on: those of the given kinds; without `kinds`, all."""
        self._observers.append((observer, kinds))

    def on_event(self, event: Event) -> None:
        """Pass the event on; log an observer's exception once per type of observer and event."""
        for observer, kinds in self._observers:
            if kinds and type(event) not in kinds:
                continue
            try:
                observer.on_event(event)
            except Exception as fault:  # noqa: BLE001 - logged: callers are in the middle of a change of state
                self._report(observer, event, fault)
            except BaseException as fault:  # noqa: BLE001 - kept for `raise_held`
                self.held.append(fault)

    def raise_held(self) -> None:
        """Raise the oldest exception in `held`, if any; called at the end of a step."""
        if self.held:
            raise self.held.pop(0)

    def _report(self, observer: Observer, event: Event, fault: Exception) -> None:
        kind = type(observer), type(event)
        if kind not in self._failed:
            self._failed.add(kind)
            names = kind[0].__name__, kind[1].__name__
            logger.error("kvtier: observer %s failed at %s, and may miss more of them", *names, exc_info=fault)
