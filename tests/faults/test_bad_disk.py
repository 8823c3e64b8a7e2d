"""A disk that fails, over FUSE: EIO, short transfers, slowness. Never a wrong byte, and it comes back."""

import itertools
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
from disk_rigs import QUICK, Asleep, disk_tier, make_rig, start, striped_tier, submit_store

from kvtier.events import BlocksFailed, TierState
from kvtier.secondary.settings import Deadlines
from kvtier.stores.slab.inspection import survey_slab
from kvtier.testing.patience import TEST_SECONDS
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import succeeded
from kvtier.types import FailureCause, LookupResult

ALL = list(range(20))


@pytest.fixture
def rig(faulty_disk):
    rig = make_rig()
    yield rig
    rig.close()


def causes(rig):
    return {event.cause for event in rig.recorder.of(BlocksFailed)}


def test_the_breaker_opens_costs_nothing_and_closes(rig, faulty_disk, caplog):
    caplog.set_level(logging.INFO, "kvtier")
    tier = start(rig, faulty_disk.path / "tier")
    assert rig.store(ALL).success
    pid = tier.io_pid
    faulty_disk.fail(error="EIO")
    for number in range(3):
        assert not rig.load([number])[1]
    assert tier.state is TierState.DOWN
    assert FailureCause.IO_ERROR in causes(rig)
    faulty_disk.fail(error="EIO", delay=30)  # a job that asks the disk now waits, and its process is killed
    tier._standing.breaker.retry_at += 2 * TEST_SECONDS
    for number in ALL:
        assert tier.lookup(make_key(number), rig.request) is LookupResult.MISS
        assert not tier.can_store(1)
        assert not rig.load([number])[1]
        assert not rig.store([number]).success
    assert tier.io_pid == pid
    assert FailureCause.TIER_DOWN in causes(rig)
    faulty_disk.heal()
    tier._standing.breaker.retry_at -= 2 * TEST_SECONDS
    rig.wait_up()
    assert tier.io_pid == pid
    assert rig.load(ALL)[1] == ALL[3:], "what was not asked for meanwhile is still known"
    assert rig.store(ALL).success
    assert rig.load(ALL)[1] == ALL
    assert rig.recorder.states() == ["up", "down", "up"]
    said = [record.message for record in caplog.records if record.message.startswith("kvtier: tier disk is")]
    assert len(said) == 3, said
    rig.assert_each_job_answered_once()


def test_a_breaker_over_a_disk_that_stays_bad_tries_and_says_so_once(rig, faulty_disk, caplog):
    tier = start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error="EIO")
    numbers = itertools.cycle(ALL)

    def tried_three_times():
        rig.load([next(numbers)])
        rig.store([next(numbers)])
        return rig.recorder.states().count("down") >= 3

    rig.wait(tried_three_times, "it is tried again and again")
    assert sum("is down" in message for message in caplog.messages) == 1
    faulty_disk.heal()
    rig.wait(lambda: rig.store(ALL).success, "it works again")
    assert tier.state is TierState.UP
    assert rig.load(ALL)[1] == ALL


def test_what_could_not_be_read_is_back_after_a_restart_if_it_verifies(rig, faulty_disk):
    start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error="EIO", on=["read"], files="data-")
    assert not rig.load(ALL)[1]
    faulty_disk.heal()
    assert rig.lookup(3) is LookupResult.MISS, "a block that did not come back is not offered again in this life"
    rig.tier.shutdown()
    (data,) = faulty_disk.backing.rglob("data-00000")
    raw = bytearray(data.read_bytes())
    at = raw.find(make_payload(5, rig.block_bytes))
    raw[at + 100] ^= 4
    data.write_bytes(raw)
    start(rig, faulty_disk.path / "tier")
    assert rig.load(ALL)[1] == [number for number in ALL if number != 5]
    assert FailureCause.CORRUPT in causes(rig)


def test_a_bad_sector_costs_its_block(rig, faulty_disk):
    start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error="EIO", files="data-", range=[7 * 8192 + 4096, 7 * 8192 + 5000])
    assert rig.load(ALL)[1] == [number for number in ALL if number != 7]
    assert rig.store(range(20, 40), 0).success or rig.tier.state is TierState.UP
    faulty_disk.heal()
    assert set(rig.load(ALL)[1]) >= set(ALL) - {7}


def test_a_bad_sector_of_the_records_costs_its_records(rig, faulty_disk):
    """32 records are in a sector of 4 KiB. The start writes it anew, as a whole."""
    numbers = list(range(50))
    start(rig, faulty_disk.path / "tier")
    assert rig.store(numbers).success
    rig.tier.shutdown()
    faulty_disk.fail(error="EIO", on=["read"], files="headers", range=[4096, 8191])
    (namespace,) = survey_slab(faulty_disk.path / "tier").namespaces
    assert (namespace.num_blocks, namespace.broken) == (32, {FailureCause.IO_ERROR: 32})
    start(rig, faulty_disk.path / "tier")
    held = [number for number in numbers if rig.lookup(number) is LookupResult.HIT]
    assert len(held) == 32
    assert rig.load(held[:30])[1] == held[:30]
    assert FailureCause.IO_ERROR in causes(rig)
    faulty_disk.heal()
    assert rig.store(numbers).success
    rig.tier.shutdown()
    start(rig, faulty_disk.path / "tier")
    assert rig.load(numbers[:25])[1] == numbers[:25]
    assert rig.load(numbers[25:])[1] == numbers[25:]


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_a_disk_that_cannot_be_written_is_still_read(rig, faulty_disk, error):
    tier = start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error=error, on=["write"])
    for number in range(30, 36):
        assert not rig.store([number]).success
        assert rig.load(ALL)[1] == ALL
    assert tier.state is TierState.UP
    # A pause that the loop above began may be over by now; a trial that fails begins another.
    rig.wait(lambda: not rig.store([30]).success and not tier.can_store(1), "no store is taken")
    faulty_disk.heal()
    rig.wait(lambda: tier.can_store(1), "it is tried again")
    assert rig.store([30]).success


@pytest.mark.parametrize("error", ["ESTALE", "ENXIO", "ETIMEDOUT"])
def test_a_disk_that_went_away_is_used_again_when_it_is_back(rig, faulty_disk, error):
    tier = start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error=error)
    for number in range(4):
        assert not rig.load([number])[1]
        assert not rig.store([40 + number]).success
    assert tier.state is TierState.DOWN
    faulty_disk.heal()
    rig.wait_up()
    rig.wait(lambda: rig.store(ALL).success, "it is used again")
    assert rig.load(ALL)[1] == ALL
    rig.assert_each_job_answered_once()


def test_a_disk_that_became_read_only_under_open_files_is_still_read(rig, faulty_disk):
    tier = start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(error="EROFS", on=["write", "create"])
    for number in range(30, 36):
        assert not rig.store([number]).success
        assert rig.load(ALL)[1] == ALL
    assert tier.state is TierState.UP
    faulty_disk.heal()
    rig.wait(lambda: rig.store([30]).success, "it is tried again")


@pytest.mark.parametrize("files", ["headers", "data-"])
def test_half_written_blocks_are_misses(rig, faulty_disk, files):
    """Payload without record, or record without payload: neither is served, now or after a restart."""
    start(rig, faulty_disk.path / "tier", capacity=300_000)
    rig.store(ALL)
    faulty_disk.fail(error="EIO", on=["write"], files=files)
    assert not rig.store(range(100, 130), 0).success, "they evict others and fail"
    faulty_disk.heal()
    for _ in range(2):
        for number in [*ALL, *range(100, 130)]:
            rig.load([number])  # asserts that what succeeds is right
        rig.tier.shutdown()
        start(rig, faulty_disk.path / "tier", capacity=300_000)


@pytest.mark.parametrize("length", [4096, 12288, 512, 1000, 5000])
def test_short_transfers_are_continued_or_misses(rig, faulty_disk, length):
    """Direct I/O goes on at a page only: a transfer that ends elsewhere is the end of the file, or a failing disk."""
    start(rig, faulty_disk.path / "tier")
    faulty_disk.fail(short=length, files="data-")
    stored = rig.store(ALL)
    loaded = rig.load(ALL)[1]
    if length % 4096 == 0:
        assert stored.success
        assert loaded == ALL
    faulty_disk.heal()
    rig.wait(lambda: rig.store(ALL).success, "it works again")
    assert rig.load(ALL)[1] == ALL


def test_short_records_are_continued(rig, faulty_disk):
    tier = start(rig, faulty_disk.path / "tier")
    faulty_disk.fail(short=50, files="headers")
    assert rig.store(ALL).success
    loaded = rig.load(ALL)[1]
    tier.shutdown()
    faulty_disk.heal()
    start(rig, faulty_disk.path / "tier")
    assert rig.load(ALL)[1] == ALL
    assert loaded == ALL


def test_a_disk_that_cannot_be_opened_is_tried_again(rig, faulty_disk, caplog):
    faulty_disk.fail(error="EIO")
    tier = start_down(rig, faulty_disk)
    assert "Input/output error" in tier.state_reason
    faulty_disk.heal()
    rig.wait_up()
    assert rig.store(ALL).success
    tier.shutdown()
    faulty_disk.fail(error="EIO", on=["read"], files="headers")
    tier = start_down(rig, faulty_disk)
    faulty_disk.heal()
    rig.wait_up()
    assert rig.load(ALL)[1] == ALL


def start_down(rig, faulty_disk):
    tier = disk_tier(rig, faulty_disk.path / "tier")
    tier.start()
    rig.wait(lambda: tier.state is TierState.DOWN, "it is down")
    return tier


def test_a_slow_disk_delays_its_own_jobs_only(rig, faulty_disk):
    tier = start(rig, faulty_disk.path / "tier")
    rig.store(ALL)
    faulty_disk.fail(delay=0.2, on=["read", "write"], files="data-")
    asleep = Asleep()
    job = rig.submit([make_key(number) for number in ALL], range(40, 60), load=True)
    while job not in rig.results:
        with asleep:
            tier.lookup(make_key(1), rig.request)
            rig.poll()
    assert rig.results[job].success
    assert rig.results[job].transfer_time >= 0.2
    assert asleep.longest < 0.15, "a scheduler's step waited for the disk"


def test_a_call_that_nobody_can_interrupt_keeps_its_slots_until_it_has_ended(rig, faulty_disk):
    """A process that is killed in such a call ends when the call does, and not before are its jobs answered."""
    settings = replace(QUICK, deadlines=Deadlines(job=0.5, overtaken_job=5.0, start=20.0))
    tier = start(rig, faulty_disk.path / "tier", settings=settings)
    rig.store(ALL)
    pid = tier.io_pid
    faulty_disk.fail(delay=2.5, on=["read", "write"], files="data-")
    jobs = [rig.submit([make_key(number)], [40 + number], load=True) for number in range(4)]
    jobs += [submit_store(rig, [30], 30)]
    rig.wait(lambda: tier.state is TierState.DOWN, "it is given up")
    while Path(f"/proc/{pid}").exists():
        assert not rig.results.keys() & set(jobs), "a slot was released that a process may still write"
        rig.poll()
    for job in jobs:
        assert not rig.finish(job).success
    before = [rig.read(slot) for slot in range(64)]
    faulty_disk.heal()
    rig.wait_up()
    assert before == [rig.read(slot) for slot in range(64)], "a process that was given up wrote"
    assert rig.load(ALL)[1] == ALL
    rig.assert_each_job_answered_once()


def test_a_bad_directory_among_good_ones_is_dropped_and_used_again(rig, faulty_disk, tmp_path):
    tier = striped_tier(rig, [tmp_path / "good", faulty_disk.path / "bad"], job_deadline=3.0)
    tier._least_run = 1
    for stripe in tier._stripes:
        stripe._standing.breaker._longest_backoff = 1.0
    tier.start()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "both are up")
    assert rig.store(ALL).success
    faulty_disk.fail(error="EIO")
    fresh = itertools.count(100)

    def dropped():
        rig.load([ALL[-1 - next(fresh) % 10]])
        return tier.get_stats()["stripes_up"] == 1

    rig.wait(dropped, "it is dropped")
    assert tier.state is TierState.UP
    assert rig.load(ALL[:10])[1] == ALL[:10]
    assert rig.store(range(200, 210), 0).success
    assert rig.load(range(200, 210))[1] == list(range(200, 210))
    faulty_disk.heal()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == 2, "it is used again")
    assert rig.store(range(300, 320), 0).success
    assert rig.load(range(300, 320))[1] == list(range(300, 320))
    rig.wait(lambda: (rig.store([next(fresh)]), tier.get_stats()["stripes_up"] == 2)[1], "it stays")
    rig.assert_each_job_answered_once()


def test_random_faults_never_serve_a_wrong_byte(rig, faulty_disk):
    """Whatever the disk does, in any order: what succeeds is right (the rig compares every byte)."""
    chance = random.Random(5)
    plans = [
        {},
        {},
        {"error": "EIO", "on": ["write"], "files": "data-"},
        {"error": "EIO", "on": ["write"], "files": "headers"},
        {"error": "EIO", "on": ["read"]},
        {"error": "EIO", "range": [50_000, 90_000]},
        {"error": "ENOSPC", "on": ["write"]},
        {"short": 1000},
        {"short": 4096, "on": ["write"]},
    ]
    tier = start(rig, faulty_disk.path / "tier", capacity=400_000)
    served = 0
    for _ in range(120):
        faulty_disk.fail(**chance.choice(plans))
        first = chance.randrange(60)
        if chance.random() < 0.5:
            rig.store(range(first, first + chance.randrange(1, 12)))
        else:
            served += len(rig.load(range(first, first + chance.randrange(1, 12)))[1])
    faulty_disk.heal()
    rig.wait(lambda: rig.store([1]).success, "it works again")
    tier.shutdown()
    start(rig, faulty_disk.path / "tier", capacity=400_000)
    result = [number for number in range(72) if succeeded(rig.load([number])[0], make_key(number))]
    assert served > 5
    assert result
