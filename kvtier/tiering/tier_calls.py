"""Calls one secondary tier without ever raising: a tier is foreign code, and its faults must not reach the engine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import ParamSpec, TypeVar

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.types import (
    OffloadingEvent,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

T = TypeVar("T")
P = ParamSpec("P")


class TierCalls(ABC):
    """What the manager tells a tier and asks it, besides lookups and jobs. Faults are reported to `_fault`.

    While another thread hangs in a call of the tier, no call is made: this thread might hang in it, too.

    Attributes:
        usable: whether lookups and jobs go to the tier now.
    """

    def __init__(self, tier: SecondaryTierManager) -> None:
        self.tier = tier
        self.usable = False
        self._busy: threading.Thread | None = None
        """The thread that is still inside a call of the tier; None if there is none."""

    @abstractmethod
    def _fault(self, where: str, fault: Exception) -> None:
        """Note that a call of the tier raised."""

    def wants_all_of(self, req_context: ReqContext) -> bool:
        """Tell the tier of a new request; return whether it wants every block of it, prefix hits included."""
        answer = self._ask("on_new_request", None, self.tier.on_new_request, req_context)
        return isinstance(answer, RequestOffloadingContext) and answer.policy is OffloadPolicy.REQUEST_LEVEL

    def end_request(self, req_context: ReqContext) -> None:
        """Tell the tier that a request is over."""
        self._tell("on_request_finished", self.tier.on_request_finished, req_context)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Report a use of `keys` to the tier, if it is usable."""
        if self.usable:
            self._tell("touch", self.tier.touch, list(keys), req_context)

    def end_step(self, context: ScheduleEndContext) -> None:
        """Tell the tier that a step is over."""
        self._tell("on_schedule_end", self.tier.on_schedule_end, context)

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Tell the tier that no request waits for these jobs any more."""
        self._tell("cancel_loads", self.tier.cancel_loads, job_ids)

    def enter_epoch(self, epoch: bytes) -> bool:
        """Tell the tier to begin another epoch; return whether it has done so."""
        return self._tell("start_epoch", self.tier.start_epoch, epoch)

    def stats(self) -> Mapping[str, float]:
        """Return the metrics that the tier itself knows, by name; none if it fails."""
        nothing: dict[str, float] = {}
        return self._ask("get_stats", nothing, lambda: _numbers(self.tier.get_stats()))

    def take_events(self) -> list[OffloadingEvent]:
        """Return the tier's KV events since the last call; none if it fails."""
        nothing: list[OffloadingEvent] = []
        return self._ask("take_events", nothing, lambda: list(self.tier.take_events()))

    def describe_itself(self) -> tuple[TierState, str]:
        """Return the state that the tier says it is in, and the reason for it; DOWN if it fails."""
        state = self._ask("state", TierState.DOWN, lambda: self.tier.state)
        return state, self._ask("state_reason", "", lambda: self.tier.state_reason)

    def _ask(self, what: str, default: T, call: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
        """Return what `call`, which is foreign code, returns; if it raises, report the fault and return `default`."""
        if self._busy is not None:
            return default
        try:
            return call(*args, **keywords)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(what, fault)
            return default

    def _tell(self, what: str, call: Callable[P, object], *args: P.args, **keywords: P.kwargs) -> bool:
        """Call the tier as `_ask` does; return whether the call took place and did not raise."""
        if self._busy is not None:
            return False
        try:
            call(*args, **keywords)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(what, fault)
            return False
        return True


def _numbers(stats: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in stats.items()}
