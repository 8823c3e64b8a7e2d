"""What a person wants to know of an engine, from two samples of its metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvtier.cli.watching.exposition import Sample

PRIMARY = "primary"
DEVICE = "device"


@dataclass(frozen=True)
class TierFigures:
    """One tier in the time between two samples.

    Attributes:
        is_up: None if the engine does not tell; host memory is always up.
        hit_share: of the blocks that were hit or computed, those that came from here, 0 to 1; None if there were none.
        fill: bytes held by capacity, 0 to 1; None if unknown.
        in_flight: blocks on their way up, and down.
        failed: blocks per second that the tier could not serve or store, by cause; absent ones are misses.
    """

    name: str
    is_up: bool | None
    hit_share: float | None
    hit_blocks_per_second: float
    read_bytes_per_second: float
    written_bytes_per_second: float
    fill: float | None
    capacity_bytes: float | None
    in_flight: tuple[float, float]
    wanted_again_per_second: float
    failed: dict[str, float]


@dataclass(frozen=True)
class Figures:
    """An engine in the time between two samples.

    Attributes:
        seconds: between the samples.
        off: why kvtier is off altogether; "" if it is not.
        saved_seconds_per_second: estimated seconds of computing that hits save per second.
        waits: requests per second that waited for tiers, by how they went on.
        mean_wait: seconds; None if no request waited.
    """

    seconds: float
    off: str
    saved_tokens_per_second: float
    saved_seconds_per_second: float
    waits: dict[str, float]
    mean_wait: float | None
    gave_up: dict[str, float]
    errors: float
    tiers: tuple[TierFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def figures_of(before: Sample, now: Sample) -> Figures:
    """Return what happened between two samples of one engine; a restart in between counts from zero."""
    seconds = max(now.seconds - before.seconds, 1e-9)

    def rates(name: str, label: str) -> dict[str, float]:
        then = before.by(name, label)
        return {key: _grown(value, then.get(key, 0.0)) / seconds for key, value in now.by(name, label).items()}

    def rate(name: str) -> float:
        return _grown(now.total(name), before.total(name)) / seconds

    waited = rate("wait_seconds_count")
    return Figures(
        seconds=seconds,
        off=next((reason for reason, value in now.by("off", "reason").items() if value), ""),
        saved_tokens_per_second=rate("saved_tokens_total"),
        saved_seconds_per_second=rate("saved_seconds_total"),
        waits=rates("wait_seconds_count", "outcome"),
        mean_wait=rate("wait_seconds_sum") / waited if waited else None,
        gave_up=rates("requests_gave_up_total", "reason"),
        errors=now.total("errors_total") + now.total("unexpected_calls_total"),
        tiers=tuple(_tier(name, before, now, seconds) for name in _names(now)),
    )


def _names(now: Sample) -> list[str]:
    """Return the tiers from the top down, as far as the names tell."""
    names = {name for series in ("capacity_bytes", "tier_up", "hit_blocks_total") for name in now.by(series, "tier")}
    return sorted(names, key=lambda name: (name != PRIMARY, name))


def _tier(name: str, before: Sample, now: Sample, seconds: float) -> TierFigures:
    def rate(series: str) -> float:
        return _grown(now.by(series, "tier").get(name, 0.0), before.by(series, "tier").get(name, 0.0)) / seconds

    def value(series: str) -> float | None:
        return now.by(series, "tier").get(name)

    hits = _grown(now.total("hit_blocks_total"), before.total("hit_blocks_total"))
    computed = _grown(*(sample.by("stored_blocks_total", "source").get(DEVICE, 0.0) for sample in (now, before)))
    up, held, capacity = value("tier_up"), value("bytes"), value("capacity_bytes")
    return TierFigures(
        name=name,
        is_up=True if name == PRIMARY else None if up is None else up > 0,
        hit_share=rate("hit_blocks_total") * seconds / (hits + computed) if hits + computed else None,
        hit_blocks_per_second=rate("hit_blocks_total"),
        read_bytes_per_second=rate("read_bytes_total"),
        written_bytes_per_second=rate("written_bytes_total"),
        fill=held / capacity if held is not None and capacity else None,
        capacity_bytes=capacity,
        in_flight=(value("load_blocks_in_flight") or 0.0, value("store_blocks_in_flight") or 0.0),
        wanted_again_per_second=rate("recomputed_blocks_total"),
        failed=_failures(name, before, now, seconds),
    )


def _failures(name: str, before: Sample, now: Sample, seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for (series, labels), value in now.values.items():
        label = dict(labels)
        if series == "failed_blocks_total" and label.get("tier") == name and label.get("cause") != "absent":
            grown = _grown(value, before.values.get((series, labels), 0.0))
            if grown:
                found[label["cause"]] = found.get(label["cause"], 0.0) + grown / seconds
    return found


def _grown(now: float, before: float) -> float:
    """Return by how much a counter grew; it starts at 0 when an engine starts again."""
    return now - before if now >= before else now
