"""What is counted arrives: every name in `get_stats` is a row of the table, or a tier's own gauge."""

import dataclasses
import math
import typing

import pytest
from engine import Engine, EventLog, make_keys

from kvtier.events import (
    BlocksEvicted,
    BlocksRecomputed,
    BlocksStored,
    Event,
    RequestWaited,
    TierState,
    TierStateChanged,
    WaitOutcome,
)
from kvtier.metrics import METRICS, Kind, Source
from kvtier.metrics.counters import MAX_OBSERVATIONS, EventCounters, Observations, find_sample, zero_counts
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.tiering.evicted_keys import EvictedKeys

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
    exported = [name for metric in METRICS.values() for name in (metric.exported, metric.also) if name]
    assert len(exported) == len(set(exported))
    assert set(EARLIER_NAMES.split()) <= set(exported)
    series = [series for metric in METRICS.values() for series in metric.series_of(metric.exported)]
    assert len(series) == len(set(series))
    for metric in METRICS.values():
        assert metric.series_of("name")[0].endswith("_total") == (metric.kind is Kind.COUNTER)
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert metric.kind is not Kind.GAUGE or len(metric.labels) == 1
        assert not metric.is_in_get_stats or metric.kind is not Kind.GAUGE or metric.label_names == ("tier",)


def test_labels_have_no_other_values_than_those_that_are_declared():
    engine = busy_engine()
    for name in engine.manager.get_stats():
        metric, values = find_sample(name)
        for label, value in zip(metric.labels, values, strict=True):
            if label.name in ("tier", "source"):
                assert value in ("device", "primary", "tier0", "tier1"), name
            elif label.name == "call":
                assert value.split()[0] in ("complete_load", "complete_store", "result"), name
            else:
                assert value in label.values, name
    engine.close()


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
        ("wait_seconds_count.loaded", "wait_seconds", ("loaded",)),
        ("promotion_seconds_sum.disk.v2.failure", "promotion_seconds", ("disk.v2", "failure")),
    ],
)
def test_a_name_says_metric_and_labels(name, metric, labels):
    assert find_sample(name) == (METRICS[metric], labels)


@pytest.mark.parametrize(
    "name",
    [
        "disk.temperature",
        "blocks",
        "disk.resets",
        "failed_blocks.disk",
        "wait_seconds.loaded",
        "wait_seconds_count",
        "nonsense",
        "",
    ],
)
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


def test_counts_whose_labels_are_known_can_begin_at_zero():
    zeros = zero_counts("primary", ["disk"])
    assert set(zeros.values()) == {0}
    assert zeros.keys() >= {"loaded_blocks.primary", "failed_blocks.disk.corrupt", "gave_up.deadline", "resets"}
    assert not zeros.keys() & {"promoted_blocks.primary", "unexpected.complete_load", "wait_seconds_count.loaded"}
    assert all(find_sample(name) is not None for name in zeros)


def test_blocks_that_a_tier_had_are_not_counted_as_written(make_engine):
    engine = make_engine(tiers=lambda view: [ForgettingTier(view, "tier0")])
    engine.tier.had = set(make_keys(2))
    engine.store(make_keys(5), engine.request("storer"))
    engine.step()
    stats = engine.manager.get_stats()
    assert (stats["cascaded_blocks.tier0"], stats["cascaded_bytes.tier0"]) == (3, 3 * 4096)


class ForgettingTier(ScriptedTier):
    """Has some blocks already, and tells how many bytes it wrote for the others."""

    had: typing.ClassVar = set()

    def get_finished_jobs(self):
        for result in super().get_finished_jobs():
            yield dataclasses.replace(result, transfer_bytes=result.transfer_bytes - 4096 * len(self.had))


@pytest.mark.parametrize("end", ["load", "compute", "begin", "finish", "reset"])
def test_a_wait_is_reported_once_with_how_it_ended(make_engine, end):
    engine, keys = make_engine(tokens_per_block=16, prefill_rate=1.0), make_keys(2)
    observations = Observations()
    engine.manager._observer.add(observations)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request("waiter")
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(0.25)
    if end == "load":
        engine.tier.finish(engine.tier.waiting[0])
        engine.step()
        assert engine.hits(keys, context) == 2
        engine.load(keys, context)
        outcome = "loaded"
    elif end == "compute":
        engine.store(make_keys(1, "own"), context)
        outcome = "computed"
    elif end == "begin":
        engine.step(new=["waiter"])
        outcome = "computed"
    elif end == "finish":
        engine.finish(context)
        outcome = "cancelled"
    else:
        engine.manager.reset_cache()
        outcome = "cancelled"
    if end != "finish":
        engine.step()
        engine.finish(context)
    stats = engine.manager.get_stats()
    waits = {name: value for name, value in stats.items() if name.startswith("wait_seconds") and value}
    assert waits == {f"wait_seconds_count.{outcome}": 1, f"wait_seconds_sum.{outcome}": 0.25}
    kept = [(metric.name, *values) for metric, *values in observations.take()]
    assert ("wait_seconds", (outcome,), 0.25) in kept
    assert list(observations.take()) == []


def test_a_request_that_did_not_wait_is_no_wait(make_engine):
    engine = make_engine()
    engine.run(make_keys(3), "first")
    assert "wait_seconds_count.computed" not in engine.manager.get_stats()


def test_what_hits_save_is_counted_in_tokens_and_seconds(make_engine):
    engine = make_engine(tokens_per_block=16, prefill_rate=100.0, prefill_doubling=math.inf)
    engine.plant(make_keys(3))
    assert engine.run(make_keys(3), "loader") == 3
    stats = engine.manager.get_stats()
    assert (stats["saved_tokens.tier0"], stats["saved_seconds.tier0"]) == (48, pytest.approx(0.48))
    engine.run(make_keys(3), "again")
    stats = engine.manager.get_stats()
    assert (stats["saved_tokens.primary"], stats["saved_tokens.tier0"]) == (48, 48)


def test_blocks_of_unknown_length_save_no_tokens(make_engine):
    engine = make_engine()
    engine.run(make_keys(3), "first")
    assert engine.run(make_keys(3), "second") == 3
    assert engine.manager.get_stats()["saved_tokens.primary"] == 0


def test_blocks_that_were_evicted_and_computed_again_are_estimated():
    engine, count = Engine(num_blocks=1000, num_tiers=0), 1000
    for name in ("first", "second", "third"):
        for start in range(0, count, 5):  # whatever a store evicts, one block in 13 is remembered
            engine.run(make_keys(count, name)[start : start + 5], f"{name}{start}")
    assert "recomputed_blocks.primary" not in engine.manager.get_stats()
    engine.run(make_keys(count, "first"), "again")
    counted = engine.manager.get_stats()["recomputed_blocks.primary"]
    assert counted == pytest.approx(count, rel=0.3)
    engine.run(make_keys(count, "first"), "a hit")
    assert engine.manager.get_stats()["recomputed_blocks.primary"] == counted
    engine.close()


def test_blocks_that_a_reset_would_have_taken_anyway_are_not_counted_as_evicted():
    engine = Engine(num_blocks=200, num_tiers=0)
    for name in ("first", "second"):
        engine.run(make_keys(200, name), name)
    engine.manager.reset_cache()
    engine.run(make_keys(200, "first"), "again")
    assert "recomputed_blocks.primary" not in engine.manager.get_stats()
    engine.close()


def test_evicted_keys_are_forgotten_in_halves():
    log = EventLog()
    evicted, keys = EvictedKeys(log, 8, 1, 1), make_keys(12)
    for key in keys:
        evicted.on_event(BlocksEvicted("tier0", [key]))
    evicted.on_event(BlocksStored(keys))
    assert log.of(BlocksRecomputed) == [BlocksRecomputed("tier0", 4)], "the last full half"
    evicted.on_event(BlocksStored(keys))
    evicted.on_event(BlocksEvicted("tier0", keys[:1]))
    evicted.on_event(BlocksStored(keys[:1], "tier1"))
    assert len(log.events) == 1, "neither what was counted nor what a tier brought counts again"
    evicted.on_event(BlocksStored(keys[:1]))
    assert log.events[1:] == [BlocksRecomputed("tier0", 1)]


def test_the_latency_of_a_promotion_is_that_of_the_manager(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.plant(keys)
    engine.tier.auto = False
    engine.scan(keys, engine.request("loader"))
    engine.step()
    engine.clock.advance(0.125)
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    stats = engine.manager.get_stats()
    assert stats["promotion_seconds_count.tier0.success"] == 1
    assert stats["promotion_seconds_sum.tier0.success"] == 0.125
    assert stats["promoted_seconds.tier0"] == 0, "which is what the tier says"
    assert stats["failed_promotions.tier0"] == 0


def test_a_job_of_which_a_block_fails_is_a_failed_job(make_engine):
    engine, keys = make_engine(), make_keys(2)
    engine.plant(keys)
    engine.tier.fail = {keys[1]}
    engine.scan(keys, engine.request("loader"))
    engine.step()
    engine.store(make_keys(1, "own"), engine.request("storer"))
    engine.tier.fail = set(make_keys(1, "other"))
    engine.store(make_keys(1, "other"), engine.request("storer"))
    engine.step()
    stats = engine.manager.get_stats()
    assert (stats["failed_promotions.tier0"], stats["failed_cascades.tier0"]) == (1, 1)
    assert stats["promotion_seconds_count.tier0.failure"] == 1


def test_the_shares_of_host_memory_that_are_in_use(make_engine):
    engine = make_engine(num_blocks=8)
    engine.tier.auto = False
    context = engine.request("storer")
    output = engine.manager.prepare_store(make_keys(4), context)
    stats = engine.manager.get_stats()
    assert (stats["primary.pinned_share"], stats["primary.filling_share"], stats["primary.reading_share"]) == (
        0.5,
        0.5,
        0,
    )
    engine.manager.complete_store(output.keys_to_store, context)
    stats = engine.manager.get_stats()
    assert (stats["primary.pinned_share"], stats["primary.filling_share"], stats["primary.reading_share"]) == (
        0.5,
        0,
        0.5,
    )
    assert (stats["tier0.storing_share"], stats["tier0.loading_share"]) == (0.5, 0)


def test_values_that_nobody_takes_are_bounded():
    observations, metric = Observations(), METRICS["wait_seconds"]
    for number in range(2 * MAX_OBSERVATIONS):
        observations.on_event(RequestWaited("r", WaitOutcome.LOADED, number))
    kept = list(observations.take())
    assert len(kept) == MAX_OBSERVATIONS
    assert kept[-1] == (metric, ("loaded",), 2 * MAX_OBSERVATIONS - 1)
