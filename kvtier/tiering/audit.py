"""Accounts for every slot of the primary tier that is not free: somebody must be there who will let go of it."""

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
        stale: slots under device copies from before a reset, once for each copy.
        guards: of the tiers, with the jobs that they have not answered.
    """
    pins: Counter[int] = Counter(stale)
    writers: Counter[int] = Counter()
    for state in requests:
        pins.update([*state.copies.loading.values(), *state.lease.slots.values()])
        pins.update(slot for _, slot in state.copies.loading_again)
        writers.update(state.copies.storing.values())
    for guard in guards:
        for job in guard.jobs.values():
            (writers if job.is_promotion else pins).update(job.slots)
    for slot, count in writers.items():
        if slot not in table.filling:  # in quarantine, where the writer's pin is a counted one
            pins[slot] += count
    lost = table.filling - writers.keys()
    if lost:
        raise InvariantError(f"slots {sorted(lost)} are filling, and nobody fills them")
    if pins != table.pins:
        wrong = sorted(slot for slot in pins.keys() | table.pins.keys() if pins[slot] != table.pins.get(slot, 0))
        raise InvariantError(f"slots {wrong} have other pins than their users")
