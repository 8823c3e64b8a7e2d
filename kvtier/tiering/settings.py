"""Settings of the tiering manager, already checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvtier.eviction.retention import DEFAULT_RETAIN_SHARE
from kvtier.tiering.estimate import DOUBLING_TOKENS


class ResetPolicy(Enum):
    """What a reset means for blocks in secondary tiers."""

    NEW_EPOCH = "new_epoch"
    """The model has other weights now, so blocks stored before miss."""
    KEEP = "keep"
    """Blocks stored before stay valid."""


@dataclass(frozen=True)
class TieringSettings:
    """Deadlines and budgets; times in seconds.

    Attributes:
        load_deadline: longest that a request waits for tiers, per attempt; None if only the predicted time to compute
            the blocks limits the wait.
        probe_deadline: longest that a request waits for a tier to say whether it has a block; None for the tier's own.
        lease_timeout: longest that a request holds promoted blocks that it does not load.
        drain_timeout: longest that a reset or shutdown waits for tiers.
        tier_deadline: a tier whose jobs have made no progress for this long is not used until one has.
        promotion_budget: share of the primary's slots that promotions and leases may hold, in (0, 1].
        prefill_rate: tokens per second that the engine computes, used until the rate is measured; None for a guess.
        prefill_doubling: context length, in tokens, at which a token takes twice as long to compute as the first one.
        measures_prefill: whether the time between steps is the engine's computing time; False in a simulation.
        tokens_per_block: tokens in one offloaded block; 0 if unknown. Computing times are then unknown, too, and
            requests wait for every block that a tier has.
        retain_share: share of a tier's slots that may hold blocks which hints ask to keep, 0 to 1.
        tenant_quotas: whether a tenant that hints name is held to its share while other tenants want theirs.
        on_reset: what a reset means for blocks in secondary tiers.
        kv_events: whether `take_events` collects events.
    """

    load_deadline: float | None = None
    probe_deadline: float | None = None
    lease_timeout: float = 30.0
    drain_timeout: float = 5.0
    tier_deadline: float = 30.0
    promotion_budget: float = 0.8
    prefill_rate: float | None = None
    prefill_doubling: float = DOUBLING_TOKENS
    measures_prefill: bool = True
    tokens_per_block: int = 0
    retain_share: float = DEFAULT_RETAIN_SHARE
    tenant_quotas: bool = False
    on_reset: ResetPolicy = ResetPolicy.NEW_EPOCH
    kv_events: bool = False

    def most_promoted(self, num_slots: int) -> int:
        """Return how many of the primary's slots promotions and leases may hold."""
        return max(1, int(num_slots * self.promotion_budget))
