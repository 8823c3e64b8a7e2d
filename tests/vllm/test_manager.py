"""The manager as vLLM's scheduler sees it, over kvtier's real one, without an engine."""

import gc
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload import base

import kvtier
from kvtier.adapters.vllm.config_info import config_info
from kvtier.adapters.vllm.manager import FEW_REQUESTS, KVTierOffloadingManager
from kvtier.adapters.vllm.metrics import StatsReporter, metric_definitions
from kvtier.adapters.vllm.spec import KVTierOffloadingSpec
from kvtier.adapters.vllm.translation import EngineReqContext
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.metrics import METRICS, OFF_REASONS, Kind
from kvtier.metrics.counters import Observations
from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tiering.manager import TieringOffloadingManager

KEYS = [base.make_offload_key(bytes([index]) * 32, 0) for index in range(6)]
HIT, MISS = base.LookupResult.HIT, base.LookupResult.MISS


class Core:
    """What CoreHalf offers, with its manager there from the beginning."""

    def __init__(self, **keys):
        config = OffloadingConfig(
            {"cpu_bytes_to_use": "16KiB"} | keys, (KVCacheGroup(16),), 4096, enable_kv_cache_events=True
        )
        self.observations = Observations()
        self.spec = TieringOffloadingSpec(config, observers=[self.observations])
        self.manager = self.spec.get_manager()
        self.control = self.spec.arena.control
        self.shutdown = self.spec.shutdown

    off_reason = None

    def medium_is_storage(self, name):
        return name == "disk"


@pytest.fixture
def core():
    core = Core(secondary_tiers=[{"type": "example"}])
    yield core
    core.shutdown()


@pytest.fixture
def manager(core):
    return KVTierOffloadingManager(core)


def request(manager, name="r", **context):
    made = base.ReqContext(name, **context)
    manager.on_new_request(made)
    return made


def step(manager):
    manager.on_schedule_end(base.ScheduleEndContext((), ()))


def store(manager, keys, context):
    output = manager.prepare_store(keys, context)
    manager.complete_store(set(output.keys_to_store), context)
    return output.keys_to_store


def test_blocks_are_stored_and_loaded(manager):
    context = request(manager)
    assert store(manager, KEYS[:3], context) == KEYS[:3]
    assert [manager.lookup(key, context) for key in KEYS[:4]] == [HIT, HIT, HIT, MISS]
    spec = manager.prepare_load(KEYS[:3], context)
    assert len(spec.block_ids) == 3
    assert isinstance(spec, base.LoadStoreSpec)
    manager.complete_load(set(KEYS[:3]), context)


def fail_load(manager, keys, context):
    """Let a load fail, as the connector reports it; return the number of its slots."""
    slots = manager.prepare_load(keys, context).block_ids
    manager.fail_loads({context.req_id, "a request that has ended"})
    manager.complete_load(set(keys), context)
    step(manager)
    return len(slots)


def test_after_a_load_that_failed_a_request_finds_nothing_more():
    core = Core()
    manager = KVTierOffloadingManager(core)
    context, other = request(manager), request(manager, "other")
    store(manager, KEYS[:2], other)
    assert [manager.lookup(key, context) for key in KEYS[:2]] == [HIT, HIT]
    assert fail_load(manager, KEYS[:2], context) == 2
    assert [manager.lookup(key, other) for key in KEYS[:2]] == [MISS, MISS]
    store(manager, KEYS[:2], other)
    step(manager)
    assert [manager.lookup(key, context) for key in KEYS[:2]] == [MISS, MISS]
    assert [manager.lookup(key, other) for key in KEYS[:2]] == [HIT, HIT]
    assert manager.get_stats().data["data"]["vllm:kvtier_failed_loads"][()] == 1
    core.shutdown()


def test_a_load_of_what_is_not_ready_has_no_slots(manager):
    context = request(manager)
    store(manager, KEYS[:1], context)
    assert fail_load(manager, KEYS[:2], context) == 0
    assert manager.lookup(KEYS[0], request(manager, "other")) is HIT
    stats = manager.get_stats().data["data"]
    assert stats["vllm:kvtier_errors"][("prepare_load",)] == 1
    assert stats["vllm:kvtier_failed_loads"][()] == 1
    assert "vllm:kvtier_unexpected_calls" not in stats


def test_what_cannot_be_placed_is_an_empty_answer_and_never_none(manager):
    context = request(manager)
    assert manager.prepare_store(KEYS, context).keys_to_store == KEYS[:4]
    output = manager.prepare_store(KEYS[4:], context)  # every slot is under a copy
    assert (output.keys_to_store, len(output.store_spec.block_ids)) == ([], 0)
    assert manager.prepare_store([b"odd"], context).keys_to_store == []  # a key of the wrong length


def test_no_exception_reaches_the_engine(core, manager, monkeypatch):
    context = request(manager)

    def fail(*args, **keywords):
        raise ZeroDivisionError("inside")

    methods = [
        "lookup",
        "touch",
        "complete_load",
        "prepare_store",
        "complete_store",
        "on_new_request",
        "on_request_finished",
    ]
    methods += ["on_schedule_end", "has_pending_work", "take_events", "reset_cache", "get_stats"]
    for method in methods:
        monkeypatch.setattr(TieringOffloadingManager, method, fail)
    monkeypatch.setattr(core, "shutdown", fail)
    assert manager.lookup(KEYS[0], context) is MISS
    assert manager.prepare_store(KEYS, context).keys_to_store == []
    for call in (manager.touch, manager.complete_load, manager.complete_store):
        call(KEYS, context)
    assert manager.on_new_request(context) is not None
    manager.on_request_finished(context)
    step(manager)
    assert not manager.has_pending_work()
    assert list(manager.take_events()) == []
    manager.reset_cache()
    stats = manager.get_stats()
    assert stats.data["data"]["vllm:kvtier_errors"][("lookup",)] == 1
    manager.shutdown()
    monkeypatch.undo()


def test_lookups_are_counted_by_answer(core, manager):
    store(manager, KEYS[:2], request(manager, "storer"))
    manager.prepare_store(KEYS[2:3], request(manager, "storing"))
    context = request(manager)
    assert [manager.lookup(key, context) for key in KEYS[:4]] == [HIT, HIT, base.LookupResult.HIT_PENDING, MISS]
    counted = manager.get_stats().data["data"]["vllm:kvtier_lookups"]
    assert counted == {("hit",): 2, ("hit_pending",): 1, ("miss",): 1, ("retry",): 0}


@pytest.mark.parametrize("end", ["on_request_finished", "reset_cache"])
def test_a_scan_ends_with_its_request_and_with_a_reset(core, manager, end):
    context, others = request(manager), request(manager, "others")
    store(manager, KEYS[:2], others)
    assert manager.lookup(KEYS[0], context) is HIT
    if end == "reset_cache":
        manager.reset_cache()
        assert [manager.lookup(key, context) for key in KEYS[:2]] == [MISS, MISS]
    else:
        manager.on_request_finished(context)
        again = request(manager)  # of the same name
        assert [manager.lookup(key, again) for key in KEYS[:3]] == [HIT, HIT, MISS]
    step(manager)
    core.manager.check_invariants()


def test_everything_is_a_miss_before_the_workers_have_attached():
    core = SimpleNamespace(manager=None, off_reason="starting", observations=Observations(), shutdown=lambda: None)
    manager = KVTierOffloadingManager(core)
    context = request(manager)
    assert manager.lookup(KEYS[0], context) is MISS
    assert manager.prepare_store(KEYS, context).keys_to_store == []
    manager.complete_store(set(), context)
    step(manager)
    assert (manager.has_pending_work(), list(manager.take_events())) == (False, [])
    assert manager.get_stats().data["data"]["vllm:kvtier_off"][("starting",)] == 1
    manager.on_request_finished(context)
    manager.shutdown()


def test_a_failed_copy_is_never_served_and_switches_kvtier_off(core, manager):
    context = request(manager)
    store(manager, KEYS[:1], context)
    output = manager.prepare_store(KEYS[1:3], context)
    core.control.count_failure(0)
    manager.complete_store(set(output.keys_to_store), context)
    assert [manager.lookup(key, context) for key in KEYS[:3]] == [MISS, MISS, MISS]
    assert manager.prepare_store(KEYS, context).keys_to_store == []
    core.manager.check_invariants()


def test_a_request_that_went_on_during_a_reset_stores_nothing_until_it_is_looked_up_anew(manager):
    context = request(manager)
    assert store(manager, KEYS[:2], context) == KEYS[:2]
    manager.reset_cache()
    assert store(manager, KEYS[:3], context) == [], "its blocks may be of earlier weights, or another request's by now"
    assert store(manager, KEYS[3:4], request(manager, "later")) == KEYS[3:4]
    assert manager.lookup(KEYS[0], context) is MISS
    step(manager)
    assert store(manager, KEYS[:3], context) == KEYS[:3]


def test_every_reported_metric_is_declared(manager):
    for turn in range(3):
        context = request(manager, f"r{turn}")
        store(manager, KEYS[turn : turn + 3], context)
        for key in KEYS:
            manager.lookup(key, context)
        step(manager)
        manager.on_request_finished(context)
        manager.complete_load({b"never"}, context)
    manager.reset_cache()
    stats, declared = manager.get_stats(), metric_definitions()
    for name, values in stats.data["data"].items():
        for labels in values:
            assert len(labels) == len(declared[name].labelnames), name
    assert stats.data["data"]["vllm:kvtier_stored_blocks"][("device",)] > 0
    assert stats.data["data"]["vllm:kvtier_blocks"][("primary",)] == 0
    manager.lookup(KEYS[0], request(manager, "later"))
    later = manager.get_stats().data["data"]
    assert "vllm:kvtier_stored_blocks" not in later  # counters are since the last report


def test_every_row_of_the_table_arrives_under_its_labels():
    values = {}
    for metric in METRICS.values():
        labels = metric.label_names
        if metric.kind is not Kind.HISTOGRAM:
            values[".".join([metric.name, *labels] if metric.kind is Kind.COUNTER else [*labels, metric.name])] = 3
    reporter, declared = StatsReporter(Observed()), metric_definitions()
    reported = reporter.report(values | {"disk.a_gauge_of_its_own": 1}).data["data"]
    assert reported.keys() == declared.keys()
    assert declared.keys() == {f"vllm:{name}" for row in METRICS.values() for name in (row.exported, row.also) if name}
    for metric in METRICS.values():
        value = [0.5] if metric.kind is Kind.HISTOGRAM else 3
        assert reported[f"vllm:{metric.exported}"][metric.label_names] == value
        if metric.also:
            assert reported[f"vllm:{metric.also}"] == {metric.labels_of_also: value}
            assert declared[f"vllm:{metric.also}"].labelnames == metric.labels_of_also
    risen = reporter.report({name: value + 2 for name, value in values.items()}).data["data"]
    assert risen["vllm:kvtier_tier_down_seconds"] == {("tier",): 2}, "counters are since the last report"
    assert risen["vllm:kvtier_bytes"] == {("tier",): 5}


class Observed:
    """Gives one value of each histogram."""

    def take(self):
        return [(row, row.label_names, 0.5) for row in METRICS.values() if row.kind is Kind.HISTOGRAM]


def test_what_has_not_changed_is_not_reported_again(manager):
    assert manager.get_stats() is not None
    assert manager.get_stats() is None
    context = request(manager)
    manager.prepare_store(KEYS[:1], context)
    changed = manager.get_stats().data["data"]
    assert changed["vllm:kvtier_blocks"] == {("primary",): 1}
    assert "vllm:kvtier_capacity_blocks" not in changed


def test_counters_begin_at_zero_and_count_what_follows(core, manager):
    first = manager.get_stats().data["data"]
    assert first["vllm:kvtier_lookups"] == {("hit",): 0, ("miss",): 0, ("hit_pending",): 0, ("retry",): 0}
    assert first["vllm:kvtier_failed_blocks"][("example", "corrupt")] == 0
    manager.lookup(KEYS[0], request(manager))
    assert manager.get_stats().data["data"]["vllm:kvtier_lookups"] == {("miss",): 1}


def test_requests_are_forgotten_though_kvtier_is_off(core, manager):
    requests = [request(manager, f"live {index}") for index in range(9)]
    for context in requests:
        manager.lookup(KEYS[0], context)
    step(manager)
    manager.prepare_store(KEYS[:1], requests[0])
    core.control.count_failure(0)
    manager.complete_store(KEYS[:1], requests[0])
    for context in requests:
        manager.on_request_finished(context)
    gc.collect()
    contexts = [each for each in gc.get_objects() if isinstance(each, EngineReqContext)]
    # A running scan, and the copy that has failed, may keep one each: no more of either will come.
    assert sum(each.req_id.startswith("live") for each in contexts) <= 2


def test_a_completion_after_the_end_of_its_request_keeps_nothing_of_it(manager):
    ended, other = request(manager, "ended"), request(manager, "other")
    manager.prepare_store(KEYS[:1], ended)
    manager.on_request_finished(ended)
    manager.complete_store(KEYS[:1], ended, success=False)  # no tier keeps it for a cascade
    manager.lookup(KEYS[0], other)  # a manager may keep the request that it was asked for last
    manager.complete_store((), ended)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, EngineReqContext) and each.req_id == "ended"]


def test_a_scan_that_kvtier_answers_by_itself_keeps_no_request(manager):
    given_up, other = request(manager, "given up"), request(manager, "scanned last")
    store(manager, KEYS[:2], other)
    step(manager)
    manager.lookup(KEYS[0], given_up)
    fail_load(manager, KEYS[:2], given_up)
    manager.lookup(KEYS[0], other)
    assert manager.lookup(KEYS[0], given_up) is MISS
    for context in (other, given_up):
        manager.on_request_finished(context)
    step(manager)
    gc.collect()
    contexts = [each for each in gc.get_objects() if isinstance(each, EngineReqContext)]
    assert [each.req_id for each in contexts if each.req_id in ("given up", "scanned last")] in ([], ["scanned last"])


def test_why_kvtier_is_off_is_a_series(core, manager):
    def reasons():
        return {labels[0]: value for labels, value in manager.get_stats().data["data"]["vllm:kvtier_off"].items()}

    assert reasons() == dict.fromkeys(OFF_REASONS, 0), "it is on"
    core.off_reason = "configuration"
    assert reasons() == {"configuration": 1}
    core.off_reason = None
    core.control.count_failure(0)
    manager.complete_store((), request(manager))
    assert reasons() == {"configuration": 0, "failed_copy": 1}


def test_while_kvtier_is_off_no_gauge_keeps_its_last_value(core, manager):
    def gauges(stats):
        values = stats.data["data"]
        return {
            (name, labels): value
            for name, declared in metric_definitions().items()
            if isinstance(declared, base.OffloadingGaugeMetadata) and name != "vllm:kvtier_off"
            for labels, value in values.get(name, {}).items()
        }

    store(manager, KEYS[:2], request(manager))
    step(manager)
    shown = gauges(manager.get_stats())
    assert shown["vllm:kvtier_tier_up", ("example",)] == 1
    assert shown["vllm:kvtier_blocks", ("primary",)] == 2
    core.control.count_failure(0)
    manager.complete_store((), request(manager))
    shown |= gauges(manager.get_stats())
    assert set(shown.values()) == {0}
    assert manager.get_stats() is None, "nothing changes any more"


def test_names_of_vllms_own_dashboards_have_the_same_values(core, manager):
    context = request(manager)
    output = manager.prepare_store(KEYS[:2], context)
    shares = manager.get_stats().data["data"]
    assert shares["vllm:kv_offload_cpu_cache_usage_perc"] == {(): 0.5}
    assert shares["vllm:kv_offload_cpu_cache_write_usage_perc"] == {(): 0.5}
    assert shares["vllm:kv_offload_cpu_cache_read_usage_perc"] == {(): 0}
    manager.complete_store(set(output.keys_to_store), context)
    step(manager)
    written = manager.get_stats().data["data"]
    assert (
        written["vllm:kv_offload_tiering_write_bytes"] == written["vllm:kvtier_written_bytes"] == {("example",): 8192}
    )


def test_vllm_has_the_names_that_kvtier_takes_from_it():
    from vllm.v1.kv_offload.cpu.common import CPUOffloadingMetrics
    from vllm.v1.kv_offload.tiering.base import TieringOffloadingMetrics

    theirs = {value for kind in (CPUOffloadingMetrics, TieringOffloadingMetrics) for value in vars(kind).values()}
    ours = {f"vllm:{metric.also}" for metric in METRICS.values() if metric.also}
    later = {"vllm:kv_offload_tiering_promotion_latency_seconds"}  # in 0.33
    assert ours - theirs <= later


def test_auto_is_accepted():
    core = Core(eviction_policy="auto", cpu_bytes_to_use="64KiB")
    manager = KVTierOffloadingManager(core)
    for turn in range(8):
        context = request(manager, f"r{turn}")
        keys = [base.make_offload_key(bytes([turn, index]) * 16, 0) for index in range(4)]
        manager.touch(keys, context)  # all blocks of a request, before they are stored, as vLLM up to 0.30 does
        assert store(manager, keys, context) == keys
        step(manager)
        manager.on_request_finished(context)
        core.manager.check_invariants()
    assert not manager._stats.errors
    core.shutdown()


def test_load_tier_filters_are_respected(manager):
    store(manager, KEYS[:2], request(manager, "storer"))
    manager.on_request_finished(base.ReqContext("storer"))
    step(manager)
    others = request(manager, "others")
    assert len(store(manager, KEYS[2:6], others)) == 4  # evicts the first two from host memory
    manager.on_request_finished(others)
    step(manager)
    nothing = request(manager, "nothing", load_tier_filter=base.TierFilter(()))
    assert manager.lookup(KEYS[0], nothing) is MISS
    storage = base.TierFilter((base.TierMatcher(medium=base.Medium.STORAGE),))
    assert manager.lookup(KEYS[0], request(manager, "storage", load_tier_filter=storage)) is MISS
    later = SimpleNamespace(matchers=(SimpleNamespace(medium=SimpleNamespace(name="TAPE"), locality=None),))
    assert manager.lookup(KEYS[0], request(manager, "later", load_tier_filter=later)) is MISS
    cpu = base.TierFilter((base.TierMatcher(medium=base.Medium.CPU),))
    assert manager.lookup(KEYS[0], request(manager, "cpu", load_tier_filter=cpu)) is base.LookupResult.HIT_PENDING


def test_stores_and_removals_are_events(manager):
    context = request(manager)
    store(manager, KEYS[:4], context)
    events = list(manager.take_events())
    assert [event.keys for event in events if not event.removed] == [KEYS[:4]]
    assert all(isinstance(event, base.OffloadingEvent) for event in events)
    manager.on_request_finished(context)
    step(manager)
    store(manager, KEYS[4:], request(manager, "next"))
    assert sum(len(event.keys) for event in manager.take_events() if event.removed) == 2


def test_slots_of_running_copies_are_free_when_vllm_reports_their_end(core, manager):
    context = request(manager)
    store(manager, KEYS[:2], context)
    manager.prepare_load(KEYS[:2], context)
    manager.prepare_store(KEYS[2:4], context)
    manager.reset_cache()
    assert core.manager.get_stats()["primary.quarantined_blocks"] == 4
    later = request(manager, "later")
    assert manager.prepare_store(KEYS, later).keys_to_store == []
    manager.on_reset_flushed()
    assert store(manager, KEYS[:4], later) == KEYS[:4]
    core.manager.check_invariants()


def test_after_a_reset_a_completion_is_that_of_a_new_copy(core, manager):
    context = request(manager)
    store(manager, KEYS[:1], context)
    manager.prepare_store(KEYS[1:2], context)
    manager.prepare_load(KEYS[:1], context)
    manager.reset_cache()  # vLLM drops the reports of both copies
    assert manager.lookup(KEYS[0], context) is MISS  # it was preempted, and is looked up anew
    step(manager)
    assert store(manager, KEYS[:2], context) == KEYS[:2]
    manager.prepare_load(KEYS[:1], context)
    manager.complete_load({KEYS[0]}, context)
    stats = core.manager.get_stats()
    assert stats["primary.quarantined_blocks"] == 2, "the old copies may still be running"
    assert [manager.lookup(key, context) for key in KEYS[:2]] == [HIT, HIT]
    manager.on_request_finished(context)
    manager.on_reset_flushed()
    step(manager)
    stats = core.manager.get_stats()
    assert not any(stats[f"primary.{name}"] for name in ("quarantined_blocks", "reading_share", "filling_share"))
    core.manager.check_invariants()


def test_a_request_of_the_same_name_ends_no_load_of_an_earlier_one_from_another_slot(core, manager):
    context, other = request(manager), request(manager, "other")
    store(manager, KEYS[:1], other)
    (old,) = manager.prepare_load(KEYS[:1], context).block_ids
    manager.on_request_finished(context)
    fail_load(manager, KEYS[:1], other)
    store(manager, KEYS[:1], other)
    again = request(manager)
    assert manager.lookup(KEYS[0], again) is HIT
    (new,) = manager.prepare_load(KEYS[:1], again).block_ids
    assert new != old
    manager.complete_load({KEYS[0]}, again)  # the old load may still be running
    step(manager)
    assert old not in manager.prepare_store(KEYS[1:], again).store_spec.block_ids
    manager.complete_load({KEYS[0]}, again)
    core.manager.check_invariants()
    assert core.manager.get_stats()["primary.quarantined_blocks"] == 0


def test_one_row_per_tier_tells_the_configuration(tmp_path):
    tiers = [
        {"type": "disk", "name": "nvme", "path": str(tmp_path / "disk"), "capacity": "1MiB", "eviction_policy": "arc"},
        {"type": "memory", "capacity": "2MiB"},
        {"type": "example"},
    ]
    core = Core(secondary_tiers=tiers)
    try:
        rows = config_info(core.spec)
        assert list(KVTierOffloadingManager(core, info=rows).config_info()) == rows
    finally:
        core.shutdown()
    assert all(tuple(row) == KVTierOffloadingSpec.config_info_keys({}) for row in rows)
    short = [(row["tier"], row["type"], row["capacity_bytes"], row["eviction_policy"]) for row in rows]
    assert short == [
        ("primary", "host memory", str(16 << 10), "lru"),
        ("nvme", "disk", str(1 << 20), "arc"),
        ("memory", "memory", str(2 << 20), ""),
        ("example", "example", "", ""),
    ]
    assert {row["kvtier_version"] for row in rows} == {kvtier.__version__}
    assert rows[0]["huge_pages"] in ("", "always", "within_size", "advise", "never", "deny", "force")


class RackTier(ExampleSecondaryTierManager):
    def __init__(self, offloading_spec, primary_kv_view, tier_type, *, capacity):
        super().__init__(offloading_spec, primary_kv_view, tier_type)


def test_what_a_users_own_tier_calls_capacity_need_not_be_a_size():
    core = Core(secondary_tiers=[{"type": "RackTier", "module_path": __name__, "capacity": "two racks"}])
    try:
        assert [row["capacity_bytes"] for row in config_info(core.spec)] == [str(16 << 10), ""]
    finally:
        core.shutdown()


@pytest.mark.skipif(not hasattr(OffloadingConnectorStats, "set_info"), reason="VLLM BEFORE 0.33 HAS NO SUCH METRIC")
def test_vllm_takes_the_configuration_as_it_is(core):
    stats = OffloadingConnectorStats()
    stats.set_info(KVTierOffloadingManager(core, info=config_info(core.spec)).config_info())
    assert [row["tier"] for row in stats.data["info"]] == ["primary", "example"]


def test_if_nothing_is_looked_up_the_log_says_once_what_that_means(manager, log):
    for number in range(2 * FEW_REQUESTS):
        manager.on_request_finished(request(manager, f"r{number}"))
    (said,) = [line for line in log.messages if "looked up nothing" in line]
    assert said.startswith("kvtier: ")


def test_nothing_is_said_once_something_was_looked_up(manager, log):
    manager.lookup(KEYS[0], request(manager, "first"))
    for number in range(2 * FEW_REQUESTS):
        manager.on_request_finished(request(manager, f"r{number}"))
    assert not [line for line in log.messages if "looked up nothing" in line]


def test_the_line_in_the_log_has_five_numbers():
    from kvtier.adapters.vllm.connector import KVTierConnector

    made = KVTierConnector.build_kv_connector_stats()
    made.increase_counter("vllm:kvtier_saved_tokens", 256, ("disk",))
    made.increase_counter("vllm:kvtier_saved_tokens", 128.0, ("primary",))
    made.increase_counter("vllm:kvtier_saved_seconds", 1.234, ("disk",))
    made.observe_histogram("vllm:kvtier_wait_seconds", 0.25, ("loaded",))
    made.observe_histogram("vllm:kvtier_wait_seconds", 0.5, ("computed",))
    made.increase_counter("vllm:kvtier_stored_blocks", 7, ("device",))
    made.increase_counter("vllm:kvtier_stored_blocks", 2, ("disk",))
    made.set_gauge("vllm:kvtier_jobs", 3, ("disk",))
    total = KVTierConnector.build_kv_connector_stats(made.data).aggregate(
        KVTierConnector.build_kv_connector_stats(made.data)
    )
    assert total.reduce() == {
        "kvtier: tokens loaded": 768,
        "seconds of computing saved": 2.5,
        "seconds waited": 1.5,
        "blocks stored": 14,
        "blocks failed": 0,
    }
