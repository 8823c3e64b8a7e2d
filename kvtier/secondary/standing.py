"""Declares a tier down, decides when it is tried again, and publishes its state.

A `Standing` is all there is to it. A tier over a store has one, which its `Supervisor` moves: it sees the executor. The
manager's guard has one per tier, which it moves by what it sees from outside: a tier may be anybody's code.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable
from enum import Enum

from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.events import Observer, TierState, TierStateChanged
from kvtier.foreign_text import MAX_REASON, one_line
from kvtier.log import logger

_MAX_SAID = 8
"""Most different reasons that are logged until the tier works again, since a server may word each refusal
differently."""
_ANOTHER_REASON = "another reason"
CALM_PAUSES = 4.0
"""After this many times the last pause without a failure, the next pause is the first one again."""
_JITTER = 0.5
"""Most of a pause that is left out at random, so that engines that lost a shared server together do not return
together."""


class BreakerState(Enum):
    """Whether a tier may be used."""

    CLOSED = "closed"
    """The tier works."""
    OPEN = "open"
    """The tier has failed. It is not used before `retry_at`."""
    HALF_OPEN = "half_open"
    """The tier is on trial: one success closes the breaker, one failure opens it for twice as long."""


_OPEN, _CLOSED = BreakerState.OPEN, BreakerState.CLOSED


class Breaker:
    """Opens after several failures in a row; then it allows a trial after a pause of 0.5 s, doubled each time to 30 s.

    Up to half of each pause is left out at random. The pauses become short again only after a time without failures, a
    few times as long as the last pause. Otherwise a job that always kills its process, among others that succeed, would
    make the process restart twice per second.
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
            failures_to_open: failed jobs in a row that open the breaker.
            first_backoff, longest_backoff: shortest and longest pause, in seconds.
            draw: returns a random number of [0, 1); half of it is the part of a pause that is left out.
            calm: see `CALM_PAUSES`.
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

    def succeed(self) -> bool:
        """Count a success: close the breaker and, if there was no failure for long, make the next pause short.

        Return whether this ended a trial.
        """
        if self.state is _OPEN:
            return False
        was_trial, self.state = self.state is not _CLOSED, _CLOSED
        self._failures = 0
        is_long = self._backoff != self._first_backoff
        if is_long and self._clock() - self.retry_at >= self._calm * self._backoff:
            self._backoff = self._first_backoff
        return was_trial

    def fail(self) -> bool:
        """Count a failed job; return whether this opened the breaker."""
        if self.state is BreakerState.OPEN:
            return False
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._failures_to_open:
            self.open()
            return True
        return False

    def open(self) -> None:
        """Open for the next pause, whatever was counted: the process has died or could not start."""
        self.state = BreakerState.OPEN
        self.num_openings += 1
        self._failures = 0
        self.retry_at = self._clock() + self._backoff * (1 - _JITTER * self._draw())
        self._backoff = min(2 * self._backoff, self._longest_backoff)

    def try_again(self) -> bool:
        """Change from open to half open if the pause is over; return whether it was."""
        if self.state is not _OPEN or (now := self._clock()) < self.retry_at:
            return False
        self.state, self._tried_at = BreakerState.HALF_OPEN, now
        return True

    @property
    def has_passed_trial(self) -> bool:
        """Whether the breaker has been half open for a whole pause, for users who see faults but no successes."""
        return self.state is BreakerState.HALF_OPEN and self._clock() - self._tried_at >= self._backoff

    def try_now(self) -> None:
        """Change from open to half open at once, because the failed executor was replaced."""
        if self.state is BreakerState.OPEN:
            self.state, self._tried_at = BreakerState.HALF_OPEN, self._clock()

    def check_invariants(self) -> None:
        """Raise InvariantError if the counts are out of their bounds."""
        if not self._first_backoff <= self._backoff <= self._longest_backoff:
            raise InvariantError(f"backoff of {self._backoff} s")
        if not 0 <= self._failures < self._failures_to_open:
            raise InvariantError(f"{self._failures} failures in a row and still {self.state}")


class Standing:
    """A tier's state and its reason, with the breaker of the whole tier. Every change is an event, and is logged once.

    A tier that fails again and again for the same reason is logged once. It is logged again only after the tier has
    worked in between, which a trial alone does not show. If the reasons differ every time, only a few are logged.

    Attributes:
        state, reason: as published.
        fault: why the tier was last declared down; None once it has worked since.
        breaker: says when the tier is tried again.
    """

    def __init__(self, name: str, breaker: Breaker, observer: Observer) -> None:
        """Args: name: of the tier, for events and the log."""
        self._name = name
        self._observer = observer
        self.breaker = breaker
        self.state = TierState.STARTING
        self.reason = ""
        self.fault: str | None = None
        self._said: set[tuple[TierState, str]] = set()

    @property
    def is_trusted(self) -> bool:
        """Whether the tier may be used: in good standing, or on trial."""
        return self.breaker.state is not _OPEN

    def lose(self, reason: str, *, is_told: bool = False) -> None:
        """Declare the tier down: it is not used until the breaker allows a trial.

        Args:
            is_told: whether somebody else has published that the tier is down. This then adds no event and log line.
        """
        self.breaker.open()
        self._fall(reason, is_told)

    def fail(self, reason: str) -> None:
        """Count a failed job. After several in a row, declare the tier down, as `lose` does."""
        if self.breaker.fail():
            self._fall(reason, is_told=False)

    def _fall(self, reason: str, is_told: bool) -> None:
        self.fault = one_line(reason, MAX_REASON)
        if not is_told:
            self.change(TierState.DOWN, reason)

    def recover(self) -> None:
        """Learn that the tier has worked on trial. The fault is over, and the next one is logged."""
        self.fault = None
        self._said.clear()

    def leave_to_parent(self) -> None:
        """In a forked child, become CLOSED without an event or a log line: the tier belongs to the parent."""
        self.state, self.reason = TierState.CLOSED, "it belongs to the parent process"

    def change(self, state: TierState, reason: str = "", *, warn: bool = False) -> None:
        """Enter a state, unless state and reason are the same as before, or the state is CLOSED.

        Args:
            warn: log a warning although the tier is not DOWN.
        """
        reason = one_line(reason, MAX_REASON)
        if (state, reason) == (self.state, self.reason) or self.state is TierState.CLOSED:
            return
        self.state, self.reason = state, reason
        said = (state, reason if len(self._said) < _MAX_SAID else _ANOTHER_REASON)
        if (state, reason) not in self._said and said not in self._said:
            self._said.add(said)
            self._say(state, reason, warn)
        self._observer.on_event(TierStateChanged(self._name, state, reason))

    def _say(self, state: TierState, reason: str, warn: bool) -> None:
        if state is TierState.DOWN:
            logger.warning(
                "tier %s is down: %s; the engine runs without it, and kvtier tries again", self._name, reason
            )
        else:
            level = logging.WARNING if warn else logging.INFO
            logger.log(level, "tier %s is %s%s", self._name, state.value, f": {reason}" if reason else "")


_TIMES = {state: f"times_{state.value}" for state in TierState}
"""Names of the metrics that count how often a tier has entered a state."""


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
        """Return the metrics by name."""
        entered = {name: self._entered[state] for state, name in _TIMES.items()}
        return {"down_seconds": self._seconds_down(now), **entered}
