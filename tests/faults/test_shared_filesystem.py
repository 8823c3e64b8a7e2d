"""The tier `filesystem` over a filesystem that fails, and one that hangs: misses, and it comes back."""

import itertools
import signal

import pytest
from disk_rigs import Asleep, make_rig

from kvtier.events import BlocksFailed, TierState
from kvtier.secondary.filesystem import FilesystemTierManager
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key
from kvtier.types import FailureCause, LookupResult

ALL = list(range(20))


@pytest.fixture
def rig(faulty_disk):
    rig = make_rig()
    path = str(faulty_disk.path / "shared")
    tier = FilesystemTierManager(rig.spec, rig.arena.view, "filesystem", path=path, capacity="16MiB", job_deadline=5.0)
    tier._standing.breaker._longest_backoff = 0.5
    rig.attach(tier)
    tier.start()
    rig.wait_up()
    assert rig.store(ALL).success
    yield rig
    rig.close()


def causes(rig):
    return {event.cause for event in rig.recorder.of(BlocksFailed)}


def test_a_filesystem_that_fails(rig, faulty_disk, caplog):
    faulty_disk.fail(error="EIO")
    numbers = itertools.cycle(ALL)

    def is_down():
        assert not rig.load([next(numbers)])[1]
        return rig.tier.state is TierState.DOWN

    rig.wait(is_down, "it is down")
    assert FailureCause.IO_ERROR in causes(rig)
    assert caplog.text.count("is down") == 1
    assert rig.lookup(3) is LookupResult.MISS
    faulty_disk.heal()
    rig.wait(lambda: rig.store(ALL).success, "it works again")
    rig.wait(lambda: rig.load(ALL)[1] == ALL, "all is there")
    rig.assert_each_job_answered_once()


def test_half_written_files_are_never_seen(rig, faulty_disk):
    faulty_disk.fail(error="EIO", on=["write"])
    assert not rig.store([30]).success
    faulty_disk.fail(short=3000)
    assert rig.store([31]).success
    faulty_disk.heal()
    assert rig.load([30, 31])[1] == [31]
    assert not list(faulty_disk.backing.rglob("*.new"))


def test_a_filesystem_that_hangs_costs_misses_and_is_used_again(rig, faulty_disk, caplog):
    faulty_disk._process.send_signal(signal.SIGSTOP)
    asleep = Asleep()
    jobs = [rig.submit([make_key(number)], [40 + number], load=True) for number in range(4)]

    def given_up():
        with asleep:
            rig.tier.lookup(make_key(7), rig.request)
            rig.poll()
        return rig.tier.state is not TierState.UP

    wait_for(given_up, "it is given up")
    assert asleep.longest < 0.15, "a scheduler's step waited for the filesystem"
    assert rig.tier.lookup(make_key(7), rig.request) is LookupResult.MISS
    assert not rig.tier.can_store(1)
    assert caplog.text.count("is down") == 1
    faulty_disk._process.send_signal(signal.SIGCONT)
    assert not any(rig.finish(job).success for job in jobs)
    rig.wait(lambda: rig.tier.state is TierState.UP, "it is up again")
    rig.wait(lambda: rig.store(ALL).success, "it works again")
    assert rig.load(ALL)[1] == ALL
    rig.assert_each_job_answered_once()
