"""Applies hints to a table. Before the first hint, the table's policy is left as it is, so hints cost nothing."""

from __future__ import annotations

from typing import Protocol

from kvtier.abc import EvictionPolicy
from kvtier.clock import Clock
from kvtier.eviction.retention import DEFAULT_RETAIN_SHARE, RetentionPolicy, ServedPolicy
from kvtier.eviction.tenants import TenantPolicy
from kvtier.eviction.timeless import empty_like
from kvtier.hints import NO_HINT, Hint
from kvtier.primary.table import BlockTable


class Served(Protocol):
    """A request that a table serves: its name, and its hint."""

    request: str
    hint: Hint


class Retention:
    """Wraps a table's policy in one that follows hints, at the first hint, and tells it which request comes next."""

    def __init__(self, clock: Clock, share: float = DEFAULT_RETAIN_SHARE, quotas: bool = False) -> None:
        """Args:
        clock: for the times that blocks are retained.
        share: the most of a table's slots that retained blocks may hold, 0 to 1.
        quotas: whether each tenant has a share of the table.
        """
        self._clock, self._share, self._quotas = clock, share, quotas

    def serve(self, table: BlockTable, served: Served) -> None:
        """Say that the next calls of `table` are for this request."""
        policy = table.policy
        try:
            # Not isinstance: with an abstract class it takes 0.4 us, and this runs at every use and every store.
            if type(policy) is not RetentionPolicy and type(policy) is not TenantPolicy:
                if served.hint is NO_HINT:
                    return
                policy = table.policy = self._around(policy)
            policy.serve(served.hint, served.request, self._clock())
        except Exception as fault:  # noqa: BLE001 - a plug-in may raise anything; reported, and LRU takes over
            table.replace_policy(fault)

    def _around(self, policy: EvictionPolicy) -> ServedPolicy:
        first = RetentionPolicy(policy, self._share)
        if not self._quotas:
            return first
        return TenantPolicy(first, lambda: RetentionPolicy(empty_like(policy), self._share))


def num_kept(table: BlockTable) -> int:
    """Return how many blocks of a table are retained for a time."""
    policy = table.policy
    return policy.num_kept if isinstance(policy, ServedPolicy) else 0
