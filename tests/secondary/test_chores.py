"""Deletions and listings of tiers in real I/O processes."""

import os

import pytest
from valkey_server import ValkeyServer

from kvtier.abc import TierContext
from kvtier.errors import ProtocolError, StoreError
from kvtier.events import TierState
from kvtier.executors.protocol import ChoreDone
from kvtier.key_tables import ShardedDict, SmallDict
from kvtier.keys import make_offload_key
from kvtier.namespace import Namespace
from kvtier.registry import load_tier_class
from kvtier.secondary.chores import Chores, Deletion, page_of
from kvtier.testing.clock import ManualClock
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import TierRig
from kvtier.tier_config import parse_tier
from kvtier.types import MOST_LISTED, Answer, AnswerState, LookupResult

OPEN, DONE, FAILED = AnswerState.OPEN, AnswerState.DONE, AnswerState.FAILED


def opened(config, **context):
    """Return a rig with a tier of this configuration, which is up."""
    rig = TierRig(TierContext(namespace=Namespace({"model": "chores"}), **context))
    entry = parse_tier(config, "tier")
    rig.attach(load_tier_class(entry)(rig.spec, rig.arena.view, entry.tier_type, **entry.options))
    rig.tier.start()
    rig.wait_up()
    return rig


def disk(path, **more):
    return {"type": "disk", "path": str(path), "capacity": "1MiB", **more}


@pytest.fixture
def rigs():
    made = []

    def make(config, **context):
        made.append(opened(config, **context))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def test_blocks_deleted_from_a_disk_stay_away_after_a_restart(tmp_path, rigs):
    rig = rigs(disk(tmp_path))
    assert rig.store(range(8)).success
    assert set(rig.delete([1, 2, 50])) == {make_key(1), make_key(2), make_key(50)}
    rig.close()
    again = opened(disk(tmp_path))
    try:
        assert set(again.listed(3)) == {make_key(number) for number in (0, 3, 4, 5, 6, 7)}
        assert again.lookup(1) is LookupResult.MISS
    finally:
        again.close()


def test_a_pinned_block_is_not_deleted(tmp_path, rigs):
    rig = rigs(disk(tmp_path))
    rig.store([1, 2])
    rig.tier.pin([make_key(1)])
    assert set(rig.delete([1, 2])) == {make_key(2)}
    assert rig.load([1, 2])[1] == [1]
    rig.tier.unpin([make_key(1)])
    assert set(rig.delete([1])) == {make_key(1)}


def test_a_slot_that_is_being_emptied_takes_no_block(tmp_path, rigs):
    rig = rigs(disk(tmp_path))
    for start in range(0, 128, 16):
        rig.store(range(start, start + 16))
    held = set(rig.listed(400))
    num_gone = 0
    while held:
        answer = rig.tier.delete(list(held)[:40])
        stored = rig.store(range(200 + num_gone, 216 + num_gone))
        rig.wait(lambda answer=answer: answer.state is not OPEN, "the deletion")
        assert stored.success
        num_gone += 16
        assert rig.load(range(184 + num_gone, 200 + num_gone))[1] == list(range(184 + num_gone, 200 + num_gone))
        held = {key for key in rig.listed(400) if key in held}
    assert num_gone


def test_stripes_delete_and_list_as_one(tmp_path, rigs):
    rig = rigs({"type": "disk", "path": [str(tmp_path / one) for one in "ab"], "capacity": "2MiB"})
    rig.wait(lambda: rig.tier.get_stats()["stripes_up"] == 2, "both directories")
    rig.store(range(16))
    rig.store(range(16, 24))
    assert set(rig.listed(3)) == {make_key(number) for number in range(24)}
    assert set(rig.delete(range(12, 20))) == {make_key(number) for number in range(12, 20)}
    assert set(rig.listed(450)) == {make_key(number) for number in (*range(12), *range(20, 24))}


@pytest.mark.parametrize("keys", [[b"odd"], [bytes(100)], ["odd"], [7], [make_key(1), make_key(2)[1:]]])
def test_what_no_message_can_name_is_refused_and_leaves_nothing_open(rigs, keys):
    rig = rigs({"type": "memory", "capacity": "512KiB"}, clock=(clock := ManualClock()))
    rig.store([1])
    assert rig.tier.delete(keys).state is FAILED
    assert rig.tier.pin(keys).state is FAILED
    for _ in range(3):
        clock.advance(60.0)
        rig.poll()
    assert rig.tier.state is TierState.UP
    assert rig.load([1])[1] == [1]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_page_has_at_least_one_key(tmp_path, rigs, kind):
    rig = rigs({"memory": {"type": "memory", "capacity": "512KiB"}, "disk": disk(tmp_path)}[kind])
    rig.store([1])
    assert rig.tier.list_keys(b"", 0).state is FAILED
    assert rig.listed(1) == [make_key(1)]


def test_a_page_is_not_longer_than_a_message(rigs):
    rig = rigs({"type": "memory", "capacity": "512KiB"})
    assert rig.tier.list_keys(b"", MOST_LISTED + 1).state is FAILED
    assert rig.listed(MOST_LISTED) == []


@pytest.mark.parametrize("kind", ["memory", "filesystem", "resp"])
def test_stores_by_key_delete_and_list_more_than_a_message_holds(tmp_path, rigs, kind):
    server = ValkeyServer().start() if kind == "resp" else None
    try:
        rig = rigs(
            {
                "memory": {"type": "memory", "capacity": "32MiB"},
                "filesystem": {"type": "filesystem", "path": str(tmp_path / "shared"), "capacity": "64MiB"},
                "resp": {"type": "resp", "url": "" if server is None else server.url, "prefix": "a[b]*-c"},
            }[kind]
        )
        numbers = range(640)
        for start in range(0, 640, 32):
            assert rig.store(range(start, start + 32)).success
        assert set(rig.listed(450)) == {make_key(number) for number in numbers}
        assert len(rig.delete(range(600))) == 600
        assert set(rig.listed(7)) == {make_key(number) for number in range(600, 640)}
        assert rig.lookup(5) is LookupResult.MISS
        assert rig.load([5, 610])[1] == [610]
    finally:
        if server is not None:
            rig.close()
            server.close()


def kept(rig, numbers):
    """Pin blocks; return the numbers of those that the medium holds, None if it cannot keep blocks."""
    answer = rig.tier.pin([make_key(number) for number in numbers])
    rig.wait(lambda: answer.state is not OPEN, "the pin")
    return None if answer.value is None else [number for number in numbers if make_key(number) in answer.value]


def test_pinned_blocks_of_a_memory_tier_outlast_others(rigs):
    rig = rigs({"type": "memory", "capacity": "512KiB"})
    assert rig.store(range(16)).success
    assert kept(rig, [0, 1, 99]) == [0, 1]
    for start in range(100, 260, 32):
        assert rig.store(range(start, start + 32)).success
    assert rig.load([0, 1, 2])[1] == [0, 1]


def test_only_half_of_a_memory_tier_can_be_pinned(rigs):
    rig = rigs({"type": "memory", "capacity": "512KiB"})
    rig.store(range(32))
    rig.store(range(32, 60))
    held = [number for number in range(60) if rig.lookup(number) is LookupResult.HIT]
    assert kept(rig, held) == held
    for start in range(100, 260, 32):
        assert rig.store(range(start, start + 32)).success
    assert rig.load(range(232, 260))[1] == list(range(232, 260))


def test_a_pin_renews_what_a_shared_directory_deletes_first(tmp_path, rigs):
    rig = rigs({"type": "filesystem", "path": str(tmp_path / "shared"), "capacity": "64MiB"})
    rig.store([1, 2])
    files = {
        path.name: path
        for path in (tmp_path / "shared").rglob("*")
        if path.name in (make_key(1).hex(), make_key(2).hex())
    }
    for path in files.values():
        os.utime(path, (1000, 1000))
    assert kept(rig, [1, 7]) == [1]
    assert files[make_key(1).hex()].stat().st_mtime > 1000
    assert files[make_key(2).hex()].stat().st_mtime == 1000


def test_who_asks_what_a_medium_holds_renews_nothing(tmp_path, rigs):
    rig = rigs({"type": "filesystem", "path": str(tmp_path / "shared"), "capacity": "64MiB"})
    rig.store([1, 2])
    (file,) = (path for path in (tmp_path / "shared").rglob("*") if path.name == make_key(1).hex())
    os.utime(file, (1000, 1000))
    answer = rig.tier.ask_held([make_key(1), make_key(2), make_key(3)])
    rig.wait(lambda: answer.state is not OPEN, "the answer")
    assert answer.value == {make_key(1), make_key(2)}
    assert file.stat().st_mtime == 1000
    assert rig.tier.ask_held([b"odd"]).state is FAILED
    rig.tier.shutdown()
    assert rig.tier.ask_held([make_key(1)]).state is FAILED


def test_a_tier_with_an_index_asks_nobody(tmp_path, rigs):
    assert rigs(disk(tmp_path)).tier.ask_held([make_key(1)]) is None


@pytest.mark.parametrize("options", [{}, {"ttl": 1000.0}])
def test_a_pin_of_a_server_s_blocks_finds_those_that_it_has_evicted(rigs, options):
    server = ValkeyServer().start()
    try:
        rig = rigs({"type": "resp", "url": server.url, **options})
        rig.store(range(4))
        names = server.command("KEYS", "*")
        gone = next(name for name in names if make_key(2).hex() in str(name))
        server.command("DEL", gone)
        if options:
            for name in names:
                server.command("PEXPIRE", name, "100000")
        assert rig.lookup(2) is LookupResult.HIT, "an answer from before"
        assert kept(rig, range(4)) == [0, 1, 3]
        assert rig.lookup(2) is LookupResult.MISS
        left = next(name for name in names if make_key(1).hex() in str(name))
        assert not options or int(server.command("PTTL", left)) > 100_000
    finally:
        rig.close()
        server.close()


def test_a_server_that_refuses_to_keep_blocks_is_asked_once(rigs, monkeypatch):
    server = ValkeyServer().start()
    monkeypatch.setenv("KVTIER_TEST_PASSWORD", "first")
    server.command(
        "ACL", "SETUSER", "kv", "on", ">first", "~kvtier:*", "+get", "+set", "+exists", "+unlink", "+ping", "+info"
    )
    try:
        rig = rigs({"type": "resp", "url": server.url, "username": "kv", "password_env": "KVTIER_TEST_PASSWORD"})
        rig.store([1])
        for _ in range(3):
            assert kept(rig, [1]) is None
        assert len(server.command("ACL", "LOG")) == 1
        assert rig.load([1])[1] == [1]
    finally:
        rig.close()
        server.close()


def test_a_dead_server_fails_deletions_and_listings(rigs):
    server = ValkeyServer().start()
    try:
        rig = rigs({"type": "resp", "url": server.url})
        rig.store([1])
        server.close()
        assert rig.delete([1]) is None
        assert rig.listed(5) is None
    finally:
        server.close()


def test_a_killed_io_process_fails_what_is_open(tmp_path, rigs):
    rig = rigs(disk(tmp_path))
    rig.store(range(8))
    rig.tier._supervisor.executor.kill()
    answer = rig.tier.delete([make_key(1)])
    rig.wait(lambda: answer.state is not OPEN, "the end of the deletion")
    assert answer.state is FAILED
    rig.wait_up()
    assert rig.delete([2]) is not None


def test_a_tier_that_is_down_fails_at_once(tmp_path, rigs):
    rig = rigs(disk(tmp_path))
    rig.tier.shutdown()
    assert rig.tier.delete([make_key(1)]).state is FAILED
    assert rig.tier.list_keys(b"", 5).state is FAILED


def test_an_answer_waits_for_all_of_its_chores():
    deletion = Deletion([make_key(number) for number in range(600)], [make_key(1000)])
    for _ in range(3):
        assert deletion.answer.state is OPEN
        deletion.end_chore()
    assert deletion.answer.state is DONE
    assert len(deletion.answer.value) == 601


def test_late_chores_fail_their_answers_and_keep_what_they_hold():
    clock = ManualClock()
    chores, ended = Chores(clock), []
    answer = Answer()
    chore_id = chores.begin(answer, ended.append)
    clock.advance(10)
    assert chores.expire(5) == 1
    assert chores.expire(5) == 0
    assert answer.state is FAILED
    assert not ended
    chores.end(ChoreDone(chore_id, failed=False))
    assert len(ended) == 1
    with pytest.raises(ProtocolError):
        chores.end(ChoreDone(chore_id, failed=False))


def test_a_large_index_is_listed_shard_by_shard():
    table = ShardedDict()
    keys = [make_offload_key(number.to_bytes(8, "big"), 0) for number in range(1000)]
    table.set_all(keys, range(1000))
    found, cursor = [], b""
    while cursor is not None:
        page = page_of(table, cursor, 7)
        found += page.keys
        cursor = page.cursor
    assert sorted(found) == keys
    with pytest.raises(StoreError):
        page_of(SmallDict(), b"\x01", 7)
