"""Holds all secondary tiers, each behind its guard."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kvtier.abc import SecondaryTierManager
from kvtier.clock import Clock
from kvtier.events import Observer, TierState
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.metrics.counters import tier_readings
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.settings import TieringSettings
from kvtier.types import (
    Admission,
    OffloadingEvent,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    TierFilter,
)


class SecondaryTiers:
    """The guards, in the order in which tiers are asked, and the operations on all of them."""

    def __init__(
        self,
        tiers: Sequence[SecondaryTierManager],
        names: Sequence[str] | None,
        admissions: Sequence[Admission] | None,
        probe_deadlines: Sequence[float | None] | None,
        settings: TieringSettings,
        clock: Clock,
        observer: Observer,
        num_slots: int,
        block_bytes: int,
    ) -> None:
        """Args: num_slots, block_bytes: of the primary tier."""
        rules = zip(
            tiers,
            names or _distinct(tiers),
            admissions or [Admission.ALWAYS] * len(tiers),
            probe_deadlines or [None] * len(tiers),
            strict=True,
        )
        self._settings = settings
        job_ids = itertools.count()
        self.guards: list[TierGuard] = [
            TierGuard(
                tier,
                index,
                name,
                admission,
                clock,
                observer,
                job_ids,
                settings.tier_deadline,
                settings.probe_deadline if probe_deadline is None else probe_deadline,
                num_slots,
                block_bytes,
            )
            for index, (tier, name, admission, probe_deadline) in enumerate(rules)
        ]
        self.all_indices = tuple(range(len(self.guards)))

    def __len__(self) -> int:
        return len(self.guards)

    def __iter__(self) -> Iterator[TierGuard]:
        return iter(self.guards)

    def __getitem__(self, index: int) -> TierGuard:
        return self.guards[index]

    def allowed(self, tier_filter: TierFilter) -> tuple[int, ...]:
        """Return the indices of the tiers that a request with this filter may load from."""
        return tuple(g.index for g in self.guards if tier_filter.allows(g.tier.medium, g.tier.locality))

    def announce(self, req_context: ReqContext) -> tuple[int, ...]:
        """Tell every tier of a request; return the indices of those that want all of its blocks."""
        answers = [guard.begin_request(req_context) for guard in self.guards]
        return tuple([guard.index for guard, answer in zip(self.guards, answers, strict=True) if _wants_all(answer)])

    def forget(self, req_context: ReqContext) -> None:
        """Tell every tier that a request is over."""
        for guard in self.guards:
            guard.forget_request(req_context)

    def touch(self, keys: list[OffloadKey], req_context: ReqContext) -> None:
        """Report a use of `keys` to every usable tier."""
        for guard in self.guards:
            if guard.usable:
                guard.tell("touch", guard.tier.touch, keys.copy(), req_context)

    def end_step(self, context: ScheduleEndContext) -> None:
        """Tell every tier that a step is over."""
        for guard in self.guards:
            guard.tell("on_schedule_end", guard.tier.on_schedule_end, context)

    def has_live_cascade(self, now: float) -> bool:
        """Return whether any tier has unanswered stores and makes progress."""
        return any(guard.has_live_cascade(now) for guard in self.guards)

    def drain(self) -> None:
        """Wait, at most `drain_timeout`, until the tiers touch no primary memory.

        A tier that takes longer is not called until its drain has ended.
        """
        for guard in self.guards:
            guard.begin_drain()
        calls = [(guard.name, guard.drain) for guard in self.guards]
        for guard, thread in zip(self.guards, _run_bounded(calls, self._settings.drain_timeout), strict=True):
            guard.busy_with(thread)

    def start_epoch(self, epoch: bytes) -> None:
        """Make every block stored so far miss."""
        for guard in self.guards:
            guard.start_epoch(epoch)

    def shutdown(self) -> None:
        """End all tiers, within `drain_timeout`."""
        _run_bounded([(guard.name, guard.shutdown) for guard in self.guards], self._settings.drain_timeout)

    def take_events(self) -> list[OffloadingEvent]:
        """Return the tiers' KV events since the last call."""
        return [event for guard in self.guards for event in guard.take_events()]

    def stats(self) -> dict[str, float]:
        """Return metrics of the tiers and their guards, named as in `get_stats`. A guard's value replaces a tier's."""
        stats: dict[str, float] = {}
        for guard in self.guards:
            stats |= tier_readings(guard.name, guard.readings())
        return stats

    def states(self) -> dict[str, tuple[TierState, str]]:
        """Return state and reason of every tier, by name."""
        return {guard.name: guard.describe() for guard in self.guards}

    def check_invariants(self) -> None:
        """Raise InvariantError if a guard or its tier contradicts itself."""
        for guard in self.guards:
            guard.check_invariants()


def _wants_all(answer: object) -> bool:
    """Return whether a tier wants every block of a request, prefix hits included."""
    return isinstance(answer, RequestOffloadingContext) and answer.policy is OffloadPolicy.REQUEST_LEVEL


def _distinct(tiers: Sequence[SecondaryTierManager]) -> list[str]:
    types = [tier.tier_type for tier in tiers]
    return [name if types.count(name) == 1 else f"{name}-{index}" for index, name in enumerate(types)]


def _run_bounded(calls: Sequence[tuple[str, Callable[[], object]]], timeout: float) -> list[threading.Thread | None]:
    """Run all calls at once and wait for them together.

    Args:
        calls: (name for the log, what to call); a call that raises is logged and counts as ended.
        timeout: longest wait, in seconds of real time.

    Returns:
        Per call, None if it ended, else the daemon thread that is still in it.
    """
    threads = [threading.Thread(target=_logged, args=call, name=f"kvtier-end-{call[0]}", daemon=True) for call in calls]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread if thread.is_alive() else None for thread in threads]


def _logged(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        logger.exception("tier %s failed at its end", name)
