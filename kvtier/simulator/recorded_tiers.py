"""Tiers that answer and take blocks as those of a recorded engine did, and a manager over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.tiering.cascades import Cascades
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import JobMetadata, JobResult, Locality, LookupResult, Medium, ReqContext


class RecordedTierManager(SecondaryTierManager):
    """A tier that gives the answers of a recorded tier.

    The repeater sets the attributes before each call of the manager.

    Attributes:
        used: whether the recorded engine used the tier.
        has: keys of the next scan for which the tier answers HIT.
        unsure: keys of the next scan for which the tier answers RETRY.
    """

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    verifies_payloads = True

    def __init__(self, name: str, view: memoryview, joins_stores: bool = False) -> None:
        """Args:
        view: only its shape counts; no byte of it is read.
        joins_stores: as the recorded tier did: jobs are known by their numbers.
        """
        super().__init__(None, view, name)
        self.joins_stores = joins_stores  # type: ignore[misc]
        self.used = False
        self.has: set[OffloadKey] = set()
        self.unsure: set[OffloadKey] = set()
        self._jobs: set[int] = set()
        self._ended: list[JobResult] = []

    @property
    def state(self) -> TierState:
        """UP while the recorded engine used the tier, else DOWN."""
        return TierState.UP if self.used else TierState.DOWN

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if key in self.has:
            return LookupResult.HIT
        return LookupResult.RETRY if key in self.unsure else LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Remember the job; `end` ends it when the recording does."""
        self._jobs.add(job_metadata.job_id)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Remember the job; `end` ends it when the recording does."""
        self._jobs.add(job_metadata.job_id)

    def end(self, job_id: int, successful: Sequence[OffloadKey] | None) -> None:
        """Report a job at the next poll with the keys that succeeded; None: all succeeded."""
        self._ended.append(JobResult(job_id, successful is None, successful, 0.0, 0))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results that the recording has given so far; jobs that the replay did not submit are dropped."""
        ended, self._ended = self._ended, []
        known = [result for result in ended if result.job_id in self._jobs]
        self._jobs.difference_update(result.job_id for result in known)
        return known

    def drain_jobs(self) -> None:
        """Do nothing: the recording ends the jobs."""


@dataclass
class Rooms:
    """How many blocks tiers take in the next call, as recorded.

    Attributes:
        taken: per tier that does not take all blocks of a store: how many, for each store of the call.
        late: per tier that is offered late blocks: for how many there is room, and how many times to look.
        wanted: how many blocks of a store the tiers would take; None if the engine did not ask.
    """

    taken: dict[int, list[int]] = field(default_factory=dict)
    late: dict[int, tuple[int, int]] = field(default_factory=dict)
    wanted: int | None = None

    def clear(self) -> None:
        """Forget what was recorded for a call that was made."""
        self.taken.clear()
        self.late.clear()
        self.wanted = None


class RepeatedCascades(Cascades):
    """Gives tiers as many blocks as the recorded engine did."""

    def __init__(self, rooms: Rooms, *parts: Any) -> None:
        super().__init__(*parts)
        self._rooms = rooms

    def _num_taken(self, guard: TierGuard, count: int) -> int:
        recorded = self._rooms.taken.get(guard.index)
        return min(count, recorded.pop(0)) if recorded else count

    def _offer_late(self, guard: TierGuard) -> tuple[int, int]:
        self._looks_left = self._rooms.late.get(guard.index, (0, 0))[1]
        return super()._offer_late(guard)

    def _late_room(self, guard: TierGuard) -> int:
        return self._rooms.late.get(guard.index, (0, 0))[0]

    def _takes_late(self, guard: TierGuard, count: int) -> bool:
        self._looks_left -= 1
        return self._looks_left >= 0

    def room(self) -> int:
        return super().room() if self._rooms.wanted is None else self._rooms.wanted


class RepeatedManager(TieringOffloadingManager):
    """A manager whose tiers take as many blocks as the recorded ones did."""

    def __init__(self, rooms: Rooms, *args: Any, **keywords: Any) -> None:
        self._rooms = rooms
        super().__init__(*args, **keywords)

    def _make_cascades(self, *parts: Any) -> Cascades:
        return RepeatedCascades(self._rooms, *parts)
