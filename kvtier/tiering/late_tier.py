"""Stands where a tier will be that cannot be made yet, because nobody has said yet whose blocks are whose."""

from __future__ import annotations

import threading
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.secondary.unusable import UnusableTierManager

_REASON = "it is not known yet whose blocks are whose"


class LateTier(UnusableTierManager):
    """STARTING until the guard puts the tier that comes in its place; holds nothing and takes nothing.

    `succeed` may be called on any thread, everything else on the scheduler's.

    Attributes:
        epoch: the one that began meanwhile, for the tier that comes.
    """

    def __init__(self, primary_kv_view: memoryview, tier_type: str, tier_class: Any) -> None:
        """Args: tier_class: of the tier that will come, which managers must not tell from this one."""
        super().__init__(primary_kv_view, tier_type, _REASON)
        for name in ("medium", "locality", "verifies_payloads", "probe_deadline"):
            setattr(self, name, getattr(tier_class, name, getattr(SecondaryTierManager, name)))
        self.epoch: bytes | None = None
        self._lock = threading.Lock()
        self._successor: SecondaryTierManager | None = None
        self._has_ended = False

    @property
    def state(self) -> TierState:
        """STARTING, or CLOSED after `shutdown`."""
        return TierState.CLOSED if self._has_ended else TierState.STARTING

    def succeed(self, tier: SecondaryTierManager) -> None:
        """Take the started tier that comes in this one's place; after `shutdown` it is ended at once."""
        with self._lock:
            if not self._has_ended:
                self._successor = tier
                return
        tier.shutdown()

    def take_successor(self) -> SecondaryTierManager | None:
        """Return the tier that has come, the caller's from now on; None before. It does not know of `epoch` yet."""
        if self._successor is None:
            return None
        with self._lock:
            tier, self._successor = self._successor, None
        return tier

    def start_epoch(self, epoch: bytes) -> None:
        """Remember the epoch for the tier that comes."""
        self.epoch = epoch

    def shutdown(self) -> None:
        """End, and end the tier that nobody took."""
        with self._lock:
            self._has_ended = True
            tier, self._successor = self._successor, None
        if tier is not None:
            tier.shutdown()
