"""Several directories as one tier: the shipped suite, jobs cut in runs, and directories that come and go."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fault_rigs import Recorder, make_rig, stop
from test_tier_suites import inline, on_threads

from kvtier.errors import ConfigError
from kvtier.events import BlocksFailed, TierState, TierStateChanged
from kvtier.registry import SecondaryTierFactory
from kvtier.secondary.disk import DiskTierManager, StripedDiskTierManager
from kvtier.testing.stores import make_key, make_payload
from kvtier.testing.tier_rig import succeeded
from kvtier.testing.tiers import TierSuite
from kvtier.types import AnswerState, FailureCause, LookupResult


class TestStriped(TierSuite):
    num_directories = 2

    def setup_method(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-striped-"))
        super().setup_method()
        self.wait_for_all()

    def wait_for_all(self):
        """The tier is up as soon as one directory is; a deletion fails while another one may have the block."""
        rig = self.rig
        rig.wait(lambda: rig.tier.get_stats()["stripes_up"] == self.num_directories, "all are up")

    def teardown_method(self):
        super().teardown_method()
        shutil.rmtree(self.directory)

    def make_tier(self, offloading_spec, primary_kv_view):
        paths = [str(self.directory / name) for name in "abcd"[: self.num_directories]]
        return StripedDiskTierManager(offloading_spec, primary_kv_view, "disk", path=paths, capacity="2MiB", threads=2)

    def _find(self, payload):
        for path in self.directory.rglob("*"):
            if path.is_file() and (offset := path.read_bytes().find(payload)) >= 0:
                return path, offset
        return None

    def plant(self, tier, key, raw):
        path, offset = self._find(make_payload(1, self.rig.block_bytes))
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    def peek(self, tier, key):
        assert key == make_key(1)
        payload = make_payload(1, self.rig.block_bytes)
        return payload if self._find(payload) else None

    def test_blocks_outlive_the_tier(self):
        rig = self.rig
        for first in range(0, 20, 5):
            assert rig.store(range(first, first + 5)).success
        rig.tier.shutdown()
        rig.attach(self.make_tier(rig.spec, rig.arena.view))
        rig.tier.start()
        self.wait_for_all()
        assert rig.load(range(20))[1] == list(range(20))
        assert rig.tier.get_stats()["blocks"] == 20


class TestStripedOnThreads(TestStriped):
    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(on_threads(offloading_spec), primary_kv_view)


class TestStripedInline(TestStriped):
    num_directories = 3

    def make_tier(self, offloading_spec, primary_kv_view):
        return super().make_tier(inline(offloading_spec), primary_kv_view)


class TestStripedInSmallRuns(TestStripedOnThreads):
    """Every job is cut. Four I/O processes per test would take a twentieth of the time of `make test`."""

    num_directories = 4

    def make_tier(self, offloading_spec, primary_kv_view):
        tier = super().make_tier(offloading_spec, primary_kv_view)
        tier._least_run = 1
        return tier


@pytest.fixture
def rig():
    recorder = Recorder()
    rig = make_rig(observer=recorder)
    rig.recorder = recorder
    yield rig
    rig.close()


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / name for name in ("one", "two", "three")]


def striped(rig, paths, least_run=1, **options):
    options = {"capacity": "3MiB", **options}
    tier = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=[str(path) for path in paths], **options)
    tier._least_run = least_run
    rig.attach(tier)
    tier.start()
    rig.wait(lambda: tier.get_stats()["stripes_up"] == len(paths), "all are up")
    return tier


def blocks_in(tier):
    return [stripe.get_stats()["blocks"] for stripe in tier._stripes]


def up(tier):
    return tier.get_stats()["stripes_up"]


def test_a_job_is_cut_in_equal_runs_and_small_ones_take_turns(rig, paths):
    tier = striped(rig, paths)
    assert rig.store(range(30)).success
    assert blocks_in(tier) == [10, 10, 10]
    (held,) = {tuple(sorted(tier._stripes[0].held({make_key(n) for n in range(30)}), key=bytes))}
    assert set(held) == {make_key(number) for number in range(10)}, "a run is contiguous"
    for number in range(30, 36):
        assert rig.store([number]).success
    assert blocks_in(tier) == [12, 12, 12]
    tier._least_run = 10
    assert rig.store(range(40, 52), 0).success
    assert blocks_in(tier) == [24, 12, 12]
    assert rig.load(range(30))[1] == list(range(30))
    rig.assert_each_job_answered_once()


def test_what_a_directory_has_is_stored_nowhere_else(rig, paths):
    tier = striped(rig, paths)
    for _ in range(3):
        assert rig.store(range(7)).success
        assert rig.store([3, 1, 1, 40, 3, 40]).success
    assert sum(blocks_in(tier)) == 8
    jobs = [rig.submit([make_key(50), make_key(51)], [0, 1], load=False) for _ in range(4)]
    assert sum(rig.finish(job).success for job in jobs) >= 1
    assert sum(blocks_in(tier)) == 10


def test_capacity_is_shared_out(rig, paths):
    tier = striped(rig, paths, capacity=3 << 20)
    for first in range(0, 600, 32):
        rig.store(range(first, first + 32))
    for path in paths:
        used = sum(one.lstat().st_blocks * 512 for one in [path, *path.rglob("*")])
        assert (1 << 20) * 0.8 < used <= 1 << 20
    stats = tier.get_stats()
    assert stats["capacity_blocks"] == 3 * tier._stripes[0].get_stats()["capacity_blocks"]
    assert stats["capacity_bytes"] == stats["capacity_blocks"] * rig.block_bytes
    rig.wait(lambda: tier.get_stats().get("prepared_share") == 1, "the share of the whole, not a sum over directories")


def test_a_killed_process_takes_its_own_blocks_along(rig, paths, caplog):
    tier = striped(rig, paths)
    rig.store(range(30))
    victim = tier.io_pids[1]
    stop(victim)
    job = rig.submit([make_key(number) for number in range(30)], range(30, 60), load=True)
    os.kill(victim, signal.SIGKILL)
    result = rig.finish(job)
    loaded = [number for number in range(30) if succeeded(result, make_key(number))]
    assert [number for number in loaded if not 10 <= number < 20] == [*range(10), *range(20, 30)]
    assert not result.success
    for number in loaded:
        assert rig.read(30 + number) == make_payload(number, rig.block_bytes)
    assert tier.state is TierState.UP
    assert "two" in tier.state_reason
    assert "one" not in tier.state_reason
    assert rig.lookup(3) is LookupResult.HIT
    assert tier.ask_held([make_key(15)]).state is AnswerState.FAILED, "the other directory may have it"
    failed = [event for event in rig.recorder.of(BlocksFailed) if event.cause is FailureCause.TIER_DOWN]
    assert [event.tier for event in failed] == ["disk"]
    rig.wait(lambda: up(tier) == 3, "it is used again")
    assert tier.ask_held([make_key(15)]) is None
    assert tier.get_stats()["breaker_openings"] == 1
    assert rig.load(range(30))[1] == list(range(30))
    assert rig.recorder.of(TierStateChanged)[-1] == TierStateChanged("disk", TierState.UP, "")
    assert sum("is down" in message for message in caplog.messages) == 1
    rig.assert_each_job_answered_once()


def test_a_stopped_process_delays_nobody_else(rig, paths):
    tier = striped(rig, paths, job_deadline=60.0)
    rig.store(range(30))
    stop(tier.io_pids[2])
    late = rig.submit([make_key(25)], [40], load=True)
    assert rig.load([1, 11])[1] == [1, 11]
    assert late not in rig.results
    os.kill(tier.io_pids[2], signal.SIGCONT)
    assert rig.finish(late).success


def test_a_busy_directory_is_passed_over(rig, paths):
    tier = striped(rig, paths, job_deadline=60.0)
    stop(tier.io_pids[0])
    tier._stripes[0]._most_store_blocks = 1
    for number in range(12):
        rig.fill(number, make_payload(number, rig.block_bytes))
    jobs = [rig.submit([make_key(number)], [number], load=False) for number in range(12)]
    rig.wait(lambda: len(rig.results) == 11, "all but one are stored elsewhere")
    assert tier.can_store(1)
    os.kill(tier.io_pids[0], signal.SIGCONT)
    assert all(rig.finish(job).success for job in jobs)
    assert rig.load(range(12))[1] == list(range(12))


@pytest.mark.parametrize("least_run", [1, 1000])
def test_directories_that_vanish_one_after_the_other(rig, paths, least_run):
    tier = striped(rig, paths, least_run)
    fresh = itertools.count(100)
    parked = []
    for number, path in enumerate(paths):
        rig.store(range(30))
        parked.append(path.rename(path.with_name(path.name + "-away")))
        for name in os.listdir(parked[-1]):
            if name == "lock":
                (parked[-1] / name).unlink()
        path.write_text("not a directory any more")
        left = 2 - number
        rig.wait(lambda left=left: (rig.store([next(fresh)]), up(tier) == left)[1], "it is dropped")
        assert (tier.state is TierState.UP) == (number < 2)
        if number < 2:
            rig.store(range(30))
            assert rig.load(range(30), 30)[1] == list(range(30)), "the others go on"
    assert rig.lookup(1) is LookupResult.MISS
    assert not rig.store([1]).success
    assert not rig.load([1])[1]
    for path, away in zip(paths, parked, strict=True):
        path.unlink()
        away.rename(path)
    rig.wait(lambda: up(tier) == 3, "they are used again")
    assert rig.load(range(30), 30)[1] == list(range(30)), "with what they held"
    rig.assert_each_job_answered_once()


def test_a_directory_that_cannot_be_used_at_the_start(rig, paths):
    paths[1].write_text("a file")
    tier = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=[str(p) for p in paths], capacity="3MiB")
    rig.attach(tier)
    assert tier.state is TierState.STARTING
    tier.start()
    rig.wait(lambda: up(tier) == 2, "the others are up")
    assert rig.store(range(8)).success
    assert rig.load(range(8))[1] == list(range(8))


def test_a_listing_waits_for_directories_that_are_starting(rig, paths):
    tier = striped(rig, paths)
    rig.store(range(30))
    tier.shutdown()
    options = {"path": [str(path) for path in paths], "capacity": "3MiB"}
    tier = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", **options)
    rig.attach(tier)
    tier.start()
    answer = tier.list_keys(b"", 100)
    assert answer.state is AnswerState.OPEN
    assert set(rig.listed(7)) == {make_key(number) for number in range(30)}
    assert answer.state is AnswerState.DONE


def test_a_listing_ends_with_the_tier_and_fails_without_a_directory(rig, paths):
    paths[1].write_text("a file")
    tier = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=[str(p) for p in paths], capacity="3MiB")
    rig.attach(tier)
    answer = tier.list_keys(b"", 100)
    tier.start()
    rig.wait(lambda: answer.state is not AnswerState.OPEN, "an answer")
    assert answer.state is AnswerState.FAILED
    assert up(tier) == 2
    other = StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=[str(p) for p in paths], capacity="3MiB")
    answer = other.list_keys(b"", 100)
    other.shutdown()
    assert answer.state is AnswerState.FAILED


HOLDER = """
import sys
from pathlib import Path
from test_striped import make_rig, striped
rig = make_rig()
tier = striped(rig, [Path(path) for path in sys.argv[1:]])
number = 0
print("writing", flush=True)
while True:
    rig.store(range(number % 64, number % 64 + 20)); number += 20
"""


def test_an_engine_killed_while_it_stores_leaves_nothing_wrong(rig, paths):
    command = [sys.executable, "-c", HOLDER, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as engine:
        assert engine.stdout.readline() == b"writing\n"
        held = [paths[0] / name for name in os.listdir(paths[0]) if len(name) == 32]
        while not any((held[0] / "headers").read_bytes()):
            os.sched_yield()
        engine.kill()
    striped(rig, paths)
    assert any(rig.load(range(first, first + 28))[1] for first in (0, 28, 56))


@pytest.mark.parametrize(
    "path",
    [
        [],
        [""],
        [1],
        {},
        3,
        None,
        ["a", "a"],
        ["a", "a/b"],
        ["a/b/c", "a"],
        ["a", "./x/../a"],
        ["a", "link"],
        ["/", "a"],
    ],
)
def test_nonsense_is_refused(rig, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ConfigError) as caught:
        StripedDiskTierManager(rig.spec, rig.arena.view, "disk", path=path, capacity="4MiB")
    assert caught.value.key == "path"
    config = {"type": "disk", "path": path, "capacity": "4MiB"}
    with pytest.raises(ConfigError, match="path"):
        SecondaryTierFactory.create_secondary_tier(config, rig.arena.view, rig.spec)


def test_a_share_under_one_block_is_refused(rig, paths):
    with pytest.raises(ConfigError, match="capacity"):
        striped(rig, paths, capacity=60_000)


def test_a_list_in_the_configuration_makes_stripes(rig, tmp_path):
    config = {"type": "disk", "path": [str(tmp_path / "a"), str(tmp_path / "b")], "capacity": "4MiB"}
    assert isinstance(
        SecondaryTierFactory.create_secondary_tier(config, rig.arena.view, rig.spec), StripedDiskTierManager
    )
    config["path"] = str(tmp_path / "a")
    tier = SecondaryTierFactory.create_secondary_tier(config, rig.arena.view, rig.spec)
    assert isinstance(tier, DiskTierManager)
    config["path"] = [str(tmp_path / "a")]
    tier = SecondaryTierFactory.create_secondary_tier(config, rig.arena.view, rig.spec)
    rig.attach(tier)
    tier.start()
    rig.wait_up()
    assert rig.store(range(4)).success
    assert rig.load(range(4))[1] == list(range(4))


def test_a_shutdown_is_said_once(rig, paths):
    striped(rig, paths)
    rig.tier.shutdown()
    assert rig.recorder.states()[-1] == "closed"
    assert rig.recorder.states().count("closed") == 1
    assert rig.tier.state is TierState.CLOSED
