"""An executor without concurrency: each poll runs the store."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvtier import forks
from kvtier.errors import StoreUnavailableError
from kvtier.executors.base import IOExecutor, Report, StoreDescription
from kvtier.executors.loop import StoreLoop
from kvtier.executors.pieces import Piece, arena_slots
from kvtier.executors.protocol import Chore, IndexEnd, Part, PartResult, Probe, Ready, Unavailable
from kvtier.executors.runner import StoreRunner
from kvtier.keys import OffloadKey
from kvtier.primary.arena import Rows


class InlineExecutor(IOExecutor):
    """Runs the store on the caller's thread, within `poll`.

    It is deterministic, and serves tests, manual clocks and the simulator. `start` opens the store, so a tier over this
    executor is UP after its first poll.
    """

    def __init__(self, description: StoreDescription, rows: Rows) -> None:
        self._description = description
        self._rows = rows
        self._runner: StoreRunner | None = None
        self._loop = StoreLoop(description)
        self._reports: list[Report] = []
        self._left_to_parent: StoreRunner | None = None
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, run nothing. Keep the store open, because closing it might write."""
        self._loop = StoreLoop(self._description)
        self._left_to_parent, self._runner = self._runner, None
        self._reports.clear()

    def start(self) -> None:
        """Open the store and read its index."""
        try:
            self._runner = StoreRunner(self._description)
            self._reports.append(Ready(self._runner.num_slots))
            self._reports.extend(self._runner.index())
            self._reports += (IndexEnd(), *self._runner.usage_news())
        except StoreUnavailableError as error:
            self._reports.append(Unavailable.because(error))

    def submit(self, part: Part) -> None:
        self._loop.put(part)

    def probe(self, probe_id: int, keys: Sequence[OffloadKey]) -> None:
        self._loop.put(Probe.of(probe_id, keys))

    def do(self, chore: Chore) -> None:
        self._loop.put(chore)

    def poll(self) -> list[Report]:
        """Do everything that is queued, and return all results."""
        if self._runner is not None:
            self._loop.run(self._runner, self._move, self._reports.extend, wait=False)
        reports, self._reports = self._reports, []
        return reports

    def cancel(self, serials: Collection[int]) -> None:
        self._reports.extend(self._loop.cancel(serials))

    def retire(self) -> None:
        """Close the store."""
        self._loop.close()
        self._reports.clear()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def kill(self) -> None:
        self.retire()

    def has_ended(self) -> bool:
        """Return True: nothing runs between calls."""
        return True

    def wait(self, seconds: float) -> None:
        """Return at once: the next poll does the work."""

    def _move(self, runner: StoreRunner, pieces: Sequence[Piece]) -> list[PartResult]:
        return runner.run(pieces, self._rows.of(arena_slots(pieces)))
