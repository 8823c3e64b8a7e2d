"""Checks that every occupied slot of the primary tier has an owner that will release it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvtier.errors import InvariantError
from kvtier.primary.table import BlockTable
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState


def check_slots(
    table: BlockTable, requests: Iterable[RequestState], stale: Iterable[int], guards: Iterable[TierGuard]
) -> None:
    """Raise InvariantError unless every pin and every filling slot belongs to a request, a job or a stale copy.

    Args:
        stale: slots under device copies from before a reset, one entry per copy.
        guards: of the secondary tiers; their unanswered jobs hold slots.
    """
    pins: Counter[int] = Counter(stale)
    writers: Counter[int] = Counter()
    for state in requests:
        pins.update([*state.copies.loading.values(), *state.lease.slots.values()])
        for running in state.copies.loading_again.values():
            pins.update(running.slots[1:])
        writers.update(slot for _, slot in state.copies.storing.entries())
    for guard in guards:
        for job in guard.jobs.values():
            (writers if job.is_promotion else pins).update(job.slots)
    for slot, count in writers.items():
        if slot not in table.filling:  # quarantined: the table counts the writer as one more pin
            pins[slot] += count
    lost = table.filling - writers.keys()
    if lost:
        raise InvariantError(f"slots {sorted(lost)} are filling, and nobody fills them")
    wrong = sorted(slot for slot in pins.keys() | table.pins.slots if pins[slot] != table.pins.of(slot))
    if wrong:
        raise InvariantError(f"slots {wrong} have other pins than their users")
