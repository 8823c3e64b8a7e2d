"""A tier's health: the breaker that decides when to try, and the state that everybody sees."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from enum import Enum

from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.events import Observer, TierState, TierStateChanged
from kvtier.foreign_text import MAX_REASON, one_line
from kvtier.log import logger

_MAX_SAID = 8
"""Different reasons that are logged before the tier has proved that it works: a server may word each refusal anew."""
_ANOTHER_REASON = "another reason"
CALM_PAUSES = 4.0
"""Pauses without a failure after which the next one is short again."""
_JITTER = 0.5
"""Of a pause, how much may be left out: engines that lost a shared server together come back one after the other."""


class BreakerState(Enum):
    """Whether a tier may be used."""

    CLOSED = "closed"
    """Works."""
    OPEN = "open"
    """Does not; nothing is tried before `retry_at`."""
    HALF_OPEN = "half_open"
    """Is being tried: one success closes it, one failure opens it for twice as long."""


_OPEN = BreakerState.OPEN


class Breaker:
    """Counts failures in a row and spaces the attempts after them: 0.5 s, doubled up to 30 s.

    Each pause is cut short at random, by up to half. The spacing starts anew only after a calm as long as a few of
    the last pauses: a job that kills its process every time, among others that succeed, must not restart it twice a
    second.
    """

    def __init__(
        self,
        clock: Clock,
        failures_to_open: int = 3,
        first_backoff: float = 0.5,
        longest_backoff: float = 30.0,
        draw: Callable[[], float] = random.random,
        calm: float = CALM_PAUSES,
    ) -> None:
        """Start closed.

        Args:
            failures_to_open: failed jobs in a row.
            first_backoff, longest_backoff: seconds.
            draw: returns a number of [0, 1), of which half is left out of a pause.
            calm: pauses without a failure, after which the next one is short again.
        """
        self._clock = clock
        self._failures_to_open = failures_to_open
        self._first_backoff = first_backoff
        self._longest_backoff = longest_backoff
        self._draw, self._calm = draw, calm
        self._backoff = first_backoff
        self._failures = 0
        self.state = BreakerState.CLOSED
        self.retry_at = 0.0
        self._tried_at = 0.0
        self.num_openings = 0

    def succeed(self) -> None:
        """Note a success of the thing itself; after a calm, all is forgiven."""
        if self.state is not BreakerState.OPEN:
            self.state = BreakerState.CLOSED
            self._failures = 0
            if self._clock() - self.retry_at >= self._calm * self._backoff:
                self._backoff = self._first_backoff

    def fail(self) -> bool:
        """Note a failed job; return whether that opened the breaker."""
        if self.state is BreakerState.OPEN:
            return False
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._failures_to_open:
            self.open()
            return True
        return False

    def open(self) -> None:
        """Open, for the next backoff (the process died, or could not start)."""
        self.state = BreakerState.OPEN
        self.num_openings += 1
        self._failures = 0
        self.retry_at = self._clock() + self._backoff * (1 - _JITTER * self._draw())
        self._backoff = min(2 * self._backoff, self._longest_backoff)

    def try_again(self) -> bool:
        """Go from open to half open if the backoff is over; return whether it did."""
        if self.state is not _OPEN or (now := self._clock()) < self.retry_at:
            return False
        self.state, self._tried_at = BreakerState.HALF_OPEN, now
        return True

    @property
    def has_passed_trial(self) -> bool:
        """Whether it has been half open for a whole pause: for what proves itself by nothing but the lack of faults."""
        return self.state is BreakerState.HALF_OPEN and self._clock() - self._tried_at >= self._backoff

    def try_now(self) -> None:
        """Go from open to half open at once: what failed has been replaced."""
        if self.state is BreakerState.OPEN:
            self.state, self._tried_at = BreakerState.HALF_OPEN, self._clock()

    def check_invariants(self) -> None:
        """Raise InvariantError if the counts are out of their bounds."""
        if not self._first_backoff <= self._backoff <= self._longest_backoff:
            raise InvariantError(f"backoff of {self._backoff} s")
        if not 0 <= self._failures < self._failures_to_open:
            raise InvariantError(f"{self._failures} failures in a row and still {self.state}")


class TierHealth:
    """State and reason of a tier; every change is emitted, and logged once.

    A tier that comes and goes for one reason says so once: the log starts afresh when the tier has proved that it
    works, and not when it is only tried again. Of reasons that differ every time, a few are logged.
    """

    def __init__(self, tier_type: str, observer: Observer) -> None:
        self._tier_type = tier_type
        self._observer = observer
        self.state = TierState.STARTING
        self.reason = ""
        self._said: set[tuple[TierState, str]] = set()

    def prove(self) -> None:
        """Note that the tier, after a failure, served something: what happens next is news again."""
        self._said.clear()

    def leave_to_parent(self) -> None:
        """Be CLOSED without a word: in a forked child, the tier is its parent's."""
        self.state, self.reason = TierState.CLOSED, "it belongs to the parent process"

    def change(self, state: TierState, reason: str = "", *, warn: bool = False) -> None:
        """Enter a state; the same state for the same reason is no change. Nothing follows CLOSED.

        Args: warn: users should know, though the tier is not DOWN.
        """
        reason = one_line(reason, MAX_REASON)
        if (state, reason) == (self.state, self.reason) or self.state is TierState.CLOSED:
            return
        self.state, self.reason = state, reason
        said = (state, reason if len(self._said) < _MAX_SAID else _ANOTHER_REASON)
        if (state, reason) not in self._said and said not in self._said:
            self._said.add(said)
            self._say(state, reason, warn)
        self._observer.on_event(TierStateChanged(self._tier_type, state, reason))

    def _say(self, state: TierState, reason: str, warn: bool) -> None:
        if state is TierState.DOWN:
            logger.warning(
                "tier %s is down: %s; the engine runs without it, kvtier tries again", self._tier_type, reason
            )
        else:
            level = logging.WARNING if warn else logging.INFO
            logger.log(level, "tier %s is %s%s", self._tier_type, state.value, f": {reason}" if reason else "")
