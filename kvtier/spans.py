"""OpenTelemetry spans of what requests wait for: from the first lookup to the load, promotions and cascades.

They go to the process's own tracer provider, https://opentelemetry.io/docs/specs/otel/trace/. Without the option
`spans` nothing here is made or called, and `opentelemetry-api` need not be installed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from kvtier.clock import Clock
from kvtier.errors import ConfigError
from kvtier.events import BlocksLoaded, Event, RequestWaited, WaitOutcome
from kvtier.log import logger
from kvtier.secondary.jobs import Job
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.tiering.requests import RequestState

LOAD, PROMOTION, CASCADE = "kvtier load", "kvtier promotion", "kvtier cascade"
EVENTS: tuple[type[Event], ...] = (BlocksLoaded, RequestWaited)
"""What an observer of spans must be told."""
MAX_OPEN = 10_000
"""Most requests whose lookup is remembered. Of a request that neither waits nor loads no end is told."""


class Spans:
    """Makes spans; it watches the manager for lookups and ended jobs, and observes `EVENTS`.

    A load's span begins with the lookup that led to it, or with the first one that had to wait. It ends when the blocks
    are on the device, or the engine computes instead. Promotions for the request are its children. The blocks of a
    cascade may come from several requests, so it has no parent.
    """

    def __init__(self, clock: Clock, provider: Any = None) -> None:
        """Args:
            clock: of the manager.
            provider: a tracer provider; None: the process's own.

        Raises:
            ConfigError: opentelemetry-api is not installed.
        """
        try:
            self._trace = import_module("opentelemetry.trace")
        except ModuleNotFoundError:
            raise ConfigError(
                "spans", True, "false, since opentelemetry-api is not installed: pip install 'kvtier[otel]'"
            ) from None
        self._tracer = self._trace.get_tracer("kvtier", tracer_provider=provider)
        self._clock = clock
        self._open: dict[str, Any] = {}
        self._has_failed = False

    def on_scan(self, state: RequestState) -> None:
        """Begin the span of a request, anew if nothing has made it wait since the last lookup."""
        req_id = state.context.req_id
        if req_id in self._open and (state.wait.since is not None or state.wait.waited > state.wait.reported):
            return
        try:
            self._open.pop(req_id, None)
            self._open[req_id] = self._tracer.start_span(LOAD, attributes={"kvtier.request": req_id})
        except Exception as fault:  # noqa: BLE001 - reported: a span must not be in the engine's way
            self._report(fault)
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]

    def on_job_ended(self, guard: TierGuard, job: Job) -> None:
        """Make the span of a promotion or a cascade, with hindsight."""
        try:
            self._make_job_span(guard.name, job)
        except Exception as fault:  # noqa: BLE001 - reported, as above
            self._report(fault)

    def _make_job_span(self, tier: str, job: Job) -> None:
        contexts = [context for context, _ in job.shares] or [job.req_context]
        parent = self._open.get(job.req_context.req_id) if job.is_promotion else None
        span = self._tracer.start_span(
            PROMOTION if job.is_promotion else CASCADE,
            context=None if parent is None else self._trace.set_span_in_context(parent),
            start_time=time.time_ns() - round((self._clock() - job.submitted) * 1e9),
            attributes={
                "kvtier.tier": tier,
                "kvtier.requests": [context.req_id for context in contexts],
                "kvtier.blocks": len(job.keys),
                "kvtier.blocks.successful": len(job.successful),
                "kvtier.bytes": job.num_bytes,
            },
        )
        span.end()

    def on_poll(self, guards: Sequence[TierGuard]) -> None:
        """Do nothing: whether a tier is used is a metric."""

    def on_event(self, event: Event) -> None:
        """End the span of a request that has loaded, or that goes on without a load."""
        match event:
            case BlocksLoaded(req_id, by_source, num_tokens):
                sources = {f"kvtier.blocks.{source}": count for source, count in by_source.items()}
                self._end(req_id, {"kvtier.outcome": "loaded", "kvtier.tokens": num_tokens, **sources})
            case RequestWaited(req_id, outcome) if outcome is not WaitOutcome.LOADED:
                self._end(req_id, {"kvtier.outcome": outcome.value})

    def _end(self, req_id: str, attributes: dict[str, Any]) -> None:
        span = self._open.pop(req_id, None)
        if span is not None:
            span.set_attributes(attributes)
            span.end()

    def _report(self, fault: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.error("kvtier: a span could not be made, and more may be missing", exc_info=fault)
