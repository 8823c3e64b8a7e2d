"""The process in which one peer runs, with its own arena and its own busy scheduler, in an environment of its own.

It reads a `PeerOrder` as JSON, makes the peer, and prints a line of JSON that describes its memory, or names the
package that it lacks. Then it reads commands, one per line: "store N" and "load N" for round N. Each is answered by the
figures.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from peer import Peer, PeerPlace

from kvtier.cli.disk_speed.scheduler import BusyScheduler
from kvtier.cli.disk_speed.session import IN_FLIGHT_BYTES
from kvtier.errors import KVTierError
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.arena import Arena
from kvtier.primary.huge_pages import SMALL, HugePages

_PATTERN_WORDS = 1 << 17


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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def keys(self, round_number: int) -> list[OffloadKey]:
        return [
            make_offload_key(hashlib.sha256(f"{round_number}-{number}".encode()).digest(), 0)
            for number in range(self.num_blocks)
        ]


class PeerSession:
    """A peer, its arena, and the busy scheduler that drives it."""

    def __init__(self, order: PeerOrder, kind: type[Peer]) -> None:
        self._order, folder = order, Path(order.folder)
        folder.mkdir()
        memory = None if order.arena_path is None else Path(order.arena_path)
        huge_pages = HugePages(order.huge_pages)
        self._arena = Arena.create(order.num_blocks, order.block_bytes, huge_pages=huge_pages, folder=memory)
        self._words = np.frombuffer(self._arena.view.cast("B"), np.uint64)
        self._pattern = np.random.default_rng(1).integers(0, 1 << 63, _PATTERN_WORDS, dtype=np.uint64)
        place = PeerPlace(
            folder, self._arena.view, self._arena.fd, self._words.ctypes.data, order.num_blocks, order.block_bytes
        )
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
            self._words[:] = 0
        else:
            if round_number > 0:
                self._peer.forget(order.keys(round_number - 1))
            self._fill(round_number)
        elsewhere, everywhere, here = self._peer.cpu_seconds_elsewhere(), time.process_time(), time.thread_time()
        seconds, steps = self._scheduler.run(keys, order.job_blocks, load)
        here = time.thread_time() - here
        everywhere = time.process_time() - everywhere
        elsewhere = self._peer.cpu_seconds_elsewhere() - elsewhere
        if self._scheduler.num_failed:
            raise KVTierError(f"{self._scheduler.num_failed} jobs failed: the figures mean nothing")
        if load:
            self._compare(round_number)
        gigabytes = order.num_blocks * order.block_bytes / 1e9
        return {
            "gb_per_second": gigabytes / seconds,
            "cpu_per_gb": (everywhere - here + elsewhere) / gigabytes,
            "thread_us": (here - steps.work_cpu) / order.num_blocks * 1e6,
        }

    def _pieces(self, round_number: int) -> Sequence[tuple[slice, np.ndarray]]:
        """Return places in the arena and what they hold in a round: no two pieces are alike."""
        starts = range(0, len(self._words), _PATTERN_WORDS)
        return [
            (slice(start, start + _PATTERN_WORDS), self._pattern + np.uint64(round_number * len(starts) + index))
            for index, start in enumerate(starts)
        ]

    def _fill(self, round_number: int) -> None:
        for place, words in self._pieces(round_number):
            self._words[place] = words[: len(self._words[place])]

    def _compare(self, round_number: int) -> None:
        for place, words in self._pieces(round_number):
            if not np.array_equal(self._words[place], words[: len(self._words[place])]):
                raise KVTierError("WRONG BYTES: what was loaded is not what was stored")

    def close(self) -> None:
        """End the peer."""
        self._peer.close()


def main() -> None:
    """Run in the peer's process."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    figures = _keep_output()
    order = PeerOrder(**json.loads(sys.stdin.readline()))
    try:
        kind: type[Peer] = getattr(importlib.import_module(order.module), order.class_name)
    except ImportError as error:
        _answer(figures, {"missing": str(error)})
        return
    session = PeerSession(order, kind)
    try:
        _answer(figures, session.describe())
        for line in sys.stdin:
            direction, number = line.split()
            _answer(figures, session.move(direction == "load", int(number)))
    finally:
        session.close()


def _keep_output() -> TextIO:
    """Return a file for the figures. What peers and their libraries print goes to standard error from now on."""
    figures = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return figures


def _answer(figures: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=figures, flush=True)


if __name__ == "__main__":
    main()
