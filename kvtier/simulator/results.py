"""Results of a replay: counts, times and their distributions, as plain values that processes can exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kvtier.simulator.rates import DAY, busiest_hour
from kvtier.simulator.setup import DISK, SIMULATED_OPTIONS, Machine, Setup
from kvtier.simulator.trace import Trace

PRIMARY = "primary"
NO_POLICY = "none"
NUM_QUANTILES = 101
NUM_INTERVALS = 60


class Outcome(NamedTuple):
    """The result of one request.

    Attributes:
        time: arrival, seconds.
        num_blocks: blocks of the prompt.
        by_source: number of loaded blocks, by source tier.
        input_tokens: tokens of the prompt.
        saved_tokens: tokens of the prompt that were not computed.
        computing: seconds of the accelerator's time.
        first_token: seconds from the arrival to the first token.
    """

    time: float
    num_blocks: int
    by_source: Mapping[str, int]
    input_tokens: int
    saved_tokens: int
    computing: float
    first_token: float


@dataclass(frozen=True)
class Result:
    """The result of a trace with one configuration.

    Attributes:
        setup: the configuration.
        num_requests, num_accesses: requests, and blocks of all prompts.
        hits: number of loaded blocks, by source tier.
        input_tokens, saved_tokens: tokens of all prompts, and those that were not computed.
        first_token, recompute: seconds to the first token, with offloading and without; `NUM_QUANTILES` evenly spaced
            quantiles, least first.
        loaded_bytes, stored_bytes: bytes copied from host memory to the accelerator, and back.
        promoted_bytes, cascaded_bytes: bytes read from the disk, and written to it.
        computing, recomputing: accelerator seconds per second of the trace, with offloading and without; above 1 the
            accelerator cannot keep up.
        busiest_computing, busiest_recomputing: the same in the busiest hour.
        busiest_written: bytes written to the disk per second, in its busiest hour.
        refused_blocks: blocks that were not written to the disk, by reason.
        gave_up: requests that stopped waiting, by reason.
        evicted_blocks: evicted blocks, by tier.
        timeline: `NUM_INTERVALS` rows of (primary hits, disk hits, misses) in blocks, over `seconds`.
        seconds: duration of the trace.
        replay_seconds: time that the replay itself took.
    """

    setup: Setup
    num_requests: int
    num_accesses: int
    hits: Mapping[str, int]
    input_tokens: int
    saved_tokens: int
    first_token: Sequence[float]
    recompute: Sequence[float]
    loaded_bytes: int
    stored_bytes: int
    promoted_bytes: int
    cascaded_bytes: int
    computing: float
    recomputing: float
    busiest_computing: float
    busiest_recomputing: float
    busiest_written: float
    refused_blocks: Mapping[str, int]
    gave_up: Mapping[str, int]
    evicted_blocks: Mapping[str, int]
    timeline: Sequence[tuple[int, int, int]]
    seconds: float
    replay_seconds: float

    @classmethod
    def of(
        cls,
        trace: Trace,
        setup: Setup,
        machine: Machine,
        outcomes: Sequence[Outcome],
        stats: Mapping[str, float],
        written: Sequence[tuple[float, int]],
        replay_seconds: float,
    ) -> Result:
        """Return the sums of a replay.

        Args:
            stats: the manager's statistics at the end.
            written: (time, bytes) of every store to the disk.
        """
        hits = {PRIMARY: 0, DISK: 0} if setup.disk_blocks else {PRIMARY: 0}
        for outcome in outcomes:
            for source, count in outcome.by_source.items():
                hits[source] = hits.get(source, 0) + count
        seconds = trace.seconds
        computing = sorted((outcome.time, outcome.computing) for outcome in outcomes)
        recomputing = [(one.time, machine.prefill_seconds(0, one.input_tokens)) for one in trace.requests]
        return cls(
            setup=setup,
            num_requests=len(outcomes),
            num_accesses=sum(outcome.num_blocks for outcome in outcomes),
            hits=hits,
            input_tokens=sum(outcome.input_tokens for outcome in outcomes),
            saved_tokens=sum(outcome.saved_tokens for outcome in outcomes),
            first_token=_quantiles([outcome.first_token for outcome in outcomes]),
            recompute=_quantiles(_waits(recomputing)),
            loaded_bytes=sum(hits.values()) * setup.block_bytes,
            stored_bytes=int(stats.get("stored_blocks.device", 0)) * setup.block_bytes,
            promoted_bytes=int(stats.get(f"promoted_bytes.{DISK}", 0)),
            cascaded_bytes=int(stats.get(f"cascaded_bytes.{DISK}", 0)),
            computing=sum(share for _, share in computing) / seconds,
            recomputing=sum(share for _, share in recomputing) / seconds,
            busiest_computing=busiest_hour(computing, seconds),
            busiest_recomputing=busiest_hour(recomputing, seconds),
            busiest_written=busiest_hour(written, seconds),
            refused_blocks=_named(stats, f"refused_blocks.{DISK}."),
            gave_up=_named(stats, "gave_up."),
            evicted_blocks=_named(stats, "evicted_blocks."),
            timeline=_timeline(outcomes, seconds),
            seconds=seconds,
            replay_seconds=replay_seconds,
        )

    def without_offloading(self) -> Result:
        """Return the result of the same requests without memory and disk: every prompt is computed."""
        return replace(
            self,
            setup=replace(self.setup, policy=NO_POLICY, dram_blocks=0, disk_blocks=0),
            hits={PRIMARY: 0},
            saved_tokens=0,
            first_token=self.recompute,
            loaded_bytes=0,
            stored_bytes=0,
            promoted_bytes=0,
            cascaded_bytes=0,
            computing=self.recomputing,
            busiest_computing=self.busiest_recomputing,
            busiest_written=0.0,
            refused_blocks={},
            gave_up={},
            evicted_blocks={},
            timeline=[(0, 0, sum(row)) for row in self.timeline],
            replay_seconds=0.0,
        )

    @property
    def num_hits(self) -> int:
        """Number of loaded blocks, from all tiers."""
        return sum(self.hits.values())

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' blocks that were loaded, 0 to 1."""
        return self.num_hits / max(1, self.num_accesses)

    def share(self, source: str) -> float:
        """Return the share of the prompts' blocks that were loaded from one tier, 0 to 1."""
        return self.hits.get(source, 0) / max(1, self.num_accesses)

    @property
    def drive_writes_a_day(self) -> float | None:
        """Whole writes of the disk per day, on average; None without a disk."""
        return self._drive_writes(self.cascaded_bytes / self.seconds)

    @property
    def busiest_drive_writes_a_day(self) -> float | None:
        """Whole writes of the disk per day if every hour is like the busiest; None without a disk."""
        return self._drive_writes(self.busiest_written)

    def _drive_writes(self, rate: float) -> float | None:
        return rate * DAY / self.setup.disk_bytes if self.setup.disk_bytes else None

    def first_token_at(self, percent: int) -> float:
        """Return a percentile of the time to the first token, in seconds."""
        return self.first_token[percent]

    def recompute_at(self, percent: int) -> float:
        """Return a percentile of the time to the first token without offloading, in seconds."""
        return self.recompute[percent]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        values = asdict(self)
        settings = values["setup"].pop("settings")
        values["setup"] |= {name: settings[name] for name in SIMULATED_OPTIONS}
        values["setup"] |= {
            "admission": self.setup.admission.value,
            "dram_bytes": self.setup.dram_bytes,
            "disk_bytes": self.setup.disk_bytes,
        }
        percentiles = (50, 95, 99)
        return values | {
            "hit_rate": self.hit_rate,
            "drive_writes_a_day": self.drive_writes_a_day,
            "busiest_drive_writes_a_day": self.busiest_drive_writes_a_day,
            "first_token_seconds": {f"p{p}": self.first_token_at(p) for p in percentiles},
            "recompute_seconds": {f"p{p}": self.recompute_at(p) for p in percentiles},
        }


def _waits(computing: Sequence[tuple[float, float]]) -> list[float]:
    """Return the seconds to each request's first token if one accelerator computes all, from (arrival, seconds)."""
    free_at, waits = 0.0, []
    for arrival, seconds in computing:
        free_at = max(free_at, arrival) + seconds
        waits.append(free_at - arrival)
    return waits


def _quantiles(values: Sequence[float]) -> list[float]:
    if not values:
        return [0.0] * NUM_QUANTILES
    found: list[float] = np.quantile(np.asarray(values), np.linspace(0.0, 1.0, NUM_QUANTILES)).tolist()
    return found


def _named(stats: Mapping[str, float], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): int(count) for name, count in stats.items() if name.startswith(prefix)}


def _timeline(outcomes: Sequence[Outcome], seconds: float) -> list[tuple[int, int, int]]:
    rows = [[0, 0, 0] for _ in range(NUM_INTERVALS)]
    for outcome in outcomes:
        row = rows[min(NUM_INTERVALS - 1, int(outcome.time / seconds * NUM_INTERVALS))]
        loaded = sum(outcome.by_source.values())
        primary = outcome.by_source.get(PRIMARY, 0)
        row[0] += primary
        row[1] += loaded - primary
        row[2] += outcome.num_blocks - loaded
    return [(primary, disk, missed) for primary, disk, missed in rows]
