"""Tells of the shadow caches of a tier, if its policy has some: events of switches, and counters."""

from __future__ import annotations

from kvtier.abc import EvictionPolicy
from kvtier.events import Observer, PolicySwitched
from kvtier.eviction.auto import ShadowedPolicy
from kvtier.eviction.contest import PolicySwitch


class ShadowReport:
    """Passes on what a tier's policy finds out."""

    def __init__(self, tier: str, policy: EvictionPolicy, observer: Observer) -> None:
        """Args: tier: its name, for events; policy: of that tier, with shadows or without."""
        self._tier, self._observer = tier, observer
        self._policy = policy if isinstance(policy, ShadowedPolicy) else None
        if self._policy is not None:
            self._policy.on_switch = self._tell

    def _tell(self, switch: PolicySwitch) -> None:
        self._observer.on_event(PolicySwitched(self._tier, *switch))

    def stats(self) -> dict[str, float]:
        """Return the counters of the shadows, see `ShadowedPolicy.stats`; none if there are no shadows."""
        return self._policy.stats() if self._policy is not None else {}
