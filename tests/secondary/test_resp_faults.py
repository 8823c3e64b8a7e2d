"""The tier on a bad network and on bad servers, all of them real: misses, counted by cause, and recovery by itself."""

import logging
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from proxy import Faults, Proxy, split_replies
from valkey_server import ValkeyCluster, ValkeyServer

from kvtier.abc import TierContext
from kvtier.events import BlocksFailed, TierState
from kvtier.namespace import Namespace
from kvtier.secondary.resp import RespTierManager
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.types import FailureCause, LookupResult

BLOCK_BYTES = 256 * 1024
DOWN, UP = TierState.DOWN, TierState.UP
QUICK = {"timeout": 0.4, "connect_timeout": 0.4, "job_deadline": 3.0}


class Causes:
    """Counts failed blocks by cause."""

    def __init__(self):
        self.counts = Counter()

    def on_event(self, event):
        if isinstance(event, BlocksFailed):
            self.counts[event.cause] += event.num_blocks

    def take(self):
        counts, self.counts = dict(self.counts), Counter()
        return counts


class Rig(TierRig):
    """A tier of quick deadlines; on threads of this process unless a test wants the I/O process."""

    def __init__(self, url, *, process=False, block_bytes=BLOCK_BYTES, **options):
        self.causes = Causes()
        context = TierContext(namespace=Namespace({"model": "faults"}), observer=self.causes)
        super().__init__(context, num_blocks=48, block_bytes=block_bytes)
        if not process:
            self.spec = SuiteSpec(replace(self.spec.tier_context, arena_fd=None))
        self.attach(RespTierManager(self.spec, self.arena.view, "resp", url=url, **{**QUICK, **options}))
        self.tier.start()

    def wait_state(self, state):
        def reached():
            self.tier.lookup(make_key(999_999), self.request)  # a request keeps coming
            return self.tier.state is state

        self.wait(reached, f"the tier is {state}")

    def wait_works(self, numbers):
        """Wait until the tier stores and loads again."""

        def works():
            self.wait_state(UP)
            return self.store(numbers).success and self.load(numbers)[1] == list(numbers)

        self.wait(works, "the tier works again")


@pytest.fixture
def rigs():
    made = []

    def make(*args, **options):
        made.append(Rig(*args, **options))
        made[-1].wait_up()
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def servers():
    made = []

    def make(**config):
        made.append(ValkeyServer(**config))
        return made[-1].start()

    yield make
    for server in made:
        server.close()


@pytest.fixture
def proxy(valkey):
    proxy = Proxy(valkey.address)
    yield proxy
    proxy.close()


def lines(caplog, *words):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "kvtier" and all(word in record.getMessage() for word in words)
    ]


def test_a_server_killed_in_mid_transfer_and_started_again(rigs, servers, caplog):
    caplog.set_level(logging.INFO, logger="kvtier")
    server = servers()
    rig = rigs(server.url, process=True)
    assert rig.store(range(24)).success
    job = rig.submit([make_key(number) for number in range(24)], range(24, 48), load=True)
    server.kill()
    rig.finish(job)
    rig.wait_state(DOWN)
    assert rig.tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    assert not rig.tier.can_store(1)
    server.start()
    rig.wait_state(UP)
    assert rig.lookup(1) is LookupResult.MISS  # it came back empty
    rig.wait_works(range(8))
    rig.assert_each_job_answered_once()
    assert len(lines(caplog, "resp is down", str(server.port))) == 1


def test_a_stopped_server_costs_its_timeout_and_comes_back(rigs, servers, caplog):
    server = servers()
    rig = rigs(server.url)
    assert rig.store(range(8)).success
    server.signal(signal.SIGSTOP)
    try:
        for _ in range(4):
            result, loaded = rig.load(range(8))
            assert not result.success
            assert loaded == []
        rig.wait_state(DOWN)
        assert rig.causes.take().keys() <= {FailureCause.IO_ERROR, FailureCause.TIER_DOWN}
    finally:
        server.signal(signal.SIGCONT)
    rig.wait_state(UP)
    assert rig.load(range(8))[1] == list(range(8))
    assert len(lines(caplog, "resp is down")) == 1


def test_a_connection_cut_half_way_through_a_value(rigs, proxy):
    rig = rigs(proxy.url)
    assert rig.store(range(4)).success
    for cut_after in (1, 9, 60_000, BLOCK_BYTES + 100):
        proxy.faults = Faults(cut_after=cut_after)
        assert rig.load([0])[1] == []
        assert rig.causes.take() == {FailureCause.IO_ERROR: 1}
        proxy.heal()
        rig.wait(lambda: rig.load([0, 1, 2, 3])[1] == [0, 1, 2, 3], "loads work again")
        rig.causes.take()


def test_a_connection_that_breaks_once_is_made_again_unnoticed(rigs, proxy, valkey):
    rig = rigs(proxy.url)
    assert rig.store(range(4)).success
    valkey.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert rig.load(range(4))[1] == list(range(4))
    assert rig.causes.take() == {}


def test_late_replies_are_only_late(rigs, proxy):
    rig = rigs(proxy.url)
    assert rig.store([1]).success
    proxy.faults = Faults(delay=0.02)
    assert rig.load([1])[1] == [1]


def test_a_trickle_ends_with_the_timeout(rigs, proxy):
    """Every single wait is short; the whole would take a minute."""
    rig = rigs(proxy.url)
    assert rig.store([1]).success
    proxy.faults = Faults(rate=4096)
    result, loaded = rig.load([1])
    assert (result.success, loaded) == (False, [])
    assert rig.causes.take() == {FailureCause.IO_ERROR: 1}
    proxy.heal()
    rig.wait(lambda: rig.load([1])[1] == [1], "loads work again")


def test_no_reply_at_all(rigs, proxy):
    rig = rigs(proxy.url)
    assert rig.store([1]).success
    proxy.faults = Faults(swallow=True)
    assert rig.load([1])[1] == []
    assert rig.store([2]).success is False
    proxy.heal()
    rig.wait_works([1, 2])


def backwards(said):
    return b"".join(reversed(split_replies(said)))


def longer(said):
    return said.replace(b"$8320\r\n", b"$8321\r\n")


def huge(said):
    return said.replace(b"$8320\r\n", b"$536870912\r\n")


def garbage(said):
    return b"\x00\xff" * (len(said) // 2)


def endless(said):
    return b"+" + b"a" * 100_000


@pytest.mark.parametrize("change", [backwards, longer, huge, garbage, endless])
def test_replies_that_make_no_sense_are_misses(rigs, proxy, change):
    rig = rigs(proxy.url, block_bytes=8192)
    numbers = [1, 2, 3, 4]
    assert rig.store(numbers).success
    proxy.faults = Faults(change=change)
    assert rig.load(numbers)[1] == []  # the rig compares every byte of what is said to have succeeded
    assert rig.causes.take().keys() <= {FailureCause.FOREIGN, FailureCause.CORRUPT, FailureCause.IO_ERROR}
    rig.lookup(5)
    rig.store([6])
    proxy.heal()
    rig.wait_works(numbers)


def test_a_wrong_password_is_named_and_never_shown(servers, tmp_path, caplog, capfd):
    server = servers(requirepass="open-sesame")
    secret = tmp_path / "password"
    secret.write_text("hunter2\n")
    rig = Rig(server.url, process=True, password_file=str(secret))
    try:
        rig.wait_state(DOWN)
        assert "password" in rig.tier.state_reason
        secret.write_text("open-sesame\n")
        rig.wait_works([1, 2])
        captured = capfd.readouterr()
        shown = caplog.text + captured.out + captured.err + rig.tier.state_reason + repr(vars(rig.tier))
        assert "hunter2" not in shown
        assert "open-sesame" not in shown
    finally:
        rig.close()


def test_a_user_with_a_password_from_the_environment(servers, monkeypatch):
    server = servers()
    server.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+get", "+set", "+exists", "+unlink", "+ping")
    monkeypatch.setenv("KVTIER_TEST_PASSWORD", "letmein")
    rig = Rig(server.url, process=True, username="kv", password_env="KVTIER_TEST_PASSWORD")
    try:
        rig.wait_works([1, 2])
        assert b"letmein" not in open(f"/proc/{rig.tier.io_pid}/cmdline", "rb").read()  # noqa: SIM115 - one read
    finally:
        rig.close()


def test_a_command_that_the_user_may_not_use_is_told_once(servers, monkeypatch, caplog):
    server = servers()
    server.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+get", "+exists", "+unlink", "+ping")
    monkeypatch.setenv("KVTIER_TEST_PASSWORD", "letmein")
    rig = Rig(server.url, username="kv", password_env="KVTIER_TEST_PASSWORD")
    try:
        rig.wait_up()
        for number in range(3):
            assert not rig.store([number]).success
        assert rig.causes.take() == {FailureCause.IO_ERROR: 3}
        assert len(lines(caplog, "refuses: NOPERM", "set")) == 1
    finally:
        rig.close()


def test_a_cluster_that_asks_for_a_password(tmp_path):
    secret = tmp_path / "password"
    secret.write_text("open-sesame")
    cluster = ValkeyCluster(requirepass="open-sesame", masterauth="open-sesame")
    try:
        rig = Rig(cluster.start().urls[1:], cluster=True, block_bytes=8192, password_file=str(secret))
        rig.wait_works(range(16))
        rig.close()
    finally:
        cluster.close()


def test_memory_that_is_full(rigs, servers, caplog):
    """The server refuses what is new and serves what it holds; with more memory it takes blocks again."""
    server = servers(maxmemory="8mb", maxmemory_policy="noeviction")
    rig = rigs(server.url)
    assert rig.store(range(4)).success
    for start in range(8, 48, 8):
        rig.store(range(start, start + 8))
    assert rig.causes.take().keys() == {FailureCause.NO_SPACE}
    assert rig.load(range(4))[1] == list(range(4))
    assert rig.tier.state is UP
    assert len(lines(caplog, "accepts no new blocks", "OOM")) == 1
    server.configure("maxmemory", "100mb")
    rig.wait(lambda: rig.store([50, 51]).success, "it stores again")


def test_a_server_that_evicts(rigs, servers):
    """What is said to be there and is gone when it is fetched is a miss, and nothing more."""
    server = servers(maxmemory="8mb", maxmemory_policy="allkeys-lru")
    rig = rigs(server.url)
    for start in range(0, 64, 8):
        assert rig.store(range(start, start + 8)).success
    assert rig.tier.lookup(make_key(0), rig.request) is LookupResult.HIT  # as far as the tier knows
    result, loaded = rig.load(range(8))
    assert not result.success
    assert len(loaded) < 8
    assert rig.causes.take() == {FailureCause.ABSENT: 8 - len(loaded)}
    assert 63 in rig.load(range(56, 64))[1]  # the server evicts by samples: others of the latest may be gone, too


def test_a_read_only_replica_is_read(rigs, servers, caplog):
    primary, replica = servers(), servers()
    writer = rigs(primary.url)
    assert writer.store(range(4)).success
    replica.command("REPLICAOF", *map(str, primary.address))
    wait_for(lambda: replica.command("DBSIZE") == 4, "the replica has the blocks")
    rig = rigs(replica.url)
    for number in range(10, 14):
        assert not rig.store([number]).success
    assert rig.causes.take().keys() <= {FailureCause.IO_ERROR, FailureCause.CANCELLED, FailureCause.TIER_DOWN}
    assert rig.load(range(4))[1] == list(range(4))
    assert rig.tier.state is UP
    assert len(lines(caplog, "stores failed one after the other")) == 1
    replica.command("REPLICAOF", "NO", "ONE")
    rig.wait(lambda: rig.store([20]).success, "it stores when it is promoted")


def test_a_server_that_is_still_loading_or_closed_by_a_firewall(rigs, proxy):
    rig = rigs(proxy.url)
    assert rig.store([1]).success
    proxy.faults = Faults(refuse=True, cut_after=0)
    for _ in range(4):
        assert rig.load([1])[1] == []
    rig.wait_state(DOWN)
    proxy.heal()
    rig.wait_works([1, 2])


@pytest.fixture
def cluster():
    made = ValkeyCluster()
    try:
        yield made.start()
    finally:
        made.close()


def test_a_lost_node_and_a_moved_slot(rigs, cluster, caplog):
    rig = rigs(cluster.urls, cluster=True, block_bytes=8192)
    numbers = list(range(32))
    assert rig.store(numbers).success
    lost = cluster.nodes[1]
    on_lost = lost.command("DBSIZE")
    assert 0 < on_lost < 32
    lost.kill()
    loaded = rig.load(numbers, first_slot=0)[1]
    assert len(loaded) == 32 - on_lost
    assert rig.causes.take() == {FailureCause.UNREACHABLE: on_lost}
    for _ in range(6):  # the others serve, however often the lost one is asked for
        assert rig.load(numbers, first_slot=0)[1] == loaded
    assert rig.tier.state is UP
    assert len(lines(caplog, "lost a node", str(lost.port))) == 1
    lost.start()
    wait_for(lambda: cluster._is_complete(cluster.nodes[0]), "the cluster is whole")
    rig.wait(lambda: rig.store(numbers).success, "every block is stored again")
    assert rig.load(numbers, first_slot=0)[1] == numbers
    assert len(lines(caplog, "serves again", str(lost.port))) == 1

    from redis.crc import key_slot

    rig.causes.take()
    name = next(iter(cluster.nodes[0].command("KEYS", "*")))
    cluster.move_slot(key_slot(name), 2)  # without its blocks: they are misses, and go to the new owner
    number = next(n for n in numbers if make_key(n).hex().encode() in name)
    assert rig.load([number])[1] == []
    assert rig.causes.take().keys() == {FailureCause.ABSENT}
    assert rig.store([number]).success
    assert name in cluster.nodes[2].command("KEYS", "*")
    assert rig.load(numbers, first_slot=0)[1] == numbers


def test_a_slot_on_its_way_is_followed(rigs, valkey_cluster):
    """The server answers ASK for a block that has left already."""
    from redis.crc import key_slot

    rig = rigs(valkey_cluster.urls, cluster=True, block_bytes=8192)
    rig.store([1])
    source = next(index for index, node in enumerate(valkey_cluster.nodes) if node.command("DBSIZE"))
    target = (source + 1) % 3
    old, new = valkey_cluster.nodes[source], valkey_cluster.nodes[target]
    [name] = old.command("KEYS", "*")
    slot = key_slot(name)
    new.command("CLUSTER", "SETSLOT", slot, "IMPORTING", valkey_cluster.node_id(source))
    old.command("CLUSTER", "SETSLOT", slot, "MIGRATING", valkey_cluster.node_id(target))
    try:
        old.command("MIGRATE", *map(str, new.address), name, 0, 5000)
        assert rig.load([1])[1] == [1]
        assert rig.causes.take() == {}
    finally:
        valkey_cluster.move_slot(slot, target)
    assert rig.load([1])[1] == [1]
    valkey_cluster.move_slot(slot, source)


def test_the_io_process_is_gone_with_its_connections(rigs, valkey):
    rig = rigs(valkey.url, process=True)
    rig.store([1])
    pid = rig.tier.io_pid
    os.kill(pid, signal.SIGKILL)
    rig.wait_state(DOWN)
    rig.wait_state(UP)
    assert rig.load([1])[1] == [1]
    assert rig.tier.io_pid != pid


def test_a_servers_limit_is_the_capacity(rigs, servers):
    rig = rigs(servers(maxmemory="64mb").url)
    rig.wait_up()
    rig.store(range(40))
    rig.wait(lambda: rig.tier.get_stats().get("capacity_bytes") == 64 << 20, "the server has said it")
    assert 0 < rig.tier.get_stats()["bytes"] < 64 << 20


def test_a_server_that_does_not_say_how_full_it_is_is_used_all_the_same(servers, monkeypatch, caplog):
    server = servers()
    server.command("ACL", "SETUSER", "kv", "on", ">letmein", "~kvtier:*", "+get", "+set", "+exists", "+unlink", "+ping")
    monkeypatch.setenv("KVTIER_TEST_PASSWORD", "letmein")
    rig = Rig(server.url, username="kv", password_env="KVTIER_TEST_PASSWORD")
    try:
        rig.wait_up()
        assert rig.store(range(8)).success
        assert rig.load(range(8))[1] == list(range(8))
        assert not {"blocks", "bytes", "capacity_bytes"} & rig.tier.get_stats().keys()
        assert not lines(caplog, "refuses")
        assert len(server.command("ACL", "LOG")) == 1, "it is asked once"
    finally:
        rig.close()


def test_the_documented_user_is_refused_nothing(servers, monkeypatch):
    """The ACL of the documentation, word for word; the server keeps a log of what it refused."""
    page = (Path(__file__).parents[2] / "docs" / "tiers" / "resp.md").read_text()
    rules = re.search(r"ACL SETUSER kvtier (.*)", page).group(1).replace(">...", ">a-password").split()
    server = servers()
    server.command("ACL", "SETUSER", "kvtier", *rules)
    monkeypatch.setenv("KVTIER_TEST_PASSWORD", "a-password")
    rig = Rig(server.url, username="kvtier", password_env="KVTIER_TEST_PASSWORD")
    try:
        rig.wait_up()
        assert rig.store(range(8)).success
        assert rig.load(range(8))[1] == list(range(8))
        assert server.command("ACL", "LOG") == []
    finally:
        rig.close()
