"""What is told of a manager's lookups and of its tiers' answers, beyond the events: a recording, spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvtier.secondary.jobs import Job
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState


class Watcher(Protocol):
    """Observes what a manager looks up and what its tiers answer.

    It is called on the manager's thread, and must not change what it is given.
    """

    def on_scan(self, state: RequestState) -> None:
        """Note that a request begins lookups, which add to `state.scan` from now on."""

    def on_job_ended(self, guard: TierGuard, job: Job) -> None:
        """Note that a tier's job has ended. The manager has not acted on it yet."""

    def on_poll(self, guards: Sequence[TierGuard]) -> None:
        """Note that all tiers have been polled. Each guard's `usable` says whether its tier is used from now on."""


class Watchers:
    """Two watchers, told one after the other."""

    def __init__(self, first: Watcher, second: Watcher) -> None:
        self._both = first, second

    def on_scan(self, state: RequestState) -> None:
        """Pass it on."""
        for watcher in self._both:
            watcher.on_scan(state)

    def on_job_ended(self, guard: TierGuard, job: Job) -> None:
        """Pass it on."""
        for watcher in self._both:
            watcher.on_job_ended(guard, job)

    def on_poll(self, guards: Sequence[TierGuard]) -> None:
        """Pass it on."""
        for watcher in self._both:
            watcher.on_poll(guards)
