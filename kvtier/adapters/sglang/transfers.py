"""Counts pages moved, for SGLang's metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
    """Collects `Transfers`; several threads add to it.

    There is no lock: the appends and pops of a deque are atomic, and a child that is forked while another thread held
    a lock would wait for it for ever.
    """

    def __init__(self) -> None:
        self._stored: deque[tuple[int, float]] = deque()
        self._loaded: deque[tuple[int, float]] = deque()

    def stored(self, pages: int, num_bytes: int, seconds: float) -> None:
        """Add a call that stored pages, if it did."""
        if pages:
            self._stored.append((pages, num_bytes / _GIGA / max(seconds, _LEAST_SECONDS)))

    def loaded(self, pages: int, num_bytes: int, seconds: float) -> None:
        """Add a call that loaded pages, if it did."""
        if pages:
            self._loaded.append((pages, num_bytes / _GIGA / max(seconds, _LEAST_SECONDS)))

    def take(self) -> Transfers:
        """Return the calls since the last one of this method."""
        transfers = Transfers()
        for pages, bandwidth in _drained(self._stored):
            transfers.backup_pgs.append(pages)
            transfers.backup_bandwidth.append(bandwidth)
        for pages, bandwidth in _drained(self._loaded):
            transfers.prefetch_pgs.append(pages)
            transfers.prefetch_bandwidth.append(bandwidth)
        return transfers


def _drained(calls: deque[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    # As many as there are now: other threads may add faster than this one takes.
    for _ in range(len(calls)):
        try:
            call = calls.popleft()
        except IndexError:  # another thread takes, too
            return
        yield call
