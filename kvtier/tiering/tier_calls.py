"""Calls one secondary tier without ever raising: a tier is foreign code, and its faults must not reach the engine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kvtier.abc import SecondaryTierManager

T = TypeVar("T")
P = ParamSpec("P")


class TierCalls(ABC):
    """Calls of a tier, besides lookups and jobs. Faults are reported to `_fault`.

    While another thread hangs in a call of the tier, no call is made: this thread might hang in it, too.

    Attributes:
        tier: to be called only through `ask` and `tell`.
    """

    def __init__(self, tier: SecondaryTierManager) -> None:
        self.tier = tier
        self._busy: threading.Thread | None = None
        """The thread that is still inside a call of the tier; None if there is none."""

    @abstractmethod
    def _fault(self, where: str, fault: Exception) -> None:
        """Note that a call of the tier raised."""

    def ask(self, what: str, default: T, call: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
        """Return what `call` returns; if it raises, report the fault of `what` and return `default`."""
        if self._busy is not None:
            return default
        try:
            return call(*args, **keywords)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(what, fault)
            return default

    def tell(self, what: str, call: Callable[P, object], *args: P.args, **keywords: P.kwargs) -> bool:
        """Call the tier as `ask` does; return whether the call took place and did not raise."""
        if self._busy is not None:
            return False
        try:
            call(*args, **keywords)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(what, fault)
            return False
        return True
