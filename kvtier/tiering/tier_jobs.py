"""Jobs of a secondary tier as the manager remembers them, whatever the tier does to what it was handed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, ReqContext


class JobMaker:
    """Makes what tiers are handed, each job with a number of its own."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def make(
        self, keys: Sequence[OffloadKey], slots: Sequence[int], is_promotion: bool, context: ReqContext
    ) -> JobMetadata:
        """Return the next job: `keys` between a tier and the primary's `slots`."""
        return JobMetadata(next(self._numbers), list(keys), np.array(slots, dtype=np.int32), is_promotion, context)


@dataclass(slots=True, eq=False)
class TierJob:
    """A job that a tier has not answered yet. `slots` stay pinned until it has.

    Attributes:
        metadata: what the tier was handed and may have changed since; nobody reads it back.
        job_id, keys, slots, is_promotion: what the job really is.
        submitted: when, in seconds of the manager's clock.
    """

    metadata: JobMetadata
    job_id: int
    keys: tuple[OffloadKey, ...]
    slots: list[int]
    is_promotion: bool
    submitted: float


class Answer(NamedTuple):
    """The end of a job: the keys that succeeded, verified if the tier does not verify by itself."""

    job: TierJob
    successful: Collection[OffloadKey]


class Claim(NamedTuple):
    """What a result says: the keys that succeeded (the job's own, if all did), bytes moved, seconds."""

    keys: Collection[OffloadKey]
    num_bytes: int
    seconds: float


def make_tier_job(metadata: JobMetadata, slots: Sequence[int], now: float) -> TierJob:
    """Note what a job is before a tier gets to see it."""
    return TierJob(metadata, metadata.job_id, tuple(metadata.keys), list(slots), metadata.is_promotion, now)


def read_result(job: TierJob, result: JobResult, now: float) -> Claim:
    """Return what a tier's result says about its job.

    Raises:
        Exception: the result's fields are not what they should be; the tier decides of what kind.
    """
    succeeded: Collection[OffloadKey] = job.keys
    if not result.success:
        succeeded = frozenset(job.keys).intersection(result.successful_keys or ())
    seconds = float(result.transfer_time) if result.transfer_time is not None else now - job.submitted
    return Claim(succeeded, int(result.transfer_bytes or 0), seconds)
