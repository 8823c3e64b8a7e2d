"""Estimates when blocks arrive from a tier, how long computing them takes, and which prefix is worth loading.

Pure arithmetic on measurements: it uses no clock, no tier and no request.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GUESSED_RATE = 10_000.0
"""Assumed tokens per second of an engine that is not measured yet. The value is high, so that requests wait little."""
DOUBLING_TOKENS = 32_768.0
"""Context length at which a token takes twice as long as the first one: attention then needs as many multiplications
as the rest of the model. It is 12,000 to 53,000 tokens in models of 0.5 to 70 billion parameters."""
_MEMORY_SECONDS = 5.0
"""Seconds of computing after which an earlier measurement weighs 1/e, about a third."""
_WEIGHT = 0.5
"""Weight of a new sample against all earlier ones."""
_FIRST_DOUBT = 9.0
"""Variance of the logarithm of a value that is guessed: it may be wrong by a factor of 20, and seldom of more."""
_NOISE = 0.1
"""The same of one sample: jobs of one size take a third more or less."""
_FADING = _NOISE / 2
"""By how much each sample widens the doubt in what it shows, so that this is about as certain as one sample."""
_ITERATIONS = 4
"""Steps in which latency and transfer come close enough to their sum, whichever was the larger part before."""
_LONGEST_GAP = 2.0
"""Most seconds between two polls that count. An idle engine does not poll."""
_SHORT_GAP = 0.1
"""Seconds between two polls from which on a job is not taken to have ended just before the later one: the engine may
have been idle, or busy outside."""
_CONTRADICTION = 4.0
"""Jobs of which one took so many times as long as the other, by what was expected of each, belong to one burst.
Throttled devices let some bytes pass at once, and others wait, often a tenth of a second: if each job were a sample,
there would be some very slow and many very fast ones, and the tier would seem far faster than it is."""
_BURST_SECONDS_MOVING, _BURST_SECONDS_IN_ALL = 0.25, 1.0
"""Longest burst, without and with the time between its jobs. What contradicts a longer time, or an earlier one, shows
that the tier has changed."""
_MIN_SECONDS = 1e-6
"""Least duration of a job. Two readings of a clock may be equal."""
_PROBE_AFTER = 10.0
"""Least seconds of an engine at work without a measurement before a probe. A tier that seems too slow is not asked for
anything that a request waits for, so that only a probe can correct its estimate."""
_PROBE_SHARE = 0.02
"""Most of a tier's time that probes may take: it may have to store, or to serve other engines."""
_BURST_SECONDS = 0.05
"""Seconds of further work that a tier is given, beyond its latency and the time between polls."""


class PrefillSpeed:
    """How fast the engine computes tokens. A token takes longer the more tokens precede it."""

    def __init__(self, rate: float = GUESSED_RATE, doubling: float = DOUBLING_TOKENS) -> None:
        """Args: rate: tokens per second in an empty context; doubling: context length that doubles a token's time."""
        self.doubling = doubling
        # The given rate weighs as much as one second of measurement.
        self._work, self._seconds = rate, 1.0

    @classmethod
    def through(cls, measured: Sequence[tuple[float, float]]) -> PrefillSpeed:
        """Return the speed that fits the measurements best.

        Args:
            measured: (tokens in a prompt, tokens per second over the whole prompt), of at least two different lengths.

        Raises:
            ValueError: no speed fits. Longer prompts take less time per token, or the line through the measurements
                gives a token in an empty context no time.
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
        """Learn that `work` took `seconds`. The last few seconds of computing count most."""
        if seconds > 0:
            kept = math.exp(-seconds / _MEMORY_SECONDS)
            self._work = self._work * kept + work
            self._seconds = self._seconds * kept + seconds


class _Expected(NamedTuple):
    """What is known of a tier: latency in seconds, bandwidth in blocks per second, and how certain both are.

    Attributes:
        doubt: variances of the logarithms of latency and of the seconds per block, and their covariance.
    """

    latency: float
    bandwidth: float
    is_measured: bool = False
    doubt: tuple[float, float, float] = (_FIRST_DOUBT, _FIRST_DOUBT, 0.0)

    def seconds(self, num_starts: int, num_blocks: float) -> float:
        """Return how long `num_blocks` take of which the first comes after the latency, so many times."""
        return num_starts * self.latency + num_blocks / self.bandwidth

    def with_sample(self, num_starts: int, num_blocks: int, seconds: float) -> _Expected:
        """Return what is known after one more sample.

        A sample shows the sum of latency and transfer, and the estimate of the sum moves by a factor, so that slow and
        fast samples fade equally fast. Of the two, the one that is less certain changes more, as in a Kalman filter
        over their logarithms: once large jobs have shown the bandwidth, a small one shows the latency.
        """
        latency, transfer = num_starts * self.latency, num_blocks / self.bandwidth
        change = math.log(seconds / (latency + transfer)) * (_WEIGHT if self.is_measured else 1.0)
        goal = math.log(latency + transfer) + change
        of_latency, of_transfer, common = self.doubt
        slower_start = slower_transfer = 0.0  # logarithms of the factors
        for _ in range(_ITERATIONS):
            starts, moves = latency * math.exp(slower_start), transfer * math.exp(slower_transfer)
            share, rest = starts / (starts + moves), moves / (starts + moves)
            by_latency, by_transfer = of_latency * share + common * rest, common * share + of_transfer * rest
            known = share * by_latency + rest * by_transfer
            missing = goal - math.log(starts + moves) + share * slower_start + rest * slower_transfer
            slower_start, slower_transfer = by_latency * missing / known, by_transfer * missing / known
        variance, fading = known + _NOISE, _FADING / (share * share + rest * rest)
        doubt = (
            of_latency - by_latency * by_latency / variance + fading * share * share,
            of_transfer - by_transfer * by_transfer / variance + fading * rest * rest,
            common - by_latency * by_transfer / variance + fading * share * rest,
        )
        return _Expected(self.latency * math.exp(slower_start), self.bandwidth / math.exp(slower_transfer), True, doubt)


@dataclass(slots=True)
class _Burst:
    """Jobs of which the times contradict each other: together they are one sample.

    Attributes:
        before: what was expected before it.
        began: when its first job had ended. A stall is not remembered for longer than a moment: a tier that seems too
            slow has few jobs.
    """

    before: _Expected
    began: float
    num_starts: int = 0
    num_moved: int = 0
    seconds: float = 0.0

    def includes(self, num_starts: int, num_moved: int, seconds: float, now: float) -> bool:
        """Return whether blocks that have come `now` belong to it."""
        if self.seconds + seconds > _BURST_SECONDS_MOVING or now - self.began > _BURST_SECONDS_IN_ALL:
            return False
        slowness = seconds / self.before.seconds(num_starts, num_moved)
        own = self.seconds / self.before.seconds(self.num_starts, self.num_moved)
        return max(slowness, own) > _CONTRADICTION * min(slowness, own)

    def add(self, num_starts: int, num_moved: int, seconds: float) -> None:
        self.num_starts += num_starts
        self.num_moved += num_moved
        self.seconds += seconds


class TierSpeed:
    """Latency and bandwidth of one tier's loads or stores, in blocks, as the manager sees them at its polls.

    While the engine computes, polls are far apart. A poll then shows only that a job ended at some time since the
    previous poll. The estimate moves no further than it must to agree with that.
    """

    def __init__(self, latency: float = 1e-3, bandwidth: float = 1e9) -> None:
        """Args: what to expect before anything is measured, in seconds and blocks per second, both above 0."""
        self._expected = _Expected(latency, bandwidth)
        self._burst: _Burst | None = None
        self.in_flight = 0
        self._busy_since = self._polled_at = self._gap = self._unmeasured = 0.0
        self._is_first = True

    @property
    def latency(self) -> float:
        """Seconds until the first block of a job arrives, less its transfer."""
        return self._expected.latency

    @property
    def bandwidth(self) -> float:
        """Blocks per second."""
        return self._expected.bandwidth

    @property
    def is_measured(self) -> bool:
        """Whether a job has ended."""
        return self._expected.is_measured

    def begin(self, num_blocks: int, now: float) -> None:
        """Count the blocks of a job that the tier has been given."""
        if not self.in_flight:
            self._busy_since, self._is_first = now, True
            self._polled_at = max(self._polled_at, now)
        self.in_flight += num_blocks

    def end(self, num_blocks: int, num_moved: int, now: float, *, seen_at_once: bool = True) -> None:
        """Learn from jobs that a poll has shown to be over.

        Args:
            num_blocks: their blocks; num_moved: those of them that the tier moved. Blocks that it refused, or had
                already, say nothing about its speed.
            seen_at_once: the engine computes nothing that keeps it from polling. If it does, or if the previous poll
                was long ago, the jobs may have ended any time since that poll.
        """
        seen_at_once = seen_at_once and now - self._polled_at <= _SHORT_GAP
        self.in_flight = max(0, self.in_flight - num_blocks)
        self._unmeasured = 0.0  # whether blocks moved or not, the next probe has time
        if num_moved:
            elapsed, num_starts = now - self._busy_since, int(self._is_first)
            earliest = elapsed if seen_at_once else self._polled_at - self._busy_since
            expected = self._expected.seconds(num_starts, num_moved)
            self._learn(num_starts, num_moved, max(_MIN_SECONDS, min(max(expected, earliest), elapsed)), now)
            self._busy_since, self._is_first = now, False

    def _learn(self, num_starts: int, num_moved: int, seconds: float, now: float) -> None:
        """Learn how long it took to move blocks that have come `now`."""
        burst = self._burst
        if burst is None or not burst.includes(num_starts, num_moved, seconds, now):
            burst = self._burst = _Burst(self._expected, now)
        burst.add(num_starts, num_moved, seconds)
        self._expected = burst.before.with_sample(burst.num_starts, burst.num_moved, burst.seconds)

    def poll(self, now: float) -> None:
        """Note that the manager has polled the tier."""
        gap = min(now - self._polled_at, _LONGEST_GAP)
        if self.in_flight:
            self._gap += (gap - self._gap) / 4
        else:
            self._unmeasured += gap
        self._polled_at = now

    def needs_probe(self, num_blocks: int) -> bool:
        """Return whether a probe of `num_blocks` is due. Idle time of the engine does not count: nobody polls then."""
        pause = max(_PROBE_AFTER, (self.latency + num_blocks / self.bandwidth) / _PROBE_SHARE)
        return not self.in_flight and self._unmeasured >= pause

    def seconds(self, num_blocks: float, now: float) -> float:
        """Return the seconds from `now` until all blocks in flight and `num_blocks` more have arrived.

        If the blocks in flight are overdue, the tier is taken to be slower by the factor of their delay.
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
        """Return how many blocks in flight keep the tier busy from one poll to the next."""
        return self.bandwidth * (self.latency + 2 * self._gap + _BURST_SECONDS)


class Turnover:
    """How long the engine computes until it has loaded as many blocks from memory as memory has slots.

    In this time a slot brings one hit on average. A promoted block that waits longer for its one load costs more hits
    than it is.

    Attributes:
        seconds: infinity until there have been two loads.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._loaded_at: float | None = None
        self.seconds = math.inf

    def note_load(self, num_blocks: int, computed: float) -> None:
        """Note that the engine loads blocks. The last ones, about as many as there are slots, count most.

        Args:
            computed: seconds that the engine has computed so far. The time in which it is idle does not count, since
                what requests wait for is computing.
        """
        if not num_blocks:
            return
        if self._loaded_at is not None:
            elapsed, share = computed - self._loaded_at, min(1.0, num_blocks / self._num_slots)
            before = elapsed / share if self.seconds == math.inf else self.seconds
            self.seconds = before * (1.0 - share) + elapsed
        self._loaded_at = computed


class Outlook(NamedTuple):
    """What an engine has to do besides one request; times in seconds.

    Attributes:
        turn_in: until the engine could begin to compute the request, if the request waited for nothing.
        idle_in: until the engine has nothing else to compute. Before that, it computes others while the request waits.
        num_behind: requests behind this one. They start earlier by the time that this one is not computed.
    """

    turn_in: float = 0.0
    idle_in: float = 0.0
    num_behind: int = 0

    def cost(self, arrives: float) -> float:
        """Return the delay if the blocks arrive in `arrives` seconds, summed over the request and those behind it."""
        late, idle = arrives - self.turn_in, arrives - self.idle_in
        return (late if late > 0 else 0.0) + (idle * self.num_behind if idle > 0 else 0.0)

    def gain(self, saved: float) -> float:
        """Return the time won if `saved` seconds need not be computed, summed over the same requests."""
        return saved * (1 + self.num_behind)


@dataclass(frozen=True, slots=True)
class Choice:
    """The prefix with which first tokens come earliest.

    Attributes:
        num_blocks: its length.
        gain: seconds by which first tokens come earlier than if everything were computed, summed over the request
            and those behind it.
    """

    num_blocks: int
    gain: float


HERE = -1
"""Used in place of a tier's index: no tier has to be asked for the block."""


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
        sources: per block, index of the tier that it has to come from, or `HERE`.
        saved: per block, seconds that computing it takes; none less than the block before.
        ready_in: per tier, seconds until everything queued there has arrived, latency included.
        per_block: per tier, seconds per further block.
        stride: the length of a usable prefix is a multiple of this.
        waits_for: seconds that the request waits for other blocks in any case.
    """
    if sources and sources[0] >= 0 and sources.count(sources[0]) == len(sources):
        begins, each = ready_in[sources[0]], per_block[sources[0]]
        return _choose_corner(saved, begins, each, outlook, stride, waits_for)
    times = dict(ready_in)
    turn_in, idle_in, num_behind = outlook.turn_in, outlook.idle_in, outlook.num_behind
    best, best_gain, gained, arrives = 0, 0.0, outlook.cost(waits_for), waits_for
    cost, worth = gained, outlook.gain(1.0)
    for count, (source, seconds) in enumerate(zip(sources, saved, strict=True), 1):
        gained += seconds * worth
        if source >= 0:
            times[source] = at = times[source] + per_block[source]
            if at > arrives:
                arrives, cost = at, 0.0  # `Outlook.cost`, inlined because this runs once per block
                if at > turn_in:
                    cost = at - turn_in
                if at > idle_in:
                    cost += (at - idle_in) * num_behind
        if gained - cost > best_gain and not count % stride:
            best, best_gain = count, gained - cost
    return Choice(best, best_gain)


def _choose_corner(
    saved: Sequence[float], begins: float, each: float, outlook: Outlook, stride: int, waits_for: float
) -> Choice:
    """Choose as `choose_prefix` does among blocks that all come from one tier, in a time that hardly grows with them.

    Between two moments at which a block's arrival begins to cost more, the cost grows evenly, and the gain grows evenly
    or faster. So the best length ends just before or just behind such a moment, or is the longest.
    """
    longest = len(saved) // stride * stride
    counts = {stride, longest}
    for moment in (waits_for, outlook.turn_in, outlook.idle_in):
        if math.isfinite(moment):
            in_time = int(max(0.0, moment - begins) / each) // stride * stride
            counts.update((in_time, in_time + stride))
    best, best_gain, cost, worth = 0, 0.0, outlook.cost(waits_for), outlook.gain(1.0)
    for count in sorted(counts):
        if 0 < count <= longest:
            gain = worth * sum(saved[:count]) + cost - outlook.cost(max(waits_for, begins + count * each))
            if gain > best_gain:
                best, best_gain = count, gain
    return Choice(best, best_gain)
