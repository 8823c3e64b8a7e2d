"""Measures the cost of promotions on the scheduler's thread, for `control_plane.py`.

Requests ask for blocks that only a secondary tier has, while the primary tier is full. Times are thread-CPU seconds per
call.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np

from kvtier.abc import SecondaryTierManager
from kvtier.keys import OffloadKey
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.registry import POLICIES
from kvtier.testing.clock import ManualClock
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import JobMetadata, JobResult, Locality, LookupResult, Medium, ReqContext, ScheduleEndContext

BLOCK_BYTES = 128 << 10
STEP_SECONDS = 1e-3
P = ParamSpec("P")
T = TypeVar("T")


class HoldingTier(SecondaryTierManager):
    """A tier that has the keys in `held`; it ends a load at the next poll or, without `answers`, never."""

    medium, locality, verifies_payloads = Medium.STORAGE, Locality.LOCAL, True

    def __init__(self, view: memoryview, answers: bool) -> None:
        super().__init__(None, view, "holding")
        self.held: set[OffloadKey] = set()
        self._answers = answers
        self._ended: list[JobResult] = []

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.HIT if key in self.held else LookupResult.MISS

    def submit_store(self, job_metadata: JobMetadata) -> None:
        self._ended.append(JobResult(job_metadata.job_id, True))

    def submit_load(self, job_metadata: JobMetadata) -> None:
        if self._answers:
            num_bytes = len(job_metadata.keys) * BLOCK_BYTES
            self._ended.append(JobResult(job_metadata.job_id, True, None, STEP_SECONDS, num_bytes))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        ended, self._ended = self._ended, []
        return ended

    def drain_jobs(self) -> None:
        return


@dataclass
class Calls:
    """Thread-CPU seconds of calls, by kind of call."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, call: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
        """Make a call, note its time, and return its result."""
        start = time.thread_time()
        result = call(*args, **keywords)
        self.seconds.setdefault(name, []).append(time.thread_time() - start)
        return result


def least_seconds(keys: list[OffloadKey], others: list[OffloadKey]) -> dict[str, list[float]]:
    """Return the seconds of the barest loops that look at every block of a request: the raw limit, with LRU.

    A load needs each block's slot, and its place in the order of eviction. A completed load drops each slot's pin. The
    end of a request takes its blocks, each once, and gives them their places.

    Args:
        others: what memory holds besides `keys`.
    """
    held, calls = [*others, *keys], Calls()
    slots, order = dict(zip(held, range(len(held)), strict=True)), OrderedDict.fromkeys(held)
    pins = dict.fromkeys(map(slots.__getitem__, keys), 1)

    def place(some: list[OffloadKey]) -> None:
        deque(map(order.move_to_end, reversed(some)), maxlen=0)

    def load() -> None:
        np.asarray([slots[key] for key in keys], np.int32)
        place(keys)

    calls.time("prepare_load", load)
    done, taken = set(keys), dict.fromkeys(keys)
    calls.time("complete_load", lambda: taken.keys() == done and deque(map(pins.pop, list(pins)), maxlen=0))
    calls.time("finish", lambda: place(list(dict.fromkeys(keys))))
    return calls.seconds


class PromotionBench:
    """Drives a manager with requests whose blocks only a tier has; `fill` fills the primary tier before."""

    def __init__(self, num_blocks: int, policy: str, prompts: list[list[OffloadKey]], answers: bool) -> None:
        view = memoryview(np.zeros((num_blocks, 1), dtype=np.uint8))  # no byte of it is read
        primary = CPUPrimaryTierOffloadingManager(num_blocks, view, POLICIES.load(policy)(num_blocks))
        primary.block_bytes = BLOCK_BYTES
        self.tier, self.clock, self.calls = HoldingTier(view, answers), ManualClock(), Calls()
        # The engine is so slow that loading always pays.
        settings = TieringSettings(prefill_rate=100.0, tokens_per_block=16, measures_prefill=False)
        self.manager = TieringOffloadingManager(primary, [self.tier], settings=settings, clock=self.clock)
        self._step = ScheduleEndContext()
        self.manager.on_schedule_end(self._step)
        self._prompts = prompts
        for prompt in prompts:
            self.tier.held.update(prompt)

    def fill(self, requests: Iterable[list[OffloadKey]]) -> None:
        """Store the given requests, so that the primary tier is full."""
        for number, keys in enumerate(requests):
            context = ReqContext(f"before {number}")
            self.manager.on_new_request(context)
            output = self.manager.prepare_store(keys, context)
            self.manager.complete_store(output.keys_to_store if output is not None else [], context)
            self.manager.on_request_finished(context)
            self.manager.on_schedule_end(self._step)

    def step(self, name: str) -> None:
        """End a step of the scheduler, and note its time under `name`."""
        self.clock.advance(STEP_SECONDS)
        self.calls.time(name, self.manager.on_schedule_end, self._step)

    def ask(self) -> list[ReqContext]:
        """Announce all requests, look each up once, and return their contexts."""
        contexts = [ReqContext(f"request {number}") for number in range(len(self._prompts))]
        for keys, context in zip(self._prompts, contexts, strict=True):
            self.manager.on_new_request(context)
            self.manager.lookup_prefix(keys, context)
        return contexts

    def run(self, num_steps: int) -> dict[str, list[float]]:
        """Promote and load all blocks within `num_steps` steps; return the seconds of the calls."""
        waiting = list(zip(self._prompts, self.ask(), strict=True))
        for _ in range(num_steps):
            self.step("step")
            still = [(keys, context) for keys, context in waiting if self._serve(keys, context)]
            waiting = still
        if waiting:
            raise RuntimeError("the benchmark's prompts were not promoted in time")
        return self.calls.seconds

    def _serve(self, keys: list[OffloadKey], context: ReqContext) -> bool:
        """Load and end a request if it is ready; return whether it still waits."""
        manager, calls = self.manager, self.calls
        if manager.is_still_deferred(keys[0], context):
            return True
        num_ready, num_pending = manager.lookup_prefix(keys, context)
        if num_pending:
            return True
        if num_ready < len(keys):
            raise RuntimeError(f"{num_ready} of {len(keys)} blocks of the benchmark were promoted")
        calls.time("prepare_load", manager.prepare_load, keys, context)
        calls.time("complete_load", manager.complete_load, set(keys), context)
        calls.time("finish", manager.on_request_finished, context)
        return False

    def run_silent(self, num_steps: int) -> dict[str, list[float]]:
        """Wait for a tier that never answers until the deadlines pass, and end; return the seconds of the calls."""
        contexts = self.ask()
        for _ in range(num_steps):
            self.step("plan")
        self.clock.advance(1e6)
        self.step("expiry")
        self.step("expiry")
        for context in contexts:
            self.calls.time("finish after expiry", self.manager.on_request_finished, context)
        return self.calls.seconds
