"""Decides whether the manager trusts a tier. A tier that misbehaves is not used for a while, then tried again."""

from __future__ import annotations

from collections import Counter

from kvtier.clock import Clock
from kvtier.events import Observer, TierState
from kvtier.foreign_text import MAX_REASON, one_line
from kvtier.secondary.health import Breaker, TierHealth

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0


class Standing:
    """A circuit breaker. One fault opens it; a trial without a fault, as long as the pause, closes it again.

    Each change is reported once.

    Attributes:
        reason: why the tier is not in good standing; None if it is.
        is_trusted: whether the tier may be used: in good standing, or on trial.
    """

    def __init__(self, name: str, clock: Clock, observer: Observer) -> None:
        """Args: name: of the tier, for events and the log."""
        # `draw` adds no random part to a pause: a replay of a recording must decide as the engine did.
        self._breaker = Breaker(clock, 1, FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, draw=lambda: 0.0, calm=1)
        self._health = TierHealth(name, observer)
        self.reason: str | None = None
        self.is_trusted = True

    @property
    def retry_at(self) -> float:
        """When the tier may be tried again, in seconds of the clock."""
        return self._breaker.retry_at

    def lose(self, reason: str, *, is_told: bool = False) -> None:
        """Stop using the tier for a while.

        Args:
            is_told: whether the tier itself reports that it is down. The fault then gets no second event and log line.
        """
        if self.reason is None and not is_told:
            self._health.change(TierState.DOWN, reason)
        self.reason = one_line(reason, MAX_REASON)
        self._breaker.open()
        self.is_trusted = False

    def reconsider(self) -> None:
        """Try the tier when its pause is over, and trust it after a trial without a fault."""
        if self._breaker.try_again():
            self.is_trusted = True
        elif self.reason is not None and self._breaker.has_passed_trial:
            self._breaker.succeed()
            self.reason = None
            if self._health.state is TierState.DOWN:
                self._health.prove()
                self._health.change(TierState.UP, "works again")


class StateTimes:
    """How often a tier has entered each state, and for how long it has been down.

    Attributes:
        state: the current state; STARTING at first.
    """

    def __init__(self, now: float) -> None:
        """Args: now: seconds of the clock, as everywhere here."""
        self.state, self._since = TierState.STARTING, now
        self._down_seconds = 0.0
        self._entered: Counter[TierState] = Counter()

    def enter(self, state: TierState, now: float) -> None:
        """Note the state that the tier is in from now on."""
        if state is not self.state:
            self._down_seconds = self._seconds_down(now)
            self.state, self._since = state, now
            self._entered[state] += 1

    def _seconds_down(self, now: float) -> float:
        return self._down_seconds + (max(0.0, now - self._since) if self.state is TierState.DOWN else 0.0)

    def readings(self, now: float) -> dict[str, float]:
        """Return the metrics by name. States that were never entered are left out, except DOWN."""
        entered = {f"times_{state.value}": times for state, times in self._entered.items()}
        return {"down_seconds": self._seconds_down(now), "times_down": 0, **entered}
