"""What a recorded engine did over time: where blocks came from, and which came back after host memory had evicted them.

`again` makes the recorded calls; this follows what they lead to. A recording does not say what secondary tiers evicted,
only what they no longer had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvtier.events import BlocksEvicted, BlocksLoaded, BlocksStored, CacheReset, Event, RequestGaveUp
from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.recording.format import NewRequest, Record
from kvtier.simulator.results import NUM_INTERVALS, PRIMARY

COMPUTED = "computed"


class Return(NamedTuple):
    """A block that was needed again after host memory had evicted it.

    Attributes:
        time: when it was there again, seconds since the first request.
        away: seconds since its eviction.
        source: the tier that it came from, or `COMPUTED`.
    """

    time: float
    away: float
    source: str


@dataclass
class _Request:
    """A recorded request.

    Attributes:
        time: of its first lookup, or of its arrival.
        new: what the engine said of it.
        keys: blocks that it looked up or stored, by KV group.
        by_source: loaded blocks, by tier.
    """

    time: float
    new: NewRequest
    asked: bool = False
    keys: dict[bytes, set[OffloadKey]] = field(default_factory=dict)
    by_source: Counter[str] = field(default_factory=Counter)

    def note(self, keys: Sequence[OffloadKey]) -> None:
        for key in keys:
            self.keys.setdefault(key[-GROUP_BYTES:], set()).add(key)

    def ended(self, tokens_per_block: int) -> Served:
        """Return the sums. Of each KV group as many blocks count as the prompt fills; the answer's do not."""
        told = self.new.num_prompt_tokens
        most = None if told is None else told // tokens_per_block
        asked = sum(len(keys) if most is None else min(most, len(keys)) for keys in self.keys.values())
        return Served(self.time, max(0, asked - self.by_source.total()), dict(self.by_source))


class Served(NamedTuple):
    """A request that was looked up: its blocks that were computed, and those that were loaded, by tier."""

    time: float
    num_computed: int
    by_source: Mapping[str, int]


class LiveRun:
    """Follows a recording; give it each record before it is repeated, and every event.

    Attributes:
        served: the requests that have ended.
        returns: blocks that came back after an eviction from host memory.
        num_evicted: blocks that host memory evicted.
        gave_up: blocks for which requests stopped waiting, by reason.
        saved_tokens, saved_seconds: tokens that were loaded instead of computed, and an estimate of the time for them.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.served: list[Served] = []
        self.returns: list[Return] = []
        self.num_evicted = 0
        self.gave_up: Counter[str] = Counter()
        self.saved_tokens, self.saved_seconds = 0, 0.0
        self._tokens_per_block = tokens_per_block
        self._started: float | None = None
        self._now = 0.0
        self._live: dict[int, _Request] = {}
        self._evicted: dict[OffloadKey, float] = {}

    def on_record(self, record: Record) -> None:
        """Learn what a request asks for.

        Raises:
            struct.error: the record is damaged.
        """
        if self._started is None and record.kind == b"N":
            self._started = record.time
        self._now = 0.0 if self._started is None else record.time - self._started
        if record.kind == b"N":
            self._live[record.request] = _Request(self._now, NewRequest.of(record.extra))
        elif record.kind == b"E":
            self._end(record.request)
        elif record.kind in b"LS" and (request := self._live.get(record.request)) is not None:
            if not request.asked:
                request.asked, request.time = True, self._now
            request.note(record.keys)

    def on_event(self, event: Event) -> None:
        """Count what the repeated manager reports."""
        match event:
            case BlocksLoaded(req_id, by_source, num_tokens, seconds):
                if (request := self._live.get(int(req_id))) is not None:
                    request.by_source.update(by_source)
                self.saved_tokens += num_tokens
                self.saved_seconds += seconds
            case BlocksEvicted("primary", keys):
                self.num_evicted += len(keys)
                self._evicted.update(dict.fromkeys(keys, self._now))
            case BlocksStored(keys, source):
                for key in keys:
                    if (since := self._evicted.pop(key, None)) is not None:
                        self.returns.append(Return(self._now, self._now - since, source or COMPUTED))
            case RequestGaveUp(_, reason, num_blocks):
                self.gave_up[reason] += num_blocks
            case CacheReset():  # no memory, however large, would have kept them
                self._evicted.clear()

    def close(self) -> None:
        """End the requests that the recording leaves open."""
        for number in list(self._live):
            self._end(number)

    def _end(self, number: int) -> None:
        request = self._live.pop(number, None)
        if request is not None and request.keys:
            self.served.append(request.ended(self._tokens_per_block))

    @property
    def seconds(self) -> float:
        """Time from the first request to the last record, at least a microsecond."""
        return max(1e-6, self._now)

    @property
    def loaded(self) -> Counter[str]:
        """Loaded blocks, by tier."""
        return sum((Counter(one.by_source) for one in self.served), Counter())

    @property
    def num_computed(self) -> int:
        """Blocks of prompts that were computed."""
        return sum(one.num_computed for one in self.served)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' blocks that were loaded, 0 to 1."""
        loaded = self.loaded.total()
        return loaded / max(1, loaded + self.num_computed)

    @property
    def sources(self) -> list[str]:
        """The tiers that blocks came from, host memory first."""
        names = {*self.loaded, *(one.source for one in self.returns)} - {COMPUTED}
        return sorted(names | {PRIMARY}, key=lambda name: (name != PRIMARY, name))

    def timeline(self) -> list[tuple[float, Mapping[str, int]]]:
        """Return (middle of an interval in seconds, blocks by source, `COMPUTED` among them) for intervals with any."""
        rows = [Counter[str]() for _ in range(NUM_INTERVALS)]
        for one in self.served:
            rows[self._interval(one.time)].update({**one.by_source, COMPUTED: one.num_computed})
        return self._in_time(rows)

    def returned(self) -> list[tuple[float, Mapping[str, int]]]:
        """Return the same of the blocks that came back; intervals without any are there, too."""
        rows = [Counter[str]() for _ in range(NUM_INTERVALS)]
        for one in self.returns:
            rows[self._interval(one.time)][one.source] += 1
        return self._in_time(rows, with_empty=True)

    def _interval(self, time: float) -> int:
        return min(NUM_INTERVALS - 1, int(time / self.seconds * NUM_INTERVALS))

    def _in_time(self, rows: Sequence[Counter[str]], with_empty: bool = False) -> list[tuple[float, Mapping[str, int]]]:
        step = self.seconds / NUM_INTERVALS
        return [((index + 0.5) * step, row) for index, row in enumerate(rows) if with_empty or row.total()]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values; times are seconds since the first request."""
        return {
            "seconds": self.seconds,
            "requests": len(self.served),
            "hit_rate": self.hit_rate,
            "loaded_blocks": dict(self.loaded),
            "computed_blocks": self.num_computed,
            "saved_tokens": self.saved_tokens,
            "saved_seconds": self.saved_seconds,
            "evicted_blocks": self.num_evicted,
            "returned_blocks": dict(Counter(one.source for one in self.returns)),
            "gave_up_blocks": dict(self.gave_up),
            "timeline": [{"time": at, **row} for at, row in self.timeline()],
        }
