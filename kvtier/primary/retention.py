"""Which request a table serves, for hints: without any, tables and policies are as if there were none."""

from __future__ import annotations

from kvtier.abc import EvictionPolicy
from kvtier.clock import Clock
from kvtier.eviction.retention import DEFAULT_RETAIN_SHARE, RetentionPolicy, ServedPolicy
from kvtier.eviction.tenants import TenantPolicy
from kvtier.eviction.timeless import empty_like
from kvtier.hints import NO_HINT
from kvtier.primary.table import BlockTable
from kvtier.primary.uses import RequestUses


class Retention:
    """Puts a policy that knows hints around a table's policy at the first hint, and tells it whom the table serves."""

    def __init__(self, clock: Clock, share: float = DEFAULT_RETAIN_SHARE, quotas: bool = False) -> None:
        """Args:
        share: of a table's slots that blocks to be kept may hold.
        quotas: whether tenants have shares.
        """
        self._clock, self._share, self._quotas = clock, share, quotas

    def serve(self, table: BlockTable, uses: RequestUses) -> None:
        """What `table` is asked and told next is for this request."""
        policy = table.policy
        # isinstance would ask an abstract class: 0.4 us in each call
        if type(policy) is not RetentionPolicy and type(policy) is not TenantPolicy:
            if uses.hint is NO_HINT:
                return
            policy = table.policy = self._around(policy)
        policy.serve(uses.hint, uses.request, self._clock())

    def _around(self, policy: EvictionPolicy) -> ServedPolicy:
        first = RetentionPolicy(policy, self._share)
        if not self._quotas:
            return first
        return TenantPolicy(first, lambda: RetentionPolicy(empty_like(policy), self._share))


def num_kept(table: BlockTable) -> int:
    """Return how many blocks of a table are kept for a time."""
    policy = table.policy
    return policy.num_kept if isinstance(policy, ServedPolicy) else 0
