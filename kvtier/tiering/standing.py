"""Whether a tier that misbehaved is trusted again: after a backoff, first on trial."""

from __future__ import annotations

from collections import Counter

from kvtier.clock import Clock
from kvtier.events import Observer, TierState, TierStateChanged
from kvtier.foreign_text import MOST_QUOTED, one_line
from kvtier.log import logger

FIRST_BACKOFF = 1.0
MAX_BACKOFF = 30.0


class Standing:
    """What one tier's behaviour has earned it; every change is said once.

    Attributes:
        reason: why the tier is not in good standing; None if it is.
        retry_at: when it may be tried again, in seconds of the clock.
    """

    def __init__(self, name: str, clock: Clock, observer: Observer) -> None:
        """Args: name: of the tier, for events and the log."""
        self._name, self._clock, self._observer = name, clock, observer
        self.reason: str | None = None
        self.retry_at = 0.0
        self._on_trial = False
        self._backoff = FIRST_BACKOFF

    @property
    def is_trusted(self) -> bool:
        """Whether the tier may be used: in good standing, or on trial."""
        return self.reason is None or self._on_trial

    def lose(self, reason: str) -> None:
        """Leave the tier alone for a while; said once until it works again."""
        reason = one_line(reason, MOST_QUOTED)
        if self.reason is None:
            self._say(TierState.DOWN, reason)
        self._on_trial, self.reason = False, reason
        self.retry_at = self._clock() + self._backoff
        self._backoff = min(self._backoff * 2, MAX_BACKOFF)

    def reconsider(self, now: float) -> None:
        """Let a backoff that is over be followed by a trial, and a trial without a fault by good standing."""
        if self.reason is None or now < self.retry_at:
            return
        if self._on_trial:  # it got through a whole backoff without a fault
            self._on_trial, self.reason, self._backoff = False, None, FIRST_BACKOFF
            self._say(TierState.UP, "works again")
        else:
            self._on_trial, self.retry_at = True, now + self._backoff

    def _say(self, state: TierState, reason: str) -> None:
        if state is TierState.UP:
            logger.info("tier %s is up: %s", self._name, reason)
        else:
            logger.warning("tier %s is down: %s; the engine runs without it, kvtier tries again", self._name, reason)
        self._observer.on_event(TierStateChanged(self._name, state, reason))


class StateTimes:
    """How often a tier has entered each state, and for how long it has been down. It begins as STARTING."""

    def __init__(self, now: float) -> None:
        """Args: now: seconds of the clock, as everywhere here."""
        self._state, self._since = TierState.STARTING, now
        self._down_seconds = 0.0
        self._entered: Counter[TierState] = Counter()

    def enter(self, state: TierState, now: float) -> None:
        """Note the state that the tier is in from now on."""
        if state is not self._state:
            self._down_seconds = self._seconds_down(now)
            self._state, self._since = state, now
            self._entered[state] += 1

    def _seconds_down(self, now: float) -> float:
        return self._down_seconds + (max(0.0, now - self._since) if self._state is TierState.DOWN else 0.0)

    def readings(self, now: float) -> dict[str, float]:
        """Return the metrics, by name; of the states those that were entered, and DOWN."""
        entered = {f"times_{state.value}": times for state, times in self._entered.items()}
        return {"down_seconds": self._seconds_down(now), "times_down": 0, **entered}
