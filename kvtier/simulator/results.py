"""What a replay found out: counts, times and their distributions; plain values that travel between processes."""

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
    """What one request got.

    Attributes:
        time: of its arrival, seconds.
        num_blocks: blocks it asked for; by_source: those it loaded, by the tier they came from.
        input_tokens: its prompt; saved_tokens: those of them that it did not compute.
        computing: seconds that the accelerator computes for it.
        first_token: seconds until its first token.
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
    """What one configuration made of a trace.

    Attributes:
        setup: the configuration.
        num_requests, num_accesses: requests, and blocks they asked for.
        hits: blocks loaded, by the tier they came from.
        input_tokens, saved_tokens: of all prompts.
        first_token, recompute: seconds to the first token, with kvtier and without; `NUM_QUANTILES` evenly spaced
            quantiles, least first.
        loaded_bytes, stored_bytes: between accelerator and host memory.
        promoted_bytes, cascaded_bytes: from and to the disk.
        computing, recomputing: share of the time that the accelerator computes prompts, with kvtier and without;
            busiest_computing, busiest_recomputing: the same in the busiest hour.
        busiest_written: bytes written to the disk per second of its busiest hour.
        refused_blocks: not written to the disk, by reason; gave_up: requests that stopped waiting, by reason.
        evicted_blocks: by tier.
        timeline: `NUM_INTERVALS` rows of (primary hits, disk hits, misses), blocks, over `seconds`.
        seconds: span of the trace; replay_seconds: what the replay took.
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
        """Sum up what requests got, what the manager counted, and the (time, bytes) that were written to the disk."""
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
        """Return what the same requests get where nothing is kept: no memory, no disk, every prompt computed."""
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
        """Blocks loaded, wherever from."""
        return sum(self.hits.values())

    @property
    def hit_rate(self) -> float:
        """Share of the blocks asked for that were loaded, 0 to 1."""
        return self.num_hits / max(1, self.num_accesses)

    def share(self, source: str) -> float:
        """Return the share of the blocks asked for that came from one tier, 0 to 1."""
        return self.hits.get(source, 0) / max(1, self.num_accesses)

    @property
    def drive_writes_a_day(self) -> float | None:
        """How often a day the disk is written whole if the trace goes on like this; None without a disk."""
        return self._drive_writes(self.cascaded_bytes / self.seconds)

    @property
    def busiest_drive_writes_a_day(self) -> float | None:
        """The same if every hour is like the busiest one."""
        return self._drive_writes(self.busiest_written)

    def _drive_writes(self, rate: float) -> float | None:
        return rate * DAY / self.setup.disk_bytes if self.setup.disk_bytes else None

    def first_token_at(self, percent: int) -> float:
        """Return a percentile of the seconds to the first token."""
        return self.first_token[percent]

    def recompute_at(self, percent: int) -> float:
        """Return a percentile of the seconds to the first token where everything is computed."""
        return self.recompute[percent]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: all of the above."""
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
    """Return each request's seconds to its first token where one accelerator computes all, of (arrival, seconds)."""
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
