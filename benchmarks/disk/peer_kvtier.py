"""kvtier's disk tier among its peers. It alone computes checksums."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from peer import Peer, PeerPlace

from kvtier.abc import TierContext
from kvtier.cli.disk_speed.session import MeasuringSpec
from kvtier.errors import KVTierError
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.secondary.disk import DiskTierManager

_START_SECONDS = 120.0
_STEP_SECONDS = 0.002


class KVTierPeer(Peer):
    """The disk tier as an engine has it, with its I/O process."""

    def __init__(self, place: PeerPlace) -> None:
        spec = MeasuringSpec(TierContext(namespace=Namespace({"model": "peers"}), arena_fd=place.arena_fd))
        capacity = (place.num_blocks + 1) * (place.block_bytes + 256) + (1 << 20)
        path = str(place.folder / "kv")
        self.tier = self._disk = DiskTierManager(spec, place.view, "disk", path=path, capacity=capacity)
        self._disk.start()
        self._wait(lambda: self._disk.state is TierState.UP)
        self._wait(lambda: self._disk.get_stats().get("prepared_share", 1.0) >= 1.0)

    def _wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not is_so():
            if time.monotonic() > deadline:
                raise KVTierError(f"the tier did not start: {self._disk.state.value} {self._disk.state_reason}")
            time.sleep(_STEP_SECONDS)  # a step of a scheduler that has nothing else to do
            list(self._disk.get_finished_jobs())

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        """Do nothing: the tier evicts the oldest blocks by itself, while it stores."""

    def cpu_seconds_elsewhere(self) -> float:
        pid = self._disk.io_pid
        if pid is None:
            raise KVTierError("the tier's I/O process is gone")
        return time.clock_gettime((~pid << 3) | 2)  # Linux numbers a process's CPU clock so, see clock_getcpuclockid(3)

    def close(self) -> None:
        self._disk.shutdown()
