"""Counts pages moved, for SGLang's metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

_GIGA = 1e9
_LEAST_SECONDS = 1e-9


@dataclass
class Transfers:
    """Calls that moved a page, with the fields of SGLang's `StorageMetrics`, whose module would load an engine.

    Attributes:
        prefetch_pgs, backup_pgs: pages that each call loaded, stored.
        prefetch_bandwidth, backup_bandwidth: its speed, GB/s.
    """

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class TransferLog:
    """Collects `Transfers`; several threads add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers = Transfers()

    def stored(self, pages: int, num_bytes: int, seconds: float) -> None:
        """Add a call that stored pages, if it did."""
        if pages:
            with self._lock:
                self._transfers.backup_pgs.append(pages)
                self._transfers.backup_bandwidth.append(num_bytes / _GIGA / max(seconds, _LEAST_SECONDS))

    def loaded(self, pages: int, num_bytes: int, seconds: float) -> None:
        """Add a call that loaded pages, if it did."""
        if pages:
            with self._lock:
                self._transfers.prefetch_pgs.append(pages)
                self._transfers.prefetch_bandwidth.append(num_bytes / _GIGA / max(seconds, _LEAST_SECONDS))

    def take(self) -> Transfers:
        """Return the calls since the last one of this method."""
        with self._lock:
            transfers, self._transfers = self._transfers, Transfers()
        return transfers
