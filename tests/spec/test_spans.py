"""Spans of a real engine over a real disk, collected by OpenTelemetry's own SDK."""

import sys
from collections import Counter

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvtier import KVCacheGroup, Namespace, OffloadingConfig, TieringOffloadingSpec, make_offload_key
from kvtier.clock import monotonic_clock
from kvtier.errors import ConfigError
from kvtier.events import RequestWaited, WaitOutcome
from kvtier.recording.reader import read_recording
from kvtier.spans import CASCADE, LOAD, MAX_OPEN, PROMOTION, Spans
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for
from kvtier.types import LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 4096
STEP = ScheduleEndContext()
WAITING = {LookupResult.HIT_PENDING, LookupResult.RETRY}


@pytest.fixture(scope="module")
def exporter():
    """Return what collects spans; a process has one provider for good."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def collected(exporter):
    exporter.clear()
    return exporter.get_finished_spans


class Engine:
    """Serves one prompt after the other over eight blocks of host memory and a disk."""

    def __init__(self, folder, **options):
        disk = {"type": "disk", "path": str(folder / "disk"), "capacity": "1MiB"}
        config = {
            "cpu_bytes_to_use": 8 * BLOCK_BYTES,
            "secondary_tiers": [disk],
            "load_deadline": 60.0,
            "prefill_rate": 0.1,  # whatever the disk has comes sooner than it is computed
            **options,
        }
        self.spec = TieringOffloadingSpec(
            OffloadingConfig(config, (KVCacheGroup(16),), BLOCK_BYTES, Namespace({"model": "traced"}))
        )
        self.spec.wait_for_tiers(PATIENCE_SECONDS)
        self.manager = self.spec.get_manager()

    def serve(self, name, keys):
        """Return the number of loaded blocks."""
        context = ReqContext(name, num_prompt_tokens=16 * len(keys))
        self.manager.on_new_request(context)
        while WAITING.intersection(answers := [self.manager.lookup(key, context) for key in keys]):
            self.manager.on_schedule_end(STEP)
        num_hits = [*answers, LookupResult.MISS].index(LookupResult.MISS)
        if num_hits:
            self.manager.prepare_load(keys[:num_hits], context)
            self.manager.complete_load(keys[:num_hits], context)
        output = self.manager.prepare_store(keys[num_hits:], context)
        if output is not None and output.keys_to_store:
            self.manager.complete_store(output.keys_to_store, context)
        self.manager.on_schedule_end(STEP)
        self.manager.on_request_finished(context)
        return num_hits

    def rest(self):
        """Step until the disk has what it was given."""
        wait_for(lambda: self.manager.on_schedule_end(STEP) or not self.manager.has_pending_work(), "the disk's jobs")


def keys_of(prompt, count=4):
    return [make_offload_key(f"{prompt}/{index}".encode().ljust(32, b"."), 0) for index in range(count)]


def of(spans, name):
    return [span for span in spans if span.name == name]


def test_a_request_that_loads_from_disk_has_its_spans(tmp_path, collected):
    engine = Engine(tmp_path, spans=True)
    for prompt in range(4):
        engine.serve(f"first {prompt}", keys_of(prompt))
        engine.rest()
    assert engine.serve("again", keys_of(0)) == 4
    engine.spec.shutdown()
    spans = collected()
    (load,) = of(spans, LOAD)
    assert load.attributes["kvtier.request"] == "again"
    assert load.attributes["kvtier.outcome"] == "loaded"
    assert load.attributes["kvtier.blocks.disk"] == 4
    promotions, cascades = of(spans, PROMOTION), of(spans, CASCADE)
    assert sum(span.attributes["kvtier.blocks.successful"] for span in promotions) == 4
    assert sum(span.attributes["kvtier.blocks.successful"] for span in cascades) == 16
    assert all(span.attributes["kvtier.requests"] == ("again",) for span in promotions)
    assert all(span.parent.span_id == load.context.span_id for span in promotions)
    assert all(load.start_time <= span.start_time <= span.end_time <= load.end_time for span in promotions)
    assert sum(Counter(name for span in cascades for name in span.attributes["kvtier.requests"]).values()) >= 4
    assert all(span.attributes["kvtier.tier"] == "disk" for span in promotions + cascades)


def test_spans_are_off_unless_they_are_asked_for(tmp_path, collected, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)  # an import of it fails
    engine = Engine(tmp_path)
    engine.serve("one", keys_of(1))
    engine.serve("two", keys_of(1))
    assert engine.manager._watcher is None
    engine.spec.shutdown()
    assert collected() == ()


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvtier\[otel\]'"):
        Engine(tmp_path, spans=True)


def test_a_recording_and_spans_go_together(tmp_path, collected):
    engine = Engine(tmp_path, spans=True, record=str(tmp_path / "live.rec"))
    engine.serve("one", keys_of(1))
    assert engine.serve("two", keys_of(1)) == 4
    engine.spec.shutdown()
    writer = engine.manager._recorder._writer
    wait_for(lambda: writer.poll() is not None, "the process that writes")
    assert {record.kind for record in read_recording(tmp_path / "live.rec")[1]} > {b"N", b"L", b"P"}
    assert [span.attributes["kvtier.blocks.primary"] for span in of(collected(), LOAD)] == [4]


class State:
    """What a watcher sees of a request that does not wait."""

    class wait:
        since, waited, reported = None, 0.0, 0.0

    def __init__(self, req_id):
        self.context = ReqContext(req_id)


def test_requests_that_never_load_are_forgotten(collected):
    spans = Spans(monotonic_clock)
    for number in range(MAX_OPEN + 10):
        spans.on_scan(State(str(number)))
    assert len(spans._open) == MAX_OPEN
    assert collected() == ()


def test_a_wait_that_ends_with_computing_is_a_span_that_says_so(collected):
    spans = Spans(monotonic_clock)
    spans.on_scan(State("late"))
    spans.on_event(RequestWaited("late", WaitOutcome.COMPUTED, 0.5))
    assert [span.attributes["kvtier.outcome"] for span in collected()] == ["computed"]


def test_a_tracer_that_fails_is_not_in_the_way(tmp_path, caplog):
    class Failing:
        def get_tracer(self, *_, **__):
            return self

        def start_span(self, *_, **__):
            raise RuntimeError("no span today")

    spans = Spans(monotonic_clock, Failing())
    for number in range(3):
        spans.on_scan(State(str(number)))
    assert caplog.text.count("a span could not be made") == 1
