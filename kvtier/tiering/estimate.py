"""Estimates: how soon blocks arrive from a tier, how long the engine computes them, and which prefix is worth loading.

Pure arithmetic on what others have measured: no clock, no tier, no request.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GUESSED_RATE = 10_000.0
"""Tokens per second that an engine computes until it is measured. Rather too many: then little is waited for."""
DOUBLING_TOKENS = 32_768.0
"""Context at which a token takes twice as long as the first one: 12,000 to 53,000 in models of 0.5 to 70 billion
parameters, where attention has as many multiplications as all the rest."""
_MEMORY_SECONDS = 5.0
"""Seconds of computing after which what was measured before weighs a third."""
_WEIGHT = 0.5
"""Of one new load against all before it."""
_LONGEST_GAP = 2.0
"""Seconds between two polls that count at most: an engine that was idle did not look."""
_MIN_SECONDS = 1e-6
"""That a load takes; clocks tick."""
_BURST_SECONDS = 0.05
"""A tier is kept busy for so long, beside its latency and the time between polls."""


class PrefillSpeed:
    """How fast the engine computes tokens; a token takes the longer, the more tokens precede it."""

    def __init__(self, rate: float = GUESSED_RATE, doubling: float = DOUBLING_TOKENS) -> None:
        """Args: rate: tokens per second in an empty context; doubling: context at which a token takes twice as long."""
        self.doubling = doubling
        # As if one second had been measured already.
        self._work, self._seconds = rate, 1.0

    @classmethod
    def through(cls, measured: Sequence[tuple[float, float]]) -> PrefillSpeed:
        """Return the speed that fits what was measured best.

        Args:
            measured: (tokens in a prompt, tokens per second over the whole prompt), of two different lengths at least.

        Raises:
            ValueError: no speed fits, since longer prompts are computed faster, or too slowly for short ones.
        """
        # The seconds per token of a whole prompt of n tokens are (1 + n / 2 / doubling) / rate: a line over n.
        lengths, per_token = zip(*[(tokens, 1 / rate) for tokens, rate in measured], strict=True)
        slope, at_zero = statistics.linear_regression(lengths, per_token)
        if slope < 0 or at_zero <= 0:
            raise ValueError("tokens per second that do not fit a prompt that grows")
        return cls(1 / at_zero, at_zero / 2 / slope if slope else math.inf)

    @property
    def rate(self) -> float:
        """Tokens per second in an empty context."""
        return self._work / self._seconds

    def work(self, first: float, last: float) -> float:
        """Return tokens `first` to `last` of a prompt, counted in tokens of an empty context."""
        return max(0.0, last - first) * (1.0 + (first + last) / 2 / self.doubling)

    def seconds(self, first: float, last: float) -> float:
        """Return how long tokens `first` to `last` of a prompt take."""
        return self.work(first, last) / self.rate

    def measure(self, work: float, seconds: float) -> None:
        """Learn that so much `work` took so long; the last few seconds of computing count most."""
        if seconds > 0:
            kept = math.exp(-seconds / _MEMORY_SECONDS)
            self._work = self._work * kept + work
            self._seconds = self._seconds * kept + seconds


class TierSpeed:
    """Latency and bandwidth of one tier's loads or stores, in blocks, as the manager sees them at its polls.

    While the engine computes, a poll shows when jobs ended only up to the time since the poll before: the estimate
    moves no further than it must to agree with that.
    """

    def __init__(self, latency: float = 1e-3, bandwidth: float = 1e9) -> None:
        """Args: what to expect before anything is measured, in seconds and blocks per second."""
        self.latency, self.bandwidth = latency, bandwidth
        self.is_measured = False
        self.in_flight = 0
        self._busy_since = self._polled_at = self._gap = 0.0
        self._is_first = True

    def begin(self, num_blocks: int, now: float) -> None:
        """A job has been handed to the tier."""
        if not self.in_flight:
            self._busy_since, self._is_first = now, True
            self._polled_at = max(self._polled_at, now)
        self.in_flight += num_blocks

    def end(self, num_blocks: int, num_moved: int, now: float, *, seen_at_once: bool = True) -> None:
        """What a poll shows to have ended has ended, perhaps some time ago.

        Args:
            num_blocks: those that were in flight; num_moved: those of them that the tier moved: what it refuses, or has
                already, says nothing about speed.
            seen_at_once: the manager looks often; else it may have ended at any time since the poll before.
        """
        self.in_flight = max(0, self.in_flight - num_blocks)
        elapsed = now - self._busy_since
        if num_moved:
            earliest = elapsed if seen_at_once else self._polled_at - self._busy_since
            predicted = (self.latency if self._is_first else 0.0) + num_moved / self.bandwidth
            self._learn(num_moved, max(_MIN_SECONDS, min(max(predicted, earliest), elapsed)))
            self._busy_since, self._is_first = now, False

    def poll(self, now: float) -> None:
        """The manager has looked for results."""
        if self.in_flight:
            self._gap += (min(now - self._polled_at, _LONGEST_GAP) - self._gap) / 4
        self._polled_at = now

    def _learn(self, num_blocks: int, seconds: float) -> None:
        """Take in one sample: the latency shows in a load that began on an idle tier, the bandwidth in all others."""
        if self._is_first and self.is_measured:
            rest = seconds - num_blocks / self.bandwidth
            if rest > 0:
                self.latency += (rest - self.latency) * _WEIGHT
                return
        sample = num_blocks / seconds
        # Speeds differ by factors: the mean of their logarithms forgets a slow moment as fast as a fast one.
        self.bandwidth = self.bandwidth ** (1 - _WEIGHT) * sample**_WEIGHT if self.is_measured else sample
        self.is_measured = True

    def seconds(self, num_blocks: float, now: float) -> float:
        """Return when, from `now` on, all that is in flight and `num_blocks` behind it have arrived.

        What is overdue is taken for a slower tier: it is expected to take as long again as it has taken.
        """
        expected = self.latency + (self.in_flight + num_blocks) / self.bandwidth
        if not self.in_flight:
            return expected
        elapsed = now - self._busy_since
        due = (self.latency if self._is_first else 0.0) + self.in_flight / self.bandwidth
        if elapsed <= due:
            return expected - elapsed
        return expected * elapsed / due

    def window(self) -> float:
        """Return the blocks in flight that keep the tier busy from one poll to the next."""
        return self.bandwidth * (self.latency + 2 * self._gap + _BURST_SECONDS)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an engine has to do beside one request; times in seconds.

    Attributes:
        turn_in: until it could begin to compute the request, if that waits for nothing else.
        idle_in: until it has nothing else to compute: up to then, others go first while the request waits.
        num_behind: requests that wait behind this one, and come earlier by what it does not compute.
    """

    turn_in: float = 0.0
    idle_in: float = 0.0
    num_behind: int = 0

    def cost(self, arrives: float) -> float:
        """Return what it costs that the request's blocks arrive so late, summed over it and those behind it."""
        late, idle = arrives - self.turn_in, arrives - self.idle_in
        return (late if late > 0 else 0.0) + (idle * self.num_behind if idle > 0 else 0.0)

    def gain(self, saved: float) -> float:
        """Return what it is worth that so many seconds of computing are saved, summed likewise."""
        return saved * (1 + self.num_behind)


@dataclass(frozen=True, slots=True)
class Choice:
    """The prefix that makes first tokens earliest; times in seconds.

    Attributes:
        num_blocks: how long it is.
        gain: by how much first tokens come earlier than with everything computed.
    """

    num_blocks: int
    gain: float


HERE = -1
"""In place of a tier's index: the block is ready, or on its way already."""


def choose_prefix(
    sources: Sequence[int],
    saved: Sequence[float],
    ready_in: Mapping[int, float],
    per_block: Mapping[int, float],
    outlook: Outlook,
    stride: int = 1,
    waits_for: float = 0.0,
) -> Choice:
    """Choose how much of a prefix to load.

    Args:
        sources: of each block, index of the tier that it has to come from, or `HERE`.
        saved: of each block, seconds that computing it takes.
        ready_in: per tier, seconds until all that is queued there has arrived, latency included.
        per_block: per tier, seconds per further block.
        stride: only a prefix of a multiple of so many blocks can be used.
        waits_for: seconds that the request waits for other blocks in any case.
    """
    times = dict(ready_in)
    turn_in, idle_in, num_behind = outlook.turn_in, outlook.idle_in, outlook.num_behind
    best, best_gain, gained, arrives = 0, 0.0, outlook.cost(waits_for), waits_for
    cost, worth = gained, outlook.gain(1.0)
    for count, (source, seconds) in enumerate(zip(sources, saved, strict=True), 1):
        gained += seconds * worth
        if source >= 0:
            times[source] = at = times[source] + per_block[source]
            if at > arrives:
                arrives, cost = at, 0.0  # as `Outlook.cost`: this runs once per block
                if at > turn_in:
                    cost = at - turn_in
                if at > idle_in:
                    cost += (at - idle_in) * num_behind
        if gained - cost > best_gain and not count % stride:
            best, best_gain = count, gained - cost
    return Choice(best, best_gain)
