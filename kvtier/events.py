"""Events: what happened, said once. Metrics, logs, recordings and tests are observers of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.types import FailureCause


class BlocksStored(NamedTuple):
    """Blocks became ready in the primary tier, from the device (`source` None) or a tier's promotion."""

    keys: Sequence[OffloadKey]
    source: str | None = None


class BlocksEvicted(NamedTuple):
    """Blocks left a tier by its policy's choice."""

    tier: str
    keys: Sequence[OffloadKey]


class BlocksLoaded(NamedTuple):
    """A request took blocks from the primary tier to the device; `by_source` counts blocks per origin tier."""

    req_id: str
    by_source: Mapping[str, int]


class JobFinished(NamedTuple):
    """A job of a secondary tier was answered: blocks asked, blocks that succeeded, bytes, seconds."""

    tier: str
    is_promotion: bool
    num_blocks: int
    num_successful: int
    num_bytes: int
    seconds: float


class BlocksFailed(NamedTuple):
    """A tier could not serve or store blocks, by cause."""

    tier: str
    cause: FailureCause
    num_blocks: int


class CascadeRefused(NamedTuple):
    """A cascade was not taken: `reason` is "admission", "throttled" or "down"."""

    tier: str
    num_blocks: int
    reason: str


class TierState(Enum):
    """Health of a secondary tier, as its breaker sees it."""

    STARTING = "starting"
    UP = "up"
    DOWN = "down"
    CLOSED = "closed"


class TierStateChanged(NamedTuple):
    """A tier's health changed; logged once, here."""

    tier: str
    state: TierState
    reason: str


class RequestGaveUp(NamedTuple):
    """A request waits for no more: `reason` is "deadline", "budget", "probe" or "slower"; `num_blocks` miss for it."""

    req_id: str
    reason: str
    num_blocks: int


class CacheReset(NamedTuple):
    """The primary tier was forgotten; `quarantined` slots are still under a copy; `epoch` salts the namespace."""

    quarantined: int
    epoch: bytes


class PolicySwitched(NamedTuple):
    """`eviction_policy: auto` chose another policy; the rates are what shadows of both hit of a sample, 0 to 1."""

    tier: str
    former: str
    chosen: str
    former_rate: float
    chosen_rate: float


class HintIgnored(NamedTuple):
    """A request's hint was malformed; logged once, counted, and the request goes on without it."""

    req_id: str
    fault: str


class UnexpectedCall(NamedTuple):
    """A completion, or a tier's result, that nothing waited for: counted, never raised."""

    what: str
    times: int


Event = (
    BlocksStored
    | BlocksEvicted
    | BlocksLoaded
    | JobFinished
    | BlocksFailed
    | CascadeRefused
    | TierStateChanged
    | RequestGaveUp
    | CacheReset
    | PolicySwitched
    | HintIgnored
    | UnexpectedCall
)


class Observer(Protocol):
    """A sink of events. Called on the engine's thread: return at once, do no I/O, and do not call kvtier."""

    def on_event(self, event: Event) -> None:
        """Take note of one event."""
        ...


class NullObserver:
    """Takes note of nothing."""

    def on_event(self, event: Event) -> None:
        """Ignore the event."""


class Observers:
    """Hands each event to several observers, in order. One that raises loses that event, and nobody else notices.

    Attributes:
        held: `SystemExit`, `KeyboardInterrupt` and the like, raised by an observer or by a signal's handler while one
            ran. Events come in the middle of a change of state, and of calls whose answer must not be lost.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)
        self._failed: set[tuple[type, type]] = set()
        self.held: list[BaseException] = []

    @classmethod
    def over(cls, observer: Observer) -> Observers:
        """Return `observer`, guarded."""
        return observer if isinstance(observer, Observers) else cls([observer])

    def add(self, observer: Observer) -> None:
        """Add a sink; it sees the events from now on."""
        self._observers.append(observer)

    def on_event(self, event: Event) -> None:
        """Pass the event on; what an observer raises is logged, once per observer and kind of event."""
        for observer in self._observers:
            try:
                observer.on_event(event)
            except Exception as fault:  # noqa: BLE001 - it comes in the middle of a change of state: reported
                self._report(observer, event, fault)
            except BaseException as fault:  # noqa: BLE001 - `raise_held` does that
                self.held.append(fault)

    def raise_held(self) -> None:
        """Raise the oldest of what is held; to be called when a step has ended."""
        if self.held:
            raise self.held.pop(0)

    def _report(self, observer: Observer, event: Event, fault: Exception) -> None:
        kind = type(observer), type(event)
        if kind not in self._failed:
            self._failed.add(kind)
            names = kind[0].__name__, kind[1].__name__
            logger.error("kvtier: observer %s failed at %s, and may miss more of them", *names, exc_info=fault)
