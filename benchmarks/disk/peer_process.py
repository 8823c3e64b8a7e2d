"""The process in which one peer runs, with its own arena and its own busy scheduler; see `peer_worker`."""

from __future__ import annotations

import gc
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer import Peer, PeerPlace

from kvtier.cli.disk_speed.scheduler import BusyScheduler
from kvtier.cli.disk_speed.session import IN_FLIGHT_BYTES
from kvtier.errors import KVTierError
from kvtier.keys import OffloadKey
from kvtier.primary.arena import Arena
from kvtier.primary.huge_pages import SMALL, HugePages

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_worker import Pattern, keys_of, serve


@dataclass(frozen=True)
class PeerOrder:
    """What a process runs.

    Attributes:
        module, class_name: the peer's class, in a file of this folder.
        folder: on the filesystem to measure; made here.
        huge_pages: of the arena, as in a configuration.
        arena_path: a folder on a tmpfs for the arena, or None.
    """

    module: str
    class_name: str
    folder: str
    block_bytes: int
    job_blocks: int
    num_blocks: int
    huge_pages: str
    arena_path: str | None

    def keys(self, round_number: int) -> list[OffloadKey]:
        return keys_of(str(round_number), self.num_blocks)


class PeerSession:
    """A peer, its arena, and the busy scheduler that drives it."""

    def __init__(self, order: PeerOrder, kind: type[Peer]) -> None:
        self._order, folder = order, Path(order.folder)
        folder.mkdir()
        memory = None if order.arena_path is None else Path(order.arena_path)
        huge_pages = HugePages(order.huge_pages)
        self._arena = Arena.create(order.num_blocks, order.block_bytes, huge_pages=huge_pages, folder=memory)
        self._pattern = Pattern(self._arena.view)
        address = self._pattern.words.ctypes.data
        place = PeerPlace(folder, self._arena.view, self._arena.fd, address, order.num_blocks, order.block_bytes)
        self._peer = kind(place)
        self._scheduler = BusyScheduler(self._peer.tier, order.num_blocks, IN_FLIGHT_BYTES)
        gc.collect()
        gc.freeze()  # as vLLM does with its heap
        gc.disable()

    def describe(self) -> dict[str, str]:
        """Return the kind of memory that the arena lies in, and what is special about the peer."""
        return {"memory": (self._arena.memory or SMALL).kind.value, "note": self._peer.note}

    def move(self, load: bool, round_number: int) -> dict[str, float]:
        """Store or load each block once; compare the bytes after a load.

        Raises:
            KVTierError: a job failed, or a byte differs.
        """
        order, keys = self._order, self._order.keys(round_number)
        if load:
            self._pattern.clear()
        else:
            if round_number > 0:
                self._peer.forget(order.keys(round_number - 1))
            self._pattern.fill(round_number)
        elsewhere, everywhere, here = self._peer.cpu_seconds_elsewhere(), time.process_time(), time.thread_time()
        seconds, steps = self._scheduler.run(keys, order.job_blocks, load)
        here = time.thread_time() - here
        everywhere = time.process_time() - everywhere
        elsewhere = self._peer.cpu_seconds_elsewhere() - elsewhere
        if self._scheduler.num_failed:
            raise KVTierError(f"{self._scheduler.num_failed} jobs failed: the figures mean nothing")
        if load:
            self._pattern.compare(round_number)
        gigabytes = order.num_blocks * order.block_bytes / 1e9
        return {
            "gb_per_second": gigabytes / seconds,
            "cpu_per_gb": (everywhere - here + elsewhere) / gigabytes,
            "thread_us": (here - steps.work_cpu) / order.num_blocks * 1e6,
        }

    def close(self) -> None:
        """End the peer."""
        self._peer.close()


def make_session(order: dict[str, Any]) -> PeerSession:
    """Return the session of an order.

    Raises:
        ImportError: a package that the peer needs is not installed.
    """
    read = PeerOrder(**order)
    return PeerSession(read, getattr(importlib.import_module(read.module), read.class_name))


if __name__ == "__main__":
    serve(make_session)
