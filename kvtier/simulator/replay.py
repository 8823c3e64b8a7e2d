"""Replays a trace's requests through the production manager, in simulated time.

One accelerator computes one prompt at a time, in the order of arrival; answers take no time. When the accelerator is
free, the waiting requests are looked up in order, as an engine's scheduler does. The first one that is not deferred is
computed next. It loads its hits and stores the other blocks at the same instant, so that the next request can find
them. A request's time to the first token is its wait, the copy of its hits to the accelerator, and the computing of
the rest.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

from kvtier.events import BlocksLoaded, Event
from kvtier.hints import HINT_KEY
from kvtier.simulator.results import Outcome, Result
from kvtier.simulator.setup import Machine, Setup, SimulatedEngine
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.types import ReqContext, ScheduleEndContext

Progress = Callable[[float], None]
"""Called with the share of a trace that has been replayed, 0 to 1; an exception from it ends the replay."""

_STEP = ScheduleEndContext()
_STEP_EVERY = 64
"""Arrivals per step; a step for each arrival would change no result, but would take time."""
_MOMENT = 1e-6
"""Seconds after a deadline at which it has surely passed."""
_LOOKED_UP = 4
"""Waiting requests that an engine's scheduler looks up while the accelerator is busy, limited by its token budget."""
_NOTHING: Mapping[str, int] = {}


class LoadLog:
    """An observer that keeps the sources of the last load."""

    def __init__(self) -> None:
        self.by_source: Mapping[str, int] = _NOTHING

    def on_event(self, event: Event) -> None:
        """Keep the block counts of the last `BlocksLoaded`."""
        if isinstance(event, BlocksLoaded):
            self.by_source = event.by_source


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for the accelerator.

    Attributes:
        is_known: the request was looked up.
        is_deferred: the request also waits for a tier.
        look_at: time of the next lookup of a deferred request if nothing changes before.
    """

    request: TraceRequest
    context: ReqContext
    is_known: bool = False
    is_deferred: bool = False
    look_at: float = 0.0


class Replay:
    """Replays one trace with one configuration.

    Attributes:
        outcomes: one per request, in the order in which they were served.
    """

    def __init__(self, trace: Trace, setup: Setup, machine: Machine) -> None:
        """Make the engine.

        Raises:
            ConfigError: the policy is not registered.
        """
        self.outcomes: list[Outcome] = []
        self._trace, self._setup, self._machine = trace, setup, machine
        self._loads = LoadLog()
        self._engine = SimulatedEngine(setup.limited_to(trace.num_kept), machine, trace.tokens_per_block, self._loads)
        self._manager, self._clock = self._engine.manager, self._engine.clock
        self._queue: deque[_Waiting] = deque()
        self._progress: Progress | None = None
        self._num_come = 0
        self._computing: ReqContext | None = None
        self._free_at = 0.0
        self._load_seconds = setup.block_bytes / machine.host_bandwidth

    def run(self, progress: Progress | None = None) -> Result:
        """Replay the whole trace and return the result."""
        started = time.perf_counter()
        self._progress = progress
        self._manager.on_schedule_end(_STEP)
        requests = self._trace.requests
        with_collector = gc.isenabled()
        gc.disable()  # a replay makes no cycles, and a collection would visit every key of the trace
        try:
            for number, request in enumerate(requests):
                self._work_until(request.time)
                self._clock.advance_to(request.time)
                self._num_come = number
                if number % _STEP_EVERY == 0:
                    self._manager.on_schedule_end(_STEP)
                    self._report()
                params = None if request.hint is None else {HINT_KEY: request.hint}
                context = ReqContext(str(number), params, num_prompt_tokens=request.input_tokens)
                self._manager.on_new_request(context)
                self._queue.append(_Waiting(request, context))
                self._schedule()
            self._work_until(math.inf)
        finally:
            if with_collector:
                gc.enable()
        if progress is not None:
            progress(1.0)
        seconds = time.perf_counter() - started
        stats = self._manager.get_stats()
        written = [store for tier in self._engine.tiers for store in tier.written]
        self._manager.check_invariants()
        self._manager.shutdown()
        return Result.of(self._trace, self._setup, self._machine, self.outcomes, stats, written, seconds)

    def _report(self) -> None:
        """Report the progress."""
        # Half of it counts arrivals and half counts served requests, since all may arrive before most are served.
        if self._progress is not None:
            self._progress((self._num_come + len(self.outcomes)) / (2 * len(self._trace.requests)))

    def _work_until(self, end: float) -> None:
        """Process all events before `end`, in order of time."""
        while (now := self._next_event()) < end:
            self._clock.advance_to(now)
            if self._computing is not None and now >= self._free_at:
                self._manager.on_request_finished(self._computing)
                self._computing = None
            if self._engine.tiers:
                self._manager.on_schedule_end(_STEP)
            self._schedule()

    def _next_event(self) -> float:
        """Return the time of the next event: the end of computing or of a transfer, or a deadline; infinity if none."""
        transfers = [at for tier in self._engine.tiers if (at := tier.device.next_end()) is not None]
        if self._computing is not None:
            return min([self._free_at, *transfers])
        deadlines = [waiting.look_at for waiting in self._queue if waiting.is_deferred]
        return min([math.inf, *transfers, *deadlines])

    def _schedule(self) -> None:
        """Run scheduler steps until no request is newly deferred."""
        # A step ends with the plan for the deferred requests. Blocks that the plan declines to load are misses in the
        # next step, so the request may be ready then.
        if self._computing is not None and not self._engine.tiers:
            return
        while self._step():
            self._manager.on_schedule_end(_STEP)

    def _step(self) -> bool:
        """Look up waiting requests; if the accelerator is free, compute the first one that is ready.

        While the accelerator computes, only the first `_LOOKED_UP` requests are looked up, each once, so that their
        loads begin. Return whether a request was deferred and none was computed.
        """
        now, planned = self._clock(), False
        for waiting in self._queue if self._computing is None else islice(self._queue, _LOOKED_UP):
            keys = waiting.request.keys
            if self._computing is not None and waiting.is_known:
                continue
            is_early = waiting.is_deferred and now < waiting.look_at
            if is_early and self._manager.is_still_deferred(keys[0], waiting.context):
                continue
            num_hits, num_pending = self._manager.lookup_prefix(keys, waiting.context)
            waiting.is_known, waiting.is_deferred = True, bool(num_pending)
            if num_pending:
                waiting.look_at, planned = now + self._patience(num_pending), True
            elif self._computing is None:
                self._queue.remove(waiting)
                self._compute(waiting, num_hits)
                return False
        return planned

    def _patience(self, num_pending: int) -> float:
        """Return the seconds after which to look up a deferred request again, if nothing happens before.

        The manager gives up waiting at this time or later.
        """
        computing = self._machine.prefill_seconds(0, num_pending * self._trace.tokens_per_block)
        return min(self._setup.settings.load_deadline or math.inf, computing) + _MOMENT

    def _compute(self, waiting: _Waiting, num_hits: int) -> None:
        """Load the hits, store the other blocks, and note the outcome."""
        manager, request, context, now = self._manager, waiting.request, waiting.context, self._clock()
        keys, by_source = request.keys, _NOTHING
        if num_hits:
            found = keys[:num_hits]
            manager.prepare_load(found, context)
            manager.complete_load(found, context)
            by_source = self._loads.by_source
        if self._engine.tiers:
            manager.on_schedule_end(_STEP)
        computed = [*keys[num_hits:], *request.answer_keys]
        if computed:
            output = manager.prepare_store(computed, context)
            if output is not None and output.keys_to_store:
                manager.complete_store(output.keys_to_store, context)
        saved = min(num_hits * self._trace.tokens_per_block, max(0, request.input_tokens - 1))
        computing = self._machine.prefill_seconds(saved, request.input_tokens)
        self._free_at = now + computing
        self._computing = context
        first_token = self._free_at - request.time + num_hits * self._load_seconds
        self.outcomes.append(
            Outcome(request.time, len(keys), by_source, request.input_tokens, saved, computing, first_token)
        )
        if len(self.outcomes) % _STEP_EVERY == 0:
            self._report()
