"""Replays a trace's requests through the production manager, in simulated time.

A request is looked up when it arrives, waits for tiers as an engine lets it wait, loads what it found, and stores
the rest at that same instant: what it computes can be found by the next request at once, so that an unlimited tier
reaches exactly the rate that the trace allows. The time to its first token is the wait, the copy to the accelerator
and the computing of the rest at `prefill_rate`; requests do not queue for the accelerator.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvtier.events import BlocksLoaded, Event
from kvtier.simulator.results import Outcome, Result
from kvtier.simulator.setup import Machine, Setup, SimulatedEngine
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.types import ReqContext, ScheduleEndContext

Progress = Callable[[float], None]
"""Told which share of a trace has been replayed, 0 to 1; what it raises ends the replay."""

_STEP = ScheduleEndContext()
_STEP_EVERY = 64
"""Requests between two steps where nothing waits: what an engine's step would do then is nothing, but not for free."""
_MOMENT = 1e-6
_NOTHING: Mapping[str, int] = {}


class LoadLog:
    """An observer that remembers what the last load took from where."""

    def __init__(self) -> None:
        self.by_source: Mapping[str, int] = _NOTHING

    def on_event(self, event: Event) -> None:
        """Keep the last `BlocksLoaded`."""
        if isinstance(event, BlocksLoaded):
            self.by_source = event.by_source


@dataclass(slots=True)
class _Waiting:
    """A request that waits for a tier; `look_at`: when its deadline may have passed."""

    request: TraceRequest
    context: ReqContext
    since: float
    look_at: float


class Replay:
    """One trace through one configuration.

    Attributes:
        outcomes: per request, in the order in which they were served.
    """

    def __init__(self, trace: Trace, setup: Setup, machine: Machine) -> None:
        """Make the engine.

        Raises:
            ConfigError: no such policy.
        """
        self.outcomes: list[Outcome] = []
        self._trace, self._setup, self._machine = trace, setup, machine
        self._loads = LoadLog()
        self._engine = SimulatedEngine(setup.limited_to(trace.num_kept), machine, trace.tokens_per_block, self._loads)
        self._manager, self._clock = self._engine.manager, self._engine.clock
        self._waiting: list[_Waiting] = []
        self._load_seconds = setup.block_bytes / machine.host_bandwidth

    def run(self, progress: Progress | None = None) -> Result:
        """Replay everything and return what came of it."""
        started = time.perf_counter()
        self._manager.on_schedule_end(_STEP)
        requests = self._trace.requests
        with_collector = gc.isenabled()
        gc.disable()  # nothing here makes cycles, and the collector would look at every key of the trace
        try:
            for number, request in enumerate(requests):
                if self._waiting:
                    self._serve_until(request.time)
                self._clock.advance_to(request.time)
                if number % _STEP_EVERY == 0 or self._has_news():
                    self._manager.on_schedule_end(_STEP)
                    if progress is not None and number % _STEP_EVERY == 0:
                        progress(number / len(requests))
                self._arrive(number, request)
            self._serve_until(float("inf"))
        finally:
            if with_collector:
                gc.enable()
        if progress is not None:
            progress(1.0)
        seconds = time.perf_counter() - started
        stats = self._manager.get_stats()
        self._manager.check_invariants()
        self._manager.shutdown()
        return Result.of(self._trace, self._setup, self._machine, self.outcomes, stats, seconds)

    def _has_news(self) -> bool:
        for tier in self._engine.tiers:  # noqa: SIM110 - a generator would cost as much as the questions
            if tier.has_news():
                return True
        return False

    def _arrive(self, number: int, request: TraceRequest) -> None:
        context = ReqContext(str(number), num_prompt_tokens=request.input_tokens)
        self._manager.on_new_request(context)
        num_hits, num_pending = self._manager.lookup_prefix(request.keys, context)
        if not num_pending:
            self._serve(request, context, num_hits, 0.0)
            return
        self._manager.on_schedule_end(_STEP)
        now = self._clock()
        self._waiting.append(_Waiting(request, context, now, now + self._patience(num_pending)))

    def _patience(self, num_pending: int) -> float:
        """Return when the manager lets a request that waits for so many blocks give up, or earlier."""
        computing = num_pending * self._trace.tokens_per_block / self._machine.prefill_rate
        return min(self._setup.load_deadline, computing) + _MOMENT

    def _serve(self, request: TraceRequest, context: ReqContext, num_hits: int, waited: float) -> None:
        """Load the hits, store the rest, and note what the request got."""
        manager, keys = self._manager, request.keys
        by_source = _NOTHING
        if num_hits:
            found = keys[:num_hits]
            manager.prepare_load(found, context)
            manager.complete_load(found, context)
            by_source = self._loads.by_source
        computed = [*keys[num_hits:], *request.answer_keys]
        if computed:
            output = manager.prepare_store(computed, context)
            if output is not None and output.keys_to_store:
                manager.complete_store(output.keys_to_store, context)
        manager.on_request_finished(context)
        saved = min(num_hits * self._trace.tokens_per_block, max(0, request.input_tokens - 1))
        computing = (request.input_tokens - saved) / self._machine.prefill_rate
        first_token = waited + num_hits * self._load_seconds + computing
        self.outcomes.append(Outcome(request.time, len(keys), by_source, request.input_tokens, saved, first_token))

    def _serve_until(self, end: float) -> None:
        """Let time pass up to `end`, or until nobody waits, and serve whoever's blocks arrive or whose time is over."""
        while self._waiting:
            reads = [at for tier in self._engine.tiers if (at := tier.device.next_read()) is not None]
            now = min(*reads, *(waiting.look_at for waiting in self._waiting), end)
            if now >= end:
                return
            self._clock.advance_to(now)
            self._manager.on_schedule_end(_STEP)
            self._look_again(self._clock())

    def _look_again(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        planned = False
        for one in waiting:
            keys = one.request.keys
            if now < one.look_at and self._manager.is_still_deferred(keys[0], one.context):
                self._waiting.append(one)
                continue
            num_hits, num_pending = self._manager.lookup_prefix(keys, one.context)
            if not num_pending:
                self._serve(one.request, one.context, num_hits, now - one.since)
                continue
            planned = True
            one.look_at = max(now, one.look_at) + self._patience(num_pending)
            self._waiting.append(one)
        if planned:
            self._manager.on_schedule_end(_STEP)
