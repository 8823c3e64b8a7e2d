"""How long a request waits for a tier to say whether it has a block: long enough to find it, and no longer."""

import math

import pytest
from engine import make_keys

from kvtier.abc import SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.secondary.object import ObjectTierManager
from kvtier.secondary.resp import RespTierManager
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.tier_config import parse_tier
from kvtier.tiering.patience import FIRST_SECONDS
from kvtier.types import LookupResult

HIT, MISS, PENDING, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY


class KeepingTier(ScriptedTier):
    """A tier that may hold blocks of an earlier engine."""

    persistent = True


def keeping(view):
    return [KeepingTier(view, "keeping")]


def wait_in_vain(engine, keys, name, step_seconds=0.001):
    """Return the seconds that a request is deferred, asked about at every step."""
    context, started = engine.request(name), engine.clock()
    while engine.scan(keys, context)[-1] in (RETRY, PENDING):
        engine.step()
        engine.clock.advance(step_seconds)
        assert engine.clock() - started < 10, "deferred for ever"
    engine.step()
    return engine.clock() - started


def test_an_answer_that_comes_within_a_tiers_own_deadline_is_a_hit(make_engine):
    engine, keys = make_engine(), make_keys(4)
    engine.let_tiers_answer()
    engine.plant(keys)
    engine.tier.unknown = set(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(ScriptedTier.probe_deadline * 0.9)  # far more than the 5 ms that it once had
    assert engine.scan(keys, context) == [RETRY] * 4
    engine.tier.unknown.clear()
    assert engine.wait_hits(keys, context) == 4


def test_the_first_question_of_a_life_may_take_longer(make_engine):
    engine, keys = make_engine(probe_deadline=0.005), make_keys(2)
    engine.plant(keys)
    engine.tier.unknown = set(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(FIRST_SECONDS * 0.9)
    assert engine.scan(keys, context) == [RETRY, RETRY]
    engine.tier.unknown.clear()
    assert engine.wait_hits(keys, context) == 2


def test_so_may_the_first_one_after_the_tier_was_down(make_engine):
    engine, keys = make_engine(probe_deadline=0.005), make_keys(1)
    engine.let_tiers_answer()
    for state in (TierState.DOWN, TierState.UP):
        engine.tier.current_state = state
        engine.step()
    engine.tier.unknown = set(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.clock.advance(FIRST_SECONDS * 0.9)
    assert engine.scan(keys, context) == [RETRY]


def test_a_request_waits_for_a_tier_of_earlier_blocks_to_open(make_engine):
    engine, keys = make_engine(tiers=keeping), make_keys(2)
    engine.tier.current_state = TierState.STARTING
    engine.plant(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [RETRY, RETRY]
    assert not engine.tier.lookups  # it is not asked before it works
    engine.step()
    engine.clock.advance(1.0)
    engine.tier.current_state = TierState.UP
    engine.step()
    assert engine.wait_hits(keys, context) == 2


def test_it_does_not_wait_for_ever_and_those_after_it_hardly_at_all(make_engine):
    engine, keys = make_engine(tiers=keeping, load_deadline=10.0), make_keys(2)
    engine.tier.current_state = TierState.STARTING
    waits = [wait_in_vain(engine, keys, f"request {number}") for number in range(20)]
    assert waits[0] == pytest.approx(FIRST_SECONDS, abs=0.01)
    assert sum(waits) < 3 * FIRST_SECONDS


@pytest.mark.parametrize("tiers", [None, keeping], ids=["holds nothing of before", "has been up before"])
def test_nobody_waits_for_a_tier_that_can_hold_nothing_while_it_starts(make_engine, tiers):
    engine, keys = make_engine(tiers=tiers), make_keys(1)
    if tiers is not None:
        engine.step()  # it is up, and starts again for a new epoch
    engine.tier.current_state = TierState.STARTING
    engine.step()
    assert engine.scan(keys, engine.request()) == [MISS]


def test_a_dead_server_costs_one_request_the_deadline_and_the_others_next_to_nothing(make_engine):
    engine, keys = make_engine(probe_deadline=0.5), make_keys(100)
    engine.let_tiers_answer()
    engine.tier.unknown = set(keys)
    waits = [wait_in_vain(engine, [key], f"request {key}") for key in keys]
    assert waits[0] == pytest.approx(0.5, abs=0.01)
    assert max(waits[5:]) < 0.02
    assert sum(waits) < 3 * 0.5


def test_a_server_that_answers_again_is_trusted_again_though_nobody_waits_for_it(make_engine):
    engine, keys = make_engine(probe_deadline=0.5), make_keys(20)
    engine.let_tiers_answer()
    engine.tier.unknown = set(keys)
    for key in keys[:10]:
        wait_in_vain(engine, [key], f"request {key}")  # all of them are live, and compute
    engine.tier.unknown = set()
    engine.step()  # the late answer
    engine.tier.unknown = set(keys[10:])
    assert wait_in_vain(engine, keys[10:11], "after the late answer") == pytest.approx(0.5 / 4, abs=0.01)
    engine.tier.unknown = set()
    engine.step()
    engine.let_tiers_answer()  # one in time
    engine.tier.unknown = set(keys[10:])
    assert wait_in_vain(engine, keys[11:12], "after one in time") == pytest.approx(0.5, abs=0.01)


def test_a_finished_request_is_never_named_again(make_engine):
    engine, keys = make_engine(), make_keys(1)
    engine.tier.unknown = set(keys)
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.finish(context)
    asked = len(engine.tier.lookups)
    engine.step()
    assert len(engine.tier.lookups) == asked


def test_a_late_answer_counts_for_a_request_that_still_waits_for_another_tier(make_engine):
    engine, keys = make_engine(num_tiers=2, probe_deadline=0.1, load_deadline=10.0), make_keys(2)
    engine.let_tiers_answer()
    engine.plant(keys[:1], tier=1)
    engine.plant(keys, tier=0)
    engine.tiers[0].unknown = set(keys)
    engine.tiers[1].auto = False
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING, RETRY]
    engine.step()
    engine.clock.advance(0.2)
    assert engine.scan(keys, context) == [PENDING, MISS]  # tier 0 has missed its deadline
    engine.step()
    engine.tiers[0].unknown.clear()
    assert engine.scan(keys, context) == [PENDING, PENDING]
    engine.step()
    engine.tiers[1].finish(engine.tiers[1].loads[0])
    assert engine.wait_hits(keys, context) == 2


def test_a_late_answer_is_a_hit_of_the_next_request(make_engine):
    engine, keys = make_engine(probe_deadline=0.1), make_keys(3)
    engine.let_tiers_answer()
    engine.plant(keys)
    engine.tier.unknown = set(keys)
    wait_in_vain(engine, keys, "late")
    engine.tier.unknown.clear()
    assert engine.wait_hits(keys, engine.request("next")) == 3


@pytest.mark.parametrize(("num_blocks", "seconds"), [(1, 0.1), (3, 0.3), (50, 0.5)])
def test_no_request_waits_longer_than_computing_what_it_asks_about_would_take(make_engine, num_blocks, seconds):
    engine = make_engine(probe_deadline=0.5, prefill_rate=1000.0, tokens_per_block=100)
    keys = make_keys(num_blocks)
    engine.let_tiers_answer()
    engine.tier.unknown = set(keys)
    assert wait_in_vain(engine, keys, "r") == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(("measured", "seconds"), [(True, 0.2), (False, 0.5)])
def test_a_measured_rate_limits_the_wait_and_a_guessed_one_does_not(make_engine, measured, seconds):
    """A guess may be ten times too high. It would then turn every answer of a shared store into a miss."""
    engine = make_engine(
        num_blocks=256, probe_deadline=0.5, tokens_per_block=100, prefill_doubling=math.inf, measures_prefill=measured
    )
    engine.let_tiers_answer()
    for number in range(40):  # 500 tokens in half a second
        context, computed = engine.request(f"before {number}"), make_keys(5, f"before {number}")
        engine.scan(computed, context)
        engine.step()
        engine.store(computed, context)
        engine.clock.advance(0.5)
        engine.step()
    keys = make_keys(2)
    engine.tier.unknown = set(keys)
    assert wait_in_vain(engine, keys, "r") == pytest.approx(seconds, abs=0.01)


def test_one_silent_tier_delays_no_other_tiers_hit(make_engine):
    engine, keys = make_engine(num_tiers=3), make_keys(4)
    engine.tiers[0].unknown = engine.tiers[2].unknown = set(keys)
    engine.plant(keys, tier=1)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 4
    engine.step()
    assert engine.scan(keys, context) == [HIT] * 4


@pytest.mark.parametrize(
    ("engines", "tiers", "seconds"),
    [(None, None, ScriptedTier.probe_deadline), (0.1, None, 0.1), (0.1, 0.7, 0.7), (None, 0.7, 0.7)],
)
def test_a_tiers_option_overrides_the_engines_and_that_the_types_default(make_engine, engines, tiers, seconds):
    engine, keys = make_engine(probe_deadline=engines, probe_deadlines=[tiers]), make_keys(1)
    engine.let_tiers_answer()
    engine.tier.unknown = set(keys)
    assert wait_in_vain(engine, keys, "r") == pytest.approx(seconds, abs=0.01)


def test_defaults_fit_the_medium():
    assert (
        SecondaryTierManager.probe_deadline
        < RespTierManager.probe_deadline
        <= FilesystemTierManager.probe_deadline
        < ObjectTierManager.probe_deadline
        < FIRST_SECONDS
    )


@pytest.mark.parametrize("value", [0, -1.0, "fast", True, float("nan"), float("inf"), None])
def test_a_wrong_option_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"secondary_tiers\[0\].probe_deadline"):
        parse_tier({"type": "disk", "probe_deadline": value}, "secondary_tiers[0]")
