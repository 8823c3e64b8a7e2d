"""Hints, as a client sends them in `kv_transfer_params`, in the manager and in the tiers below host memory."""

import logging
from random import Random

import pytest
from engine import make_keys

from kvtier.events import HintIgnored, NullObserver
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.retention import RetentionPolicy
from kvtier.hints import NO_HINT, Hint, Priority, read_hint
from kvtier.primary.retention import Retention
from kvtier.simulator.devices import DeviceSpeed
from kvtier.simulator.tiers import SimulatedTierManager
from kvtier.testing.clock import ManualClock


def hinted(engine, name, **hint):
    return engine.request(name, kv_transfer_params={"kvtier": hint})


def serve(engine, name, count=2, **hint):
    """One request that loads what is there of `count` blocks and stores the rest."""
    keys = make_keys(count, name)
    context = hinted(engine, f"request {name}", **hint) if hint else engine.request(f"request {name}")
    num_hits = engine.hits(keys, context)
    if num_hits:
        engine.load(keys[:num_hits], context)
    engine.store(keys[num_hits:], context)
    engine.finish(context)
    engine.step()
    return num_hits


def num_held(engine, name, count=2):
    return sum(key in engine.table for key in make_keys(count, name))


def scan_by(engine, count):
    for number in range(count):
        serve(engine, f"passes {number}")


def test_blocks_are_kept_for_a_time(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=0)
    serve(engine, "kept", retain="10m")
    scan_by(engine, 20)
    assert num_held(engine, "kept") == 2
    assert engine.manager.get_stats()["primary.kept_blocks"] == 2
    engine.clock.advance(601)
    scan_by(engine, 8)
    assert num_held(engine, "kept") == 0
    assert engine.manager.get_stats()["primary.kept_blocks"] == 0


def test_a_request_is_told_as_little_room_as_the_share_leaves_and_other_requests_have_the_rest(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=0, retain_share=0.5)
    serve(engine, "long", count=12, retain=600)
    scan_by(engine, 20)
    assert num_held(engine, "long", 12) == 8
    assert all(key in engine.table for key in make_keys(8, "long"))
    assert num_held(engine, "passes 19") == 2


def test_priorities_order_victims(make_engine):
    engine = make_engine(num_blocks=8, num_tiers=0)
    serve(engine, "high", priority="high")
    serve(engine, "plain")
    serve(engine, "low", priority="low")
    serve(engine, "new", count=4)
    assert [num_held(engine, name) for name in ("high", "plain", "low")] == [2, 2, 0]
    serve(engine, "newer", count=6)
    assert [num_held(engine, name) for name in ("high", "plain", "low")] == [2, 0, 0]


def test_the_end_of_a_session_frees_its_blocks_at_once(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=0)
    serve(engine, "first turn", count=3, session="s", retain="1h")
    serve(engine, "others", count=10)
    serve(engine, "last turn", count=1, session="s", ended=True)
    serve(engine, "next", count=6)
    assert num_held(engine, "others", 10) == 10
    assert num_held(engine, "first turn", 3) + num_held(engine, "last turn", 1) == 0


MALFORMED = [
    "10m",
    [],
    None,
    {"retain": "ten minutes"},
    {"retain": -1},
    {"retain": "0s"},
    {"retain": float("nan")},
    {"retain": float("inf")},
    {"retain": 10**400},
    {"retain": "9999d"},
    {"priority": "highest"},
    {"priority": 3},
    {"session": ""},
    {"session": 7},
    {"session": "s" * 1000},
    {"ended": "yes"},
    {"tenant": {}},
    {"pin": True},
    {1: 2},
    Hint(retain="ten minutes"),
    Hint(retain=float("nan")),
    Hint(retain=-1),
    Hint(retain=object()),
    Hint(session=7),
    Hint(ended="yes"),
]


@pytest.mark.parametrize("wrong", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_hint_is_ignored(make_engine, wrong):
    engine = make_engine(num_tiers=0)
    context = engine.request(kv_transfer_params={"kvtier": wrong})
    keys = make_keys(2)
    assert engine.store(keys, context) == keys
    engine.finish(context)
    assert [event.req_id for event in engine.log.of(HintIgnored)] == ["r"]
    assert engine.manager.get_stats()["ignored_hints"] == 1
    assert not isinstance(engine.table.policy, RetentionPolicy)


def test_malformed_hints_are_logged_once(make_engine, caplog):
    engine = make_engine(num_tiers=0)
    with caplog.at_level(logging.WARNING, "kvtier"):
        for number in range(3):
            engine.finish(hinted(engine, str(number), retain="for ever"))
    assert [record.getMessage().count("retain") for record in caplog.records] == [1]
    assert engine.manager.get_stats()["ignored_hints"] == 3


@pytest.mark.parametrize("wrong", [{"x\nforged: line\x1b[31m": 1}, {"priority": "y" * 100_000}, {"priority": "\n\n"}])
def test_a_malformed_hint_forges_no_line_of_the_log_and_fills_none(make_engine, caplog, wrong):
    engine = make_engine(num_tiers=0)
    with caplog.at_level(logging.WARNING, "kvtier"):
        engine.request(kv_transfer_params={"kvtier": wrong})
    (record,), (event,) = caplog.records, engine.log.of(HintIgnored)
    for said in (record.getMessage(), event.fault):
        assert said.isprintable()
        assert len(said) < 400


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"kvtier": {}}, [], "text", 5])
def test_without_a_hint_nothing_is_put_around_the_policy(make_engine, params):
    engine = make_engine(num_tiers=0)
    policy = engine.table.policy
    context = engine.request(kv_transfer_params=params)
    engine.store(make_keys(2), context)
    engine.finish(context)
    assert engine.table.policy is policy
    assert not engine.log.of(HintIgnored)


def test_valid_hints_are_read():
    given = {"retain": "1.5h", "priority": "low", "session": "s", "ended": True, "tenant": "t"}
    expected = Hint(retain=5400, priority=Priority.LOW, session="s", ended=True, tenant="t")
    assert read_hint({"kvtier": given}) == (expected, "")
    assert read_hint({"kvtier": expected}) == (expected, "")
    assert (
        read_hint({"kvtier": Hint(retain="1.5h", priority="low", session="s", ended=True, tenant="t")}).hint == expected
    )
    assert read_hint({"kvtier": {"retain": 3}}).hint == Hint(retain=3)
    assert read_hint({"kvtier": {"priority": "normal"}}).hint is NO_HINT


def free_disk(view):
    clock = ManualClock()
    options = {"policy": LRUPolicy(16), "block_bytes": 4096, "speed": DeviceSpeed(1e18, 1e18, 0)}
    options |= {"clock": clock, "observer": NullObserver(), "retention": Retention(clock)}
    return [SimulatedTierManager("disk", view, **options)]


def test_a_hint_counts_in_the_tiers_below_too(make_engine):
    engine = make_engine(num_blocks=8, tiers=free_disk)
    serve(engine, "kept", retain="10m")
    scan_by(engine, 40)
    assert all(key in engine.tiers[0].table for key in make_keys(2, "kept"))
    assert not any(key in engine.tiers[0].table for key in make_keys(2, "passes 3"))
    engine.manager.check_invariants()


def test_no_tenant_takes_more_than_its_share_while_others_want_theirs(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=0, tenant_quotas=True)
    for number in range(10):
        serve(engine, f"a {number}", tenant="a")
        engine.manager.check_invariants()
    for number in range(4):
        serve(engine, f"b {number}", tenant="b")
    for number in range(10, 20):
        serve(engine, f"a {number}", tenant="a")
    assert sum(num_held(engine, f"b {number}") for number in range(4)) == 8
    assert sum(num_held(engine, f"a {number}") for number in range(20)) == 8


def test_without_quotas_a_tenants_name_means_nothing(make_engine):
    engine = make_engine(num_blocks=16, num_tiers=0)
    for number in range(4):
        serve(engine, f"b {number}", tenant="b")
    for number in range(10):
        serve(engine, f"a {number}", tenant="a")
    assert sum(num_held(engine, f"b {number}") for number in range(4)) == 0


class Declines(LRUPolicy):
    """Gives nothing away where it may decline."""

    def candidates(self, incoming=()):
        return iter(()) if incoming and self.may_decline else super().candidates(incoming)


class DeclinesWithoutTime(Declines):
    def touch(self, keys):
        super().touch(keys)


@pytest.mark.parametrize("params", [None, {"kvtier": {"tenant": "a"}}])
@pytest.mark.parametrize("policy", [Declines, DeclinesWithoutTime])
@pytest.mark.parametrize("num_tiers", [0, 1])
def test_what_a_tenants_policy_declines_reaches_a_tier_below(make_engine, policy, num_tiers, params):
    engine = make_engine(num_blocks=40, num_tiers=num_tiers, policy=policy, tenant_quotas=True)
    for number in range(25):
        context = engine.request(str(number), kv_transfer_params=params)
        keys = make_keys(2, str(number))
        assert engine.store(keys, context) == (keys if num_tiers or number < 20 else [])
        engine.finish(context)
        engine.step()
        assert all(set(keys) <= tier.blocks.keys() for tier in engine.tiers)


class Raises(LRUPolicy):
    """Fails once it is asked for a victim."""

    def candidates(self, incoming=()):
        raise RuntimeError("of somebody else's policy")


def test_a_policy_that_fails_under_hints_loses_no_slot(make_engine, caplog):
    engine = make_engine(num_blocks=8, num_tiers=0, policy=Raises)
    serve(engine, "kept", retain="10m")
    scan_by(engine, 6)
    assert type(engine.table.policy) is LRUPolicy
    assert "of somebody else's policy" in caplog.text
    serve(engine, "kept again", retain="10m")
    scan_by(engine, 6)
    assert num_held(engine, "kept again") == 2
    engine.manager.check_invariants()


class FailsOnDemand(LRUPolicy):
    """Fails to take keys, or to be created for a tenant, from the moment on that a test says so."""

    fails = False

    def __init__(self, capacity):
        self.raise_if_failing()
        super().__init__(capacity)

    def insert(self, keys, now=0.0):
        self.raise_if_failing()
        super().insert(keys, now)

    def raise_if_failing(self):
        if FailsOnDemand.fails:
            raise RuntimeError("of somebody else's policy")


@pytest.mark.parametrize("hint", [{}, {"tenant": "b"}], ids=["a time ends", "a tenant comes"])
def test_a_policy_that_fails_when_it_learns_of_a_request_is_replaced(make_engine, caplog, monkeypatch, hint):
    engine = make_engine(num_blocks=8, num_tiers=0, policy=FailsOnDemand, tenant_quotas=bool(hint))
    serve(engine, "a", retain="1s")
    serve(engine, "a")
    monkeypatch.setattr(FailsOnDemand, "fails", True)
    if not hint:
        engine.clock.advance(10)
    assert serve(engine, "a", **hint) == 2
    assert "of somebody else's policy" in caplog.text
    engine.manager.check_invariants()
    serve(engine, "kept", retain="10m")
    scan_by(engine, 6)
    assert num_held(engine, "kept") == 2
    engine.manager.check_invariants()


def test_a_policy_declines_as_in_a_memory_without_the_retained_blocks(make_engine):
    """Not more, as if the place of the retained blocks were free."""

    def hits(num_blocks, num_kept):
        engine = make_engine(num_blocks=num_blocks, num_tiers=0, policy=PrefixPolicy, retain_share=0.5)
        keep = engine.request("keep", kv_transfer_params={"kvtier": {"retain": "10h"}})
        engine.store(make_keys(num_kept, "kept"), keep)
        engine.finish(keep)
        rnd, sessions, num_hits = Random(1), [], 0
        for number in range(1500):
            engine.clock.advance(1)
            if len(sessions) < 3 or rnd.random() < 0.5:
                name, length, comes_back = f"session {number}", rnd.randint(5, 15), rnd.random() < 0.3
                sessions += [[name, length]] if comes_back else []
                del sessions[:-12]
            else:
                session = rnd.choice(sessions)
                session[1] += rnd.randint(1, 5)
                name, length = session
            num_hits += engine.run(make_keys(length, name), f"request {number}")
        return num_hits

    assert hits(300, 140) == hits(160, 0) > 0
