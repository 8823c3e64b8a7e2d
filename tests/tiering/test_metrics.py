"""What is counted arrives: every name in `get_stats` is a row of the table, or a tier's own gauge."""

import typing

import pytest
from engine import Engine, make_keys

from kvtier.events import Event, TierState, TierStateChanged
from kvtier.metrics import METRICS, EventCounters, Kind, Source, find_sample
from kvtier.testing.scripted_tier import ScriptedTier

EARLIER_NAMES = """
    kvtier_hit_blocks kvtier_stored_blocks kvtier_evicted_blocks kvtier_read_blocks kvtier_read_bytes
    kvtier_read_seconds kvtier_written_blocks kvtier_written_bytes kvtier_written_seconds kvtier_failed_blocks
    kvtier_refused_blocks kvtier_requests_gave_up
    kvtier_unexpected_calls kvtier_resets kvtier_blocks kvtier_capacity_blocks
    kvtier_quarantined_blocks kvtier_tier_up kvtier_jobs kvtier_lookups kvtier_errors
"""


class TalkativeTier(ScriptedTier):
    """Reports gauges of its own, and some by names that are the manager's."""

    stats: typing.ClassVar = {"blocks": 7, "temperature": 40, "jobs": 99, "up": 5, "breaker_openings": 3}

    def get_stats(self):
        return self.stats


def busy_engine(**settings) -> Engine:
    """Return an engine whose two tiers have stored, loaded, failed and refused."""
    engine = Engine(num_tiers=2, **settings)
    engine.tiers[0].fail = set(make_keys(1, "prefix1"))
    for number in range(12):
        engine.run(make_keys(5, f"prefix{number % 3}"), f"request{number}")
    engine.tiers[1].full = True
    engine.store(make_keys(3, "refused"), engine.request("refused"))
    engine.manager.complete_store(make_keys(1, "never"), engine.request("stray"))
    engine.manager.reset_cache()
    engine.step()
    return engine


def test_every_name_in_get_stats_is_declared():
    engine = busy_engine()
    stats = engine.manager.get_stats()
    for name in stats:
        sample = find_sample(name)
        assert sample is not None, name
        assert len(sample.labels) == len(sample.metric.labels), name
        assert sample.metric.is_in_get_stats, name
    assert {find_sample(name).metric.source for name in stats} == {Source.EVENT, Source.MANAGER, Source.TIER}
    engine.close()


def test_names_are_distinct_and_users_alerts_still_find_theirs():
    exported = [metric.exported for metric in METRICS.values()]
    assert len(exported) == len(set(exported))
    assert set(EARLIER_NAMES.split()) <= set(exported)
    for metric in METRICS.values():
        assert metric.prometheus_name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.kind is Kind.COUNTER or metric.labels == ("tier",)


def test_every_event_moves_a_counter():
    moving = {metric.event for metric in METRICS.values() if metric.source is Source.EVENT}
    assert moving == set(typing.get_args(Event)) - {TierStateChanged}, "states are the manager's to count"


def test_an_event_that_no_row_names_counts_nothing():
    counters = EventCounters()
    counters.on_event(TierStateChanged("tier", TierState.DOWN, "any"))
    assert counters.snapshot() == {}


@pytest.mark.parametrize(
    ("name", "metric", "labels"),
    [
        ("loaded_blocks.disk", "loaded_blocks", ("disk",)),
        ("loaded_blocks.disk.v2", "loaded_blocks", ("disk.v2",)),
        ("failed_blocks.disk.v2.corrupt", "failed_blocks", ("disk.v2", "corrupt")),
        ("unexpected.result of tier disk.v2", "unexpected", ("result of tier disk.v2",)),
        ("resets", "resets", ()),
        ("resets.jobs", "jobs", ("resets",)),
        ("disk.v2.jobs", "jobs", ("disk.v2",)),
        ("down_seconds.disk", "down_seconds", ("disk",)),
    ],
)
def test_a_name_says_metric_and_labels(name, metric, labels):
    assert find_sample(name) == (METRICS[metric], labels)


@pytest.mark.parametrize("name", ["disk.temperature", "blocks", "disk.resets", "failed_blocks.disk", "nonsense", ""])
def test_other_names_are_no_metric(name):
    assert find_sample(name) is None


def test_what_the_manager_reads_is_never_overwritten_by_a_tier(make_engine):
    engine = make_engine(tiers=lambda view: [TalkativeTier(view, "tier0")])
    engine.tier.auto = False
    engine.store(make_keys(3), engine.request("storer"))
    engine.step()
    stats = engine.manager.get_stats()
    assert (stats["tier0.jobs"], stats["tier0.store_jobs_in_flight"], stats["tier0.load_jobs_in_flight"]) == (1, 1, 0)
    assert (stats["tier0.store_blocks_in_flight"], stats["tier0.load_blocks_in_flight"]) == (3, 0)
    assert stats["tier0.up"] == 1
    assert (stats["tier0.blocks"], stats["tier0.temperature"]) == (7, 40)
    assert stats["breaker_openings.tier0"] == 3, "a counter, named as such"


def test_a_load_in_flight_is_counted(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.plant(keys)
    engine.tier.auto = False
    engine.scan(keys, engine.request("loader"))
    engine.step()
    stats = engine.manager.get_stats()
    assert (stats["tier0.load_jobs_in_flight"], stats["tier0.load_blocks_in_flight"]) == (1, 2)
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    stats = engine.manager.get_stats()
    assert (stats["tier0.load_jobs_in_flight"], stats["tier0.load_blocks_in_flight"]) == (0, 0)


def test_a_tier_whose_numbers_are_none_reports_nothing(make_engine):
    class WordyTier(ScriptedTier):
        def get_stats(self):
            return {"blocks": "many"}

    engine = make_engine(tiers=lambda view: [WordyTier(view, "tier0")])
    engine.step()
    assert "tier0.blocks" not in engine.manager.get_stats()
    assert engine.manager.get_stats()["tier0.up"] == 0, "it is left alone as for any other fault"


def test_a_tier_that_goes_down_by_itself_is_counted_and_timed(make_engine):
    engine = make_engine()
    engine.step()
    seen = engine.manager.get_stats()
    assert (seen["tier0.up"], seen["times_up.tier0"], seen["times_down.tier0"]) == (1, 1, 0)
    engine.tier.current_state = TierState.DOWN
    for _ in range(3):
        engine.step()
        engine.clock.advance(5)
    seen = engine.manager.get_stats()
    assert (seen["tier0.up"], seen["times_down.tier0"], seen["down_seconds.tier0"]) == (0, 1, 15)
    engine.tier.current_state = TierState.UP
    engine.step()
    engine.clock.advance(100)
    seen = engine.manager.get_stats()
    assert (seen["tier0.up"], seen["times_up.tier0"], seen["down_seconds.tier0"]) == (1, 2, 15)


def test_a_tier_that_is_left_alone_after_a_fault_is_down(make_engine):
    engine = make_engine()
    engine.step()
    engine.tier.raising = {"get_finished_jobs"}
    engine.step()
    engine.clock.advance(0.5)
    seen = engine.manager.get_stats()
    assert (seen["tier0.up"], seen["times_down.tier0"], seen["down_seconds.tier0"]) == (0, 1, 0.5)


def test_starting_is_not_down(make_engine):
    class OpeningTier(ScriptedTier):
        def __init__(self, *args):
            super().__init__(*args)
            self.current_state = TierState.STARTING

    engine = make_engine(tiers=lambda view: [OpeningTier(view, "tier0")])
    engine.step()
    engine.clock.advance(30)
    seen = engine.manager.get_stats()
    assert (seen["tier0.up"], seen["times_down.tier0"], seen["down_seconds.tier0"]) == (0, 0, 0)


def test_host_memory_says_what_it_holds_in_blocks_and_bytes(make_engine):
    engine = make_engine(num_blocks=8)
    engine.store(make_keys(3), engine.request("storer"))
    stats = engine.manager.get_stats()
    assert (stats["primary.blocks"], stats["primary.bytes"]) == (3, 3 * 4096)
    assert (stats["primary.capacity_blocks"], stats["primary.capacity_bytes"]) == (8, 8 * 4096)
