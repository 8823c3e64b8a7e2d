"""What is worth loading follows from measured speeds; the measures agree with what was measured."""

import itertools
import math

import pytest
from engine import BLOCK_BYTES, make_keys
from hypothesis import given
from hypothesis import strategies as st

from kvtier.events import RequestGaveUp
from kvtier.tiering.estimate import HERE, Outlook, PrefillSpeed, TierSpeed, Turnover, choose_prefix
from kvtier.tiering.pace import Pace
from kvtier.tiering.requests import RequestState
from kvtier.tiering.settings import TieringSettings
from kvtier.types import LookupResult, ReqContext

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
DEFERRED = {PENDING, LookupResult.RETRY}


NOTHING_ELSE = Outlook()


def choose(num_blocks, saved, per_block, outlook=NOTHING_ELSE, latency=0.0, **more):
    return choose_prefix([0] * num_blocks, [saved] * num_blocks, {0: latency}, {0: per_block}, outlook, **more)


def test_a_tier_that_is_faster_than_computing_brings_everything():
    assert choose(10, saved=1.0, per_block=0.5).num_blocks == 10


def test_a_tier_that_is_slower_brings_what_comes_before_the_request_s_turn():
    assert choose(10, saved=0.5, per_block=1.0).num_blocks == 0
    assert choose(10, saved=0.5, per_block=1.0, outlook=Outlook(turn_in=3.5, idle_in=3.5)).num_blocks == 3


def test_a_few_blocks_are_not_worth_a_long_latency():
    assert choose(3, saved=0.1, per_block=0.01, latency=0.5).num_blocks == 0
    assert choose(30, saved=0.1, per_block=0.01, latency=0.5).num_blocks == 30


def test_blocks_that_are_here_are_worth_the_load_that_leads_to_them():
    sources = [0, 0, *[HERE] * 8]
    assert choose_prefix(sources, [0.5] * 10, {0: 0.0}, {0: 1.0}, Outlook()).num_blocks == 10


def test_who_is_behind_gains_from_what_is_not_computed():
    alone, followed = Outlook(0.0, 100.0), Outlook(0.0, 100.0, num_behind=3)
    assert choose(10, saved=0.5, per_block=1.0, outlook=alone).num_blocks == 0
    assert choose(10, saved=0.5, per_block=1.0, outlook=followed).num_blocks == 10


@given(
    st.integers(1, 60),
    st.floats(1e-4, 0.1),
    st.floats(0.0, 0.01),
    st.floats(1e-4, 0.1),
    st.floats(0.0, 1.0),
    st.tuples(st.floats(0.0, 4.0), st.floats(0.0, 4.0), st.integers(0, 5)),
    st.integers(1, 4),
    st.floats(0.0, 3.0),
)
def test_the_best_prefix_out_of_one_tier_is_the_best_of_all(count, first, growth, each, begins, others, stride, waits):
    """The rule for one tier looks at few lengths; two tiers of the same speed are looked at block by block."""
    outlook = Outlook(others[0], max(others[:2]), others[2])
    saved = [first + growth * index for index in range(count)]

    def gain(length):
        before, after = outlook.cost(waits), outlook.cost(max(waits, begins + length * each) if length else waits)
        return outlook.gain(sum(saved[:length])) + before - after

    choice = choose_prefix([0] * count, saved, {0: begins}, {0: each}, outlook, stride, waits)
    assert choice.num_blocks % stride == 0
    assert choice.gain == pytest.approx(gain(choice.num_blocks), abs=1e-6)
    assert choice.gain == pytest.approx(max(gain(length) for length in range(0, count + 1, stride)), abs=1e-6)


def test_a_prefix_ends_where_every_group_can_hit():
    outlook = Outlook(turn_in=3.0, idle_in=3.0)
    assert choose(10, saved=0.5, per_block=1.0, outlook=outlook, stride=2).num_blocks == 2


def test_computing_takes_longer_with_context():
    speed = PrefillSpeed(1000.0, doubling=10_000)
    assert speed.seconds(0, 1000) == pytest.approx(1.05)
    assert speed.seconds(10_000, 11_000) == pytest.approx(2.05)
    assert PrefillSpeed(1000.0, math.inf).seconds(10_000, 11_000) == pytest.approx(1.0)


@pytest.mark.parametrize("gap", [0.0, 0.01, 0.04])
def test_bandwidth_and_latency_are_found_whatever_the_time_between_polls(gap):
    """A tier of 100 blocks per second and 50 ms, driven with four parts of eight blocks at a time."""
    speed, now = TierSpeed(bandwidth=10_000.0), 0.0
    for _ in range(12):
        ends = [now + 0.05 + 0.08 * (part + 1) for part in range(4)]
        for _ in ends:
            speed.begin(8, now)
        while ends:
            now = now + gap if gap else ends[0]
            landed = [end for end in ends if end <= now]
            ends = ends[len(landed) :]
            if landed:
                speed.end(8 * len(landed), 8 * len(landed), now, seen_at_once=not gap)
            speed.poll(now)
        now += 1.0
        speed.poll(now)
    assert speed.seconds(32, now) == pytest.approx(0.37, rel=0.5)


def test_what_is_overdue_is_taken_for_a_slower_tier():
    speed = TierSpeed(latency=0.0, bandwidth=100.0)
    speed.begin(10, 0.0)
    assert speed.seconds(10, 0.05) == pytest.approx(0.15)
    assert speed.seconds(10, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("num_moved", [0, 8])
def test_a_tier_is_measured_seldom_though_all_blocks_fail(num_moved):
    speed = TierSpeed(latency=0.01, bandwidth=100.0)
    for second in range(20):
        speed.poll(float(second))
    assert speed.needs_probe(8)
    speed.begin(8, 19.0)
    speed.end(8, num_moved, 19.1)
    speed.poll(19.1)
    assert not speed.needs_probe(8)


@pytest.mark.parametrize("num_blocks", [10, 100, 300])
def test_a_memory_turns_over_when_as_many_blocks_were_loaded_as_it_has_slots(num_blocks):
    turnover, now = Turnover(100), 0.0
    for _ in range(40):
        turnover.note_load(num_blocks, now)
        turnover.note_load(0, now + 0.25)  # all of a request's blocks were promoted
        now += 0.5
    assert turnover.seconds == pytest.approx(max(0.5, 50 / num_blocks))
    for _ in range(40):  # another load finds twice as much in the same time
        turnover.note_load(2 * num_blocks, now)
        now += 0.5
    assert turnover.seconds == pytest.approx(max(0.5, 25 / num_blocks), rel=0.01)


@pytest.mark.parametrize(("num_hits", "is_fast"), [(20, False), (20, True), (2, False)])
def test_blocks_come_no_earlier_than_the_slots_that_they_take_pay_for(make_engine, num_hits, is_fast):
    """Computing a block takes 0.1 s, and loading it from the slow tier 0.2 s. The turn of the second request
    comes in 9 s.

    A fast tier soon brings back what gives way, so it may be asked at once.
    """
    engine = make_engine(
        num_blocks=40,
        said_bytes=BLOCK_BYTES if is_fast else 2 * 10**9,
        tokens_per_block=100,
        prefill_rate=1000.0,
        measures_prefill=False,
    )
    kept, asked = make_keys(20, "kept"), make_keys(8, "asked")
    engine.store(kept, engine.request("writer"))
    land_all(engine)
    for number in range(20):  # a second of computing each, so that a slot brings a hit in 2 s or in 20 s
        context, prompt = engine.request(f"reader {number}"), [*kept[:num_hits], *make_keys(10, f"new {number}")]
        assert engine.hits(prompt, context) == num_hits
        engine.load(prompt[:num_hits], context)
        engine.store(prompt, context)
        land_all(engine)
        engine.finish(context)
        engine.clock.advance(100.0)
        engine.step()
    engine.plant(asked)
    long_prompt, first, second = make_keys(80, "first"), engine.request("first"), engine.request("second")
    engine.scan(long_prompt, first)
    engine.store(long_prompt, first)
    land_all(engine)
    engine.scan(asked, second)
    engine.step()
    assert bool(engine.tier.loads) is (is_fast or num_hits == 2)
    engine.clock.advance(7.0)
    engine.scan(asked, second)
    engine.step()
    assert engine.tier.loads


def load(engine, name, num_blocks=16, seconds=0.02, patience=1.0):
    """A prompt that a tier has: look at it every 2 ms until its blocks are there or given up; return the hits."""
    keys, context, waited = make_keys(num_blocks, name), engine.request(name), 0.0
    engine.plant(keys)
    while DEFERRED & set(answers := engine.scan(keys, context)) and waited < patience:
        engine.step()
        engine.clock.advance(0.002)
        waited += 0.002
        if waited >= seconds:
            land_all(engine)
    engine.finish(context)
    engine.step()
    return answers.count(HIT)


def land_all(engine):
    for job in list(engine.tier.waiting):
        engine.tier.finish(job)


@pytest.fixture
def slow_paced(make_engine):
    """An engine that computes 16 blocks in 0.4 s, over a tier that answers when told to."""
    engine = make_engine(num_blocks=600, tokens_per_block=256, prefill_rate=10_000.0)
    engine.tier.auto = False
    assert [load(engine, name) for name in "ab"] == [16, 16]
    return engine


def test_a_pause_of_an_idle_engine_is_not_the_time_that_a_load_took(slow_paced):
    engine, keys, context = slow_paced, make_keys(16, "aborted"), slow_paced.request("aborted")
    engine.plant(keys)
    engine.scan(keys, context)
    engine.step()
    engine.finish(context)
    land_all(engine)
    engine.clock.advance(120.0)  # nothing to do, so nobody polls
    assert [load(engine, name) for name in "cdef"] == [16] * 4


def test_the_time_in_which_a_model_runs_without_polls_is_not_the_time_that_a_load_took(slow_paced):
    engine = slow_paced
    assert load(engine, "slow once", seconds=math.inf) == 0
    engine.clock.advance(20.0)
    land_all(engine)
    engine.store(make_keys(2, "answer"), engine.request("answer"))
    engine.finish(engine.request("answer"))
    land_all(engine)
    engine.step()
    assert [load(engine, name) for name in "cdef"] == [16] * 4


def work(engine, takes=0.02, seconds=4.0):
    """The engine computes others, and polls at every step. The tier answers `takes` seconds after it is asked."""
    waited: dict[int, float] = {}
    for _ in range(round(seconds / 0.02)):
        engine.step()
        engine.clock.advance(0.02)
        for job in list(engine.tier.waiting):
            waited[job.job_id] = waited.get(job.job_id, 0.0) + 0.02
            if waited[job.job_id] >= takes:
                engine.tier.finish(job)


def test_after_one_slow_load_a_tier_is_tried_again(slow_paced):
    engine = slow_paced
    assert load(engine, "slow once", seconds=2.0, patience=3.0) == 0
    work(engine, takes=2.0)
    hits = []
    for number in range(16):
        work(engine)
        hits.append(load(engine, f"after {number}"))
    assert hits[8:] == [16] * 8


def test_a_slow_tier_is_tried_seldom(slow_paced):
    engine = slow_paced
    for number in range(60):
        work(engine, takes=2.0)
        load(engine, f"slow {number}", seconds=2.0, patience=3.0)
    num_tried = len({key for job in engine.tier.loads for key in job.keys}) // 16 - 2
    assert 1 <= num_tried <= 60 * 4 // 30


def test_no_probe_delays_a_load_that_shows_the_speed_as_well(make_engine):
    """The tier is taken to load 19 blocks per second, of which the engine computes 39."""
    engine = make_engine(
        num_blocks=600, tokens_per_block=256, prefill_rate=10_000.0, measures_prefill=False, said_bytes=1 << 29
    )
    engine.tier.auto = False
    work(engine, seconds=20.0)  # longer than it takes until a probe is due
    context, keys = engine.request("computed"), make_keys(40, "waits")
    engine.scan(make_keys(40, "computed"), context)
    engine.step()
    engine.store(make_keys(40, "computed"), context)  # for a second
    engine.plant(keys)
    engine.scan(keys, engine.request("waits"))
    engine.step()
    assert [event.reason for event in engine.log.of(RequestGaveUp)] == ["slower"]
    asked = [key for job in engine.tier.loads for key in job.keys]
    assert asked
    assert all(key in engine.table for key in asked)  # a probe's blocks do not enter the cache


@pytest.mark.parametrize(("prompt", "seconds"), [(None, 2.0), (200, 2.0), (150, 1.5), (50, 0.5)])
def test_computing_ends_with_the_prompt_and_not_with_its_last_block(prompt, seconds):
    pace = Pace(TieringSettings(prefill_rate=100.0, prefill_doubling=math.inf, tokens_per_block=100))
    state, keys = RequestState(ReqContext("r", num_prompt_tokens=prompt), 0.0), make_keys(2)
    state.scan.keys = keys
    pace.note_scan(state)
    pace.end_step(0.0)
    pace.note_store(state, keys)
    assert pace.computed == pytest.approx(seconds)


def test_a_small_first_load_does_not_make_a_tier_slow_for_good(make_engine):
    engine = make_engine(num_blocks=6000, tokens_per_block=16, prefill_rate=10_000.0)
    engine.tier.auto = False
    load(engine, "small", num_blocks=4, seconds=0.01)
    hits = []
    for number in range(16):
        work(engine)
        hits.append(load(engine, f"large {number}", num_blocks=500, seconds=0.01))
    assert hits[8:] == [500] * 8


@pytest.mark.parametrize(("num_blocks", "slowest"), [(1, 0.15), (1000, 0.15)])
def test_a_first_measurement_is_booked_where_most_of_the_time_was_expected(num_blocks, slowest):
    """Ten times as slow as expected: a small job shows ten times the latency, a large one a tenth of the bandwidth."""
    speed = TierSpeed(latency=0.001, bandwidth=10_000.0)
    took = 10 * (0.001 + num_blocks / 10_000)
    speed.begin(num_blocks, 0.0)
    speed.poll(took - 0.001)
    speed.end(num_blocks, num_blocks, took)
    assert speed.seconds(num_blocks, took) == pytest.approx(took, rel=0.1)
    assert speed.seconds(1001 - num_blocks, took) < slowest


@pytest.mark.parametrize("is_behind", [True, False])
def test_loads_of_different_sizes_show_latency_and_bandwidth(is_behind):
    """A tier of 20 ms and 25 blocks per second, whether or not a load is ever asked for behind another one."""
    speed, now = TierSpeed(bandwidth=1000.0), 0.0
    for num_blocks in [1, 1, 4, 1, 8, 2, 1, 6] * 4:
        speed.begin(num_blocks, now)
        ends = [now + 0.02 + num_blocks / 25]
        if is_behind:
            speed.begin(2, now)
            ends.append(ends[0] + 2 / 25)
        for size, end in zip((num_blocks, 2), ends, strict=False):
            speed.poll(end - 0.001)
            speed.end(size, size, end)
        now = ends[-1] + 1.0
        speed.poll(now)
    assert speed.seconds(1, now) == pytest.approx(0.06, rel=0.1)
    assert speed.seconds(10, now) == pytest.approx(0.42, rel=0.1)


@pytest.mark.parametrize("sizes", [(20, 3, 6, 14, 1, 23, 5, 12), (1, 2, 1, 3), (1, 24)])
def test_a_latency_as_long_as_the_transfer_of_a_block_is_not_taken_for_bandwidth(sizes):
    """A tier of 20 ms and 45 blocks per second, of which 1 ms and 75 blocks per second were expected."""
    speed, now = TierSpeed(bandwidth=75.0), 0.0
    for num_blocks in [*sizes] * 12:
        speed.begin(num_blocks, now)
        now += 0.02 + num_blocks / 45
        speed.poll(now - 0.001)
        speed.end(num_blocks, num_blocks, now)
        speed.poll(now := now + 1.0)
    assert speed.latency == pytest.approx(0.02, rel=0.1)
    assert speed.bandwidth == pytest.approx(45.0, rel=0.05)


def test_one_stall_changes_the_prediction_of_a_well_known_tier_no_further_than_half_of_the_way():
    speed, now = TierSpeed(bandwidth=75.0), 0.0
    for num_blocks, stalls in [*[(number % 24 + 1, 0.0) for number in range(48)], (1, 2.0)]:
        speed.begin(num_blocks, now)
        now += 0.02 + num_blocks / 45 + stalls
        speed.poll(now - 0.001)
        speed.end(num_blocks, num_blocks, now)
        speed.poll(now := now + 1.0)
    assert 0.042 < speed.seconds(1, now) < math.sqrt(0.042 * 2.042) * 1.01


@pytest.mark.parametrize("idle", [0.02, 0.07, 0.3])
def test_a_throttled_tier_is_as_fast_as_its_bursts_and_its_pauses_together(idle):
    """A tier that lets six blocks through at once in each tenth of a second."""
    speed, now, slice_, left = TierSpeed(bandwidth=1000.0), 0.0, 0, 6
    took = []
    for _ in range(40):
        speed.begin(9, now)
        begun = now
        for _ in range(3):
            if int(now * 10) > slice_:
                slice_, left = int(now * 10), 6
            if not left:
                now, slice_, left = (slice_ + 1) / 10, slice_ + 1, 6
            left -= 3
            now += 0.001
            speed.poll(now - 0.0005)
            speed.end(3, 3, now)
        took.append(now - begun)
        speed.poll(now := now + idle)
    mean = sum(took) / len(took)
    assert mean / 2 < speed.seconds(9, now) < mean * 2


def test_a_tier_that_has_become_quick_is_known_to_be_soon():
    """What contradicts a short time is a burst, what contradicts a long one is a change."""
    speed, now = TierSpeed(bandwidth=100.0), 0.0
    for number in range(20):
        speed.begin(10, now)
        now += 0.2 if number < 10 else 0.002
        speed.poll(now - 0.001)
        speed.end(10, 10, now)
        speed.poll(now := now + 1.0)
    assert speed.seconds(10, now) < 0.003


@pytest.mark.parametrize("stall", [0.05, 0.2, 1.0])
def test_one_stall_of_a_tier_with_few_jobs_is_soon_forgotten(stall):
    """A tier that seems too slow has no jobs but probes, some seconds apart."""
    speed, now = TierSpeed(bandwidth=1000.0), 0.0
    for number in range(30):
        speed.begin(1, now)
        now += stall if number == 20 else 0.001
        speed.poll(now - 0.0001)
        speed.end(1, 1, now)
        speed.poll(now := now + 10.0)
    assert speed.seconds(1, now) < 0.0015


def seem_slow(engine):
    """Two loads of four seconds, each after a step in which the engine worked."""
    for number in range(2):
        assert load(engine, f"slow {number}", seconds=math.inf) == 0
        work(engine, takes=3.9)


def hold_any(engine, keys):
    return [key for key in keys if key in engine.table]


@pytest.mark.parametrize("is_full", [False, True])
def test_a_tier_that_seems_too_slow_is_measured_with_blocks_that_no_request_waits_for(slow_paced, is_full):
    engine = slow_paced
    seem_slow(engine)
    if is_full:
        for number in range(6):
            engine.store(make_keys(100, f"fill {number}"), engine.request(f"fill {number}"))
            land_all(engine)
            engine.step()
        assert not engine.table.num_free
    num_asked = []
    for number in range(40):
        before = len(engine.tier.loads)
        context, keys = engine.request(f"r{number}"), make_keys(16, f"r{number}")
        engine.plant(keys)
        engine.scan(keys, context)
        engine.step()
        if engine.scan(keys, context) != [MISS]:
            break
        assert not engine.manager.has_pending_work()
        num_asked.append(len(engine.tier.loads) - before)
        engine.store(keys, context)  # it computes them, though some are being read
        land_all(engine)
        engine.step()
        assert len(hold_any(engine, keys)) == len(keys)
        engine.finish(context)
        work(engine)
    assert 1 <= sum(num_asked) <= 5
    land_all(engine)
    engine.step()
    assert not engine.table.num_quarantined
    assert load(engine, "at last") == 16


@pytest.mark.parametrize("fault", ["submit_load", "fail"])
def test_a_failed_measurement_frees_its_slots(slow_paced, fault):
    engine = slow_paced
    seem_slow(engine)
    for _ in range(20):
        work(engine)
    context, keys, num_free = engine.request("r"), make_keys(16, "r"), engine.table.num_free
    engine.plant(keys)
    engine.tier.fail = set(keys)
    if fault == "submit_load":
        engine.tier.raising = {fault}
    before = len(engine.tier.loads)
    engine.scan(keys, context)
    engine.step()
    assert engine.scan(keys, context) == [MISS]
    if fault == "fail":
        assert len(engine.tier.loads) > before
    land_all(engine)
    engine.step()
    assert (engine.table.num_free, engine.table.num_quarantined) == (num_free, 0)


@pytest.mark.parametrize("begun", ["announced", "stored", "looked up, with a last block that is not full"])
def test_requests_that_only_decode_do_not_wait_behind_anybody(slow_paced, begun):
    engine = slow_paced
    for number in range(20):  # shows how much a request usually computes
        context, keys = engine.request(f"usual {number}"), make_keys(16, f"usual {number}")
        engine.scan(keys, context)
        engine.step()
        engine.store(keys, context)
        engine.finish(context)
        land_all(engine)
        engine.step()
    names = [f"decoding {number}" for number in range(20)]
    for name in names:
        context, keys = engine.request(name, num_prompt_tokens=1000), make_keys(3, name)
        if begun.startswith("looked up"):
            engine.scan(keys, context)
            engine.step()
        if begun != "announced":
            engine.store(keys, context)
            land_all(engine)
            engine.step()
    engine.step(new=names if begun == "announced" else ())
    engine.clock.advance(10.0)
    engine.step()
    started = engine.clock()
    load(engine, "late", seconds=math.inf, patience=4.0)
    assert engine.clock() - started < 0.6  # computing takes 0.4 s


def serve(engine, number, length=20, device_hits=0, tokens_per_second=2000.0):
    """One prompt, of which the device has a head, in steps of five blocks of 100 tokens."""
    keys, context = make_keys(length, f"prompt {number}"), engine.request(f"r{number}")
    if device_hits < length:
        engine.scan(keys[device_hits:], context)
    for start in range(device_hits, length, 5):
        engine.step()
        offered = keys[0 if start == device_hits else start : start + 5]
        engine.store(offered, context)
        engine.clock.advance(500 / tokens_per_second)
    engine.step()
    engine.finish(context)
    engine.step()


@pytest.mark.parametrize("device_hits", [0, 180])
def test_tokens_found_on_the_device_are_not_computed_ones(make_engine, device_hits):
    engine = make_engine(num_blocks=512, num_tiers=0, tokens_per_block=100, prefill_doubling=math.inf)
    for number in range(12):
        serve(engine, number, 20 + device_hits, device_hits)
    assert engine.manager.prefill_rate == pytest.approx(2000.0, rel=0.2)


@pytest.mark.parametrize("parts", [[5], [3, 10], [10, 5, 10]])
@pytest.mark.parametrize("offers_loaded", [False, True])
def test_what_was_loaded_is_not_taken_for_computed(make_engine, offers_loaded, parts):
    """In one part or several, and whether or not the engine offers loaded blocks to be stored."""
    engine = make_engine(num_blocks=512, num_tiers=0, tokens_per_block=100, prefill_doubling=math.inf)
    num_loaded = sum(parts)
    for number in range(24):
        keys, context = make_keys(num_loaded + 15, f"prompt {number}"), engine.request(f"r{number}")
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, 100 * (index + 1))
        engine.store(keys[:num_loaded], engine.request(f"before {number}"))
        engine.finish(engine.request(f"before {number}"))
        engine.scan(keys, context)
        engine.step()
        for part, end in zip(parts, itertools.accumulate(parts), strict=True):
            engine.load(keys[end - part : end], context)
        engine.store(keys[0 if offers_loaded else num_loaded :], context)
        engine.clock.advance(1500 / 2000.0)
        engine.manager.take_events()  # the step has ended
        engine.finish(context)
    assert engine.manager.prefill_rate == pytest.approx(2000.0, rel=0.2)


def serve_alone(engine, number, answer, ahead, stores_first, after="nothing"):
    """A prompt of 400 tokens that takes 0.2 s, and tokens of an answer that take a millisecond each.

    An engine that is `ahead` schedules a step when the one before has just begun. `after` is what it does when it has
    no request any more.
    """
    keys, context = make_keys(4, f"prompt {number}"), engine.request(f"r{number}")
    engine.clock.advance(30.0)  # nothing to do
    engine.scan(keys, context)
    for call in [engine.step, lambda: engine.store(keys, context)][:: -1 if stores_first else 1]:
        call()
    for index in range(answer):
        if ahead:
            engine.clock.advance(0.0001)
            engine.step()
        engine.clock.advance(0.001 if index else 0.2)
        engine.manager.take_events()
        if index + 1 == answer:
            engine.finish(context)
        elif not ahead:
            engine.step()
    if ahead:
        engine.clock.advance(0.001)
        engine.manager.take_events()
    if after != "nothing":
        engine.step()
        engine.clock.advance(0.001)
    if after == "a step and its output":
        engine.manager.take_events()


@pytest.mark.parametrize("stores_first", [False, True])
@pytest.mark.parametrize("answer", [1, 2, 3, 20])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("after", ["nothing", "a step", "a step and its output"])
def test_the_engines_speed_is_measured_in_whatever_order_it_works(make_engine, after, ahead, answer, stores_first):
    engine = make_engine(num_blocks=512, num_tiers=0, tokens_per_block=100, prefill_doubling=math.inf)
    for number in range(60):
        serve_alone(engine, number, answer, ahead, stores_first, after)
    assert 1500 < engine.manager.prefill_rate < 2500


def test_outputs_that_are_missed_are_forgotten_when_the_engine_is_idle(make_engine):
    engine = make_engine(num_blocks=512, num_tiers=0, tokens_per_block=100, prefill_doubling=math.inf)
    serve_alone(engine, 0, 2, ahead=False, stores_first=False)
    for _ in range(3):
        engine.step()  # of these the engine tells no output
    for number in range(1, 60):
        serve_alone(engine, number, 2, ahead=False, stores_first=False)
    assert 1500 < engine.manager.prefill_rate < 2500


def test_what_is_computed_sooner_is_declined_at_once(make_engine):
    engine, keys = make_engine(prefill_rate=1e9, tokens_per_block=100), make_keys(4)
    engine.plant(keys)
    context = engine.request()
    assert engine.scan(keys, context) == [PENDING] * 4
    engine.step()
    assert not engine.tier.loads
    assert engine.scan(keys, context) == [MISS]
    assert [(event.reason, event.num_blocks) for event in engine.log.of(RequestGaveUp)] == [("slower", 4)]


def test_what_nobody_waits_for_any_more_is_not_loaded(make_engine):
    engine, keys = make_engine(num_blocks=2000, prefill_rate=1.0, tokens_per_block=100), make_keys(1000)
    engine.plant(keys)
    engine.tier.auto = False
    context, other = engine.request(), engine.request("other")
    engine.scan(keys, context)
    engine.step()
    asked = sum(len(job.keys) for job in engine.tier.loads)
    assert asked < len(keys) / 2  # the rest is queued, without slots
    assert len(engine.table) == asked
    engine.scan(keys[:500], other)
    engine.step()
    engine.finish(context)
    while engine.tier.waiting:
        engine.tier.finish(engine.tier.waiting[0])
        engine.clock.advance(0.001)
        engine.step()
    assert engine.hits(keys, other) == 500
    loaded = [key for job in engine.tier.loads for key in job.keys]
    assert len(loaded) == len(set(loaded)), "nothing is read twice"


def test_a_late_block_enters_a_full_memory_no_more(make_engine):
    engine, keys = make_engine(num_blocks=8, load_deadline=2.0), make_keys(2)
    engine.plant(keys)
    engine.tier.auto = False
    context = engine.request()
    engine.scan(keys, context)
    engine.step()
    engine.finish(context)
    engine.tier.full = True
    engine.store(make_keys(6, "others"), engine.request("storer"))
    engine.tier.finish(engine.tier.waiting[0])
    engine.step()
    assert engine.scan(keys, engine.request("next")) == [PENDING, PENDING]
    assert engine.table.num_free == 2
