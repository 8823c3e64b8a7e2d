"""Which request a table serves, for hints: without any, tables and policies are as if there were none."""

from __future__ import annotations

from kvtier.clock import Clock
from kvtier.eviction.retention import DEFAULT_RETAIN_SHARE, RetentionPolicy
from kvtier.hints import NO_HINT
from kvtier.primary.table import BlockTable
from kvtier.primary.uses import RequestUses


class Retention:
    """Puts a RetentionPolicy around a table's policy at the first hint, and tells it which request is served."""

    def __init__(self, clock: Clock, share: float = DEFAULT_RETAIN_SHARE) -> None:
        """Args: share: of a table's slots that blocks to be kept may hold."""
        self._clock, self._share = clock, share

    def serve(self, table: BlockTable, uses: RequestUses) -> None:
        """What `table` is asked and told next is for this request."""
        policy = table.policy
        if type(policy) is not RetentionPolicy:  # isinstance would ask an abstract class: 0.4 us in each call
            if uses.hint is NO_HINT:
                return
            policy = table.policy = RetentionPolicy(policy, self._share)
        policy.serve(uses.hint, uses.request, self._clock())


def num_kept(table: BlockTable) -> int:
    """Return how many blocks of a table are kept for a time."""
    policy = table.policy
    return policy.num_kept if isinstance(policy, RetentionPolicy) else 0
