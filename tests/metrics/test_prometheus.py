"""`kvtier.metrics.collector` with prometheus-client's own registry, server and parser."""

import sys
import urllib.request

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtier import TieringOffloadingSpec
from kvtier.cli.watching.exposition import fetch
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.errors import ConfigError
from kvtier.events import RequestWaited, WaitOutcome
from kvtier.keys import make_offload_key
from kvtier.metrics import METRICS, Kind, collector
from kvtier.metrics.counters import EventCounters
from kvtier.namespace import Namespace
from kvtier.types import ReqContext, ScheduleEndContext


@pytest.fixture(name="spec")
def _spec():
    config = {"cpu_bytes_to_use": "64KiB", "secondary_tiers": [{"type": "memory", "capacity": "1MiB"}]}
    spec = TieringOffloadingSpec(OffloadingConfig(config, (KVCacheGroup(16),), 4096, Namespace({"model": "m"})))
    yield spec
    spec.shutdown()


def store(manager, number):
    """Let a manager store a block, as an engine would."""
    request = ReqContext(f"r{number}")
    manager.on_new_request(request)
    keys = [make_offload_key(number.to_bytes(32, "big"), 0)]
    assert manager.prepare_store(keys, request)
    manager.complete_store(keys, request)
    manager.on_schedule_end(ScheduleEndContext())
    manager.on_request_finished(request)


@pytest.fixture(name="serve")
def _serve():
    """Return a function that serves a registry over HTTP and returns the address."""
    servers = []

    def serve(registry):
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/metrics"

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def of(*labels):
    return frozenset(labels)


def scrape(url):
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {
        (one.name, frozenset(one.labels.values())): one.value for family in families.values() for one in family.samples
    }
    return families, samples


def test_a_scrape_has_every_row_with_its_help_and_the_values_of_now(spec, serve):
    manager, registry = spec.get_manager(), prometheus_client.CollectorRegistry()
    registry.register(collector(manager))
    url = serve(registry)
    store(manager, 1)
    families, samples = scrape(url)
    for metric in METRICS.values():
        if metric.is_in_get_stats:
            family = families[metric.exported]
            assert (family.type, family.documentation) == (metric.kind.value, metric.help)
    assert samples["kvtier_stored_blocks_total", of("device")] == 1
    assert samples["kvtier_capacity_blocks", of("primary")] == 16
    assert samples["kvtier_tier_up", of("memory")] in (0, 1)
    assert samples["kvtier_failed_blocks_total", of("memory", "corrupt")] == 0, "a series begins before its first event"
    store(manager, 2)
    assert scrape(url)[1]["kvtier_stored_blocks_total", of("device")] == 2
    assert fetch(url).total("stored_blocks_total") == 2, "kvtier top reads it"


def test_with_the_engines_prefix_names_are_those_of_the_alerts(spec, serve):
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector(spec.get_manager(), prefix="vllm:"))
    assert ("vllm:kvtier_blocks", of("primary")) in scrape(serve(registry))[1]


def test_histograms_have_the_buckets_of_their_row(serve):
    class Manager:
        counters = EventCounters()

        def get_stats(self):
            return self.counters.snapshot()

        def get_histograms(self):
            return self.counters.histograms()

    for seconds in (0.001, 0.02, 0.025, 1000.0):
        Manager.counters.on_event(RequestWaited("r", WaitOutcome.LOADED, seconds))
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector(Manager()))
    _, samples = scrape(serve(registry))
    name = "kvtier_wait_seconds"
    buckets = [samples[f"{name}_bucket", of("loaded", end)] for end in ("0.001", "0.01", "0.025", "30.0", "+Inf")]
    assert buckets == [1, 1, 3, 3, 4]
    assert samples[f"{name}_count", of("loaded")] == 4
    assert samples[f"{name}_sum", of("loaded")] == pytest.approx(1000.046)


def test_every_label_is_one_of_its_row(spec):
    store(spec.get_manager(), 1)
    known = {metric.exported: metric for metric in METRICS.values()}
    for family in collector(spec.get_manager()).collect():
        for one in family.samples:
            for label in known[family.name].labels:
                values = label.values or ("primary", "memory", "device")
                assert one.labels[label.name] in values or label.name == "call"


def test_a_registry_refuses_a_second_manager(spec):
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector(spec.get_manager()))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(collector(spec.get_manager()))


def test_a_manager_that_was_shut_down_can_be_scraped(spec):
    found = collector(spec.get_manager())
    spec.shutdown()
    assert {family.name for family in found.collect()} >= {
        metric.exported for metric in METRICS.values() if metric.kind is Kind.GAUGE and metric.is_in_get_stats
    }


def test_without_the_client_the_error_says_what_to_install(spec, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ConfigError, match="pip install prometheus-client"):
        collector(spec.get_manager())
