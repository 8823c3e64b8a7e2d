"""Prefix: the suite, what it knows of chains, and sessions that grow."""

import gc
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count, islice
from random import Random

import pytest

from kvtier.eviction.ages import MAX_MOVED, Ages
from kvtier.eviction.chains import Part, Request
from kvtier.eviction.leaves import Leaves
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.reuse import EDGES, NUM_BINS, NUM_CLASSES, ReuseTable, class_of
from kvtier.hints import Hint
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable
from kvtier.primary.transit import Declining
from kvtier.primary.uses import RequestUses
from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.testing.clock import ManualClock
from kvtier.testing.policies import PolicySuite, admit, keys_of
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import ReqContext, ScheduleEndContext

from .one_by_one import skewed_trace
from .replay import Requests, replay
from .textbook_prefix import TextbookPrefix


class TestPrefix(PolicySuite):
    def make_policy(self, capacity: int) -> PrefixPolicy:
        return PrefixPolicy(capacity)


def growing_sessions(num_live: int = 40, num_sessions: int = 120, seed: int = 2) -> Requests:
    """Sessions of 5 to 30 turns that share two blocks, grow by about three a turn, and interleave."""
    random, fresh = Random(seed), count(2)
    key = [make_offload_key(number.to_bytes(8, "big"), 0) for number in range(100_000)]
    queue = [(random.uniform(0, 60), index, list(range(2)), random.randint(5, 30)) for index in range(num_live)]
    queue.sort()
    started, requests = num_live, []
    while queue:
        now, index, numbers, turns = heappop(queue)
        numbers = [*numbers, *islice(fresh, 1 + int(random.expovariate(1 / 3)))]
        requests.append([key[number] for number in numbers])
        if turns > 1:
            heappush(queue, (now + 2 + random.expovariate(1 / 30), index, numbers, turns - 1))
        elif started < num_sessions:
            heappush(queue, (now + 1, started, list(range(2)), random.randint(5, 30)))
            started += 1
    return requests


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_growing_sessions_do_not_collapse(share: float) -> None:
    requests = growing_sessions()
    capacity = int(share * len({key for keys in requests for key in keys}))
    ours, lru = (replay(policy(capacity), requests) for policy in (PrefixPolicy, LRUPolicy))
    assert ours.hit_percent > lru.hit_percent - 2.0


def use(policy: PrefixPolicy, keys: list[OffloadKey], now: float) -> None:
    """Make the calls that a manager makes for a request."""
    policy.touch([key for key in keys if key in policy], now)
    missing = [key for key in keys if key not in policy]
    own, wanted = set(keys), len(policy) + len(missing) - policy.capacity
    policy.evict(list(islice((key for key in policy.candidates(missing) if key not in own), max(0, wanted))))
    policy.insert(missing[: policy.capacity - len(policy)], now)
    policy.settle(keys)


SOME_COME_BACK = [step // 2 % 50 if step % 2 else 50 + step for step in range(3000)]


@pytest.mark.parametrize(("numbers", "declines"), [(skewed_trace(5, 4000), False), (SOME_COME_BACK, True)])
def test_requests_of_one_block_equal_the_textbook(numbers: list[int], declines: bool) -> None:
    policy, textbook = PrefixPolicy(40), TextbookPrefix(40)
    keys = keys_of(*range(max(numbers) + 1))
    for now, number in enumerate(numbers):
        textbook.request(keys[number])
        use(policy, [keys[number]], now)
        assert len(policy) == sum(block.held for block in textbook.known.values())
        assert all(key in policy for key in textbook.known if key in textbook), f"request {now}"
        policy.check_invariants()
    assert (textbook.declined > 100) == declines


def test_a_held_block_has_all_before_it() -> None:
    policy = PrefixPolicy(300)
    for number, keys in enumerate(growing_sessions()[:1200]):
        use(policy, keys, number)
        if number % 50 == 0:
            policy.check_invariants()
            held = [key in policy for key in keys]
            assert held == sorted(held, reverse=True)


def test_a_block_never_goes_before_those_that_need_it() -> None:
    policy = PrefixPolicy(300)
    requests = growing_sessions()[:1200]
    before = {key: keys[index - 1] for keys in requests for index, key in enumerate(keys) if index}
    for number, keys in enumerate(requests):
        use(policy, keys, number)
        if number % 100 == 99:
            place = {key: index for index, key in enumerate(policy.candidates())}
            assert all(place[key] < place[before[key]] for key in place if key in before)


def test_it_learns_that_one_history_comes_back_and_another_does_not() -> None:
    policy, lru, fresh, random = PrefixPolicy(40), LRUPolicy(40), count(100), Random(4)
    now = count()
    for round_number in range(200):
        is_last = round_number == 199
        use(policy, keys_of(0, 1, 2, 3), next(now))
        admit(lru, keys_of(0, 1, 2, 3))
        for _ in range(4 if is_last else random.randint(1, 6)):
            scan = keys_of(*islice(fresh, 16))
            use(policy, scan, next(now))
            admit(lru, scan)
    assert all(key in policy for key in keys_of(0, 1, 2, 3))
    assert not any(key in lru for key in keys_of(0, 1, 2, 3))


def test_it_learns_when_sessions_come_back() -> None:
    """Tools answer after a minute, and people never: a session that waits for its tool stays while others pass."""
    policy, lru, fresh, now = PrefixPolicy(100), LRUPolicy(100), count(1000), 0.0
    hits = {policy: 0, lru: 0}
    session = keys_of(*islice(fresh, 20))
    for _ in range(150):
        for cache in (policy, lru):
            hits[cache] += sum(key in cache for key in session)
        session += keys_of(*islice(fresh, 1))
        session = session if len(session) < 40 else keys_of(*islice(fresh, 20))
        use(policy, session, now)
        admit(lru, session, now)
        for _ in range(12):
            now += 5.0
            passing = keys_of(*islice(fresh, 10))
            use(policy, passing, now)
            admit(lru, passing, now)
    assert hits[policy] > 3000
    assert hits[lru] == 0


def test_a_long_prompt_does_not_flush_a_small_cache() -> None:
    policy, fresh = PrefixPolicy(50), count(1000)
    for now in range(300):
        use(policy, keys_of(*range(20)), now)
        if now % 5 == 4:
            use(policy, keys_of(*islice(fresh, 60)), now + 0.5)
            assert now < 100 or all(key in policy for key in keys_of(*range(20)))


def test_calls_of_one_request_are_one_use() -> None:
    policy = PrefixPolicy(8)
    policy.insert(keys_of(0, 1), 1.0)
    policy.insert(keys_of(2), 2.0)
    for _ in range(3):
        policy.touch(keys_of(0, 1), 3.0)
        policy.touch(keys_of(2), 4.0)
    assert policy.uses_of(keys_of(0)[0]) == 2


def test_ghosts_remember_uses() -> None:
    policy = PrefixPolicy(4)
    policy.insert(keys_of(0, 1), 1.0)
    policy.insert(keys_of(5), 2.0)
    policy.touch(keys_of(0, 1), 3.0)
    policy.evict(keys_of(1, 0, 5))
    policy.insert(keys_of(7), 4.0)
    policy.insert(keys_of(0, 1, 2), 5.0)
    assert [policy.uses_of(key) for key in keys_of(0, 1, 2)] == [3, 3, 1]


def test_a_request_in_pieces_is_one_chain() -> None:
    """An engine prefills a long prompt in pieces, and other requests come between them."""
    policy, keys = PrefixPolicy(100), keys_of(*range(20))
    policy.insert(keys[:6], 1.0)
    policy.settle(keys[:6])
    policy.touch(keys[:6], 2.0)
    for start in range(6, 20, 2):
        policy.insert(keys[start : start + 2], 2.0)
        policy.insert(keys_of(100 + start), 3.0 + start)
    policy.settle(keys)
    policy.check_invariants()
    assert [key for key in policy.candidates() if key in keys] == keys[::-1]
    assert [policy.uses_of(key) for key in keys] == [2] * 6 + [1] * 14


def test_a_request_ends_after_a_block_in_the_middle_went_and_came_back() -> None:
    policy = PrefixPolicy(64)
    first, *rest = keys = keys_of(0, 1, 2, 3)
    policy.insert([first], 1.0)
    policy.insert(rest, 1.0)
    policy.evict([rest[1]])
    policy.insert([rest[1]], 2.0)
    policy.settle(keys)
    policy.check_invariants()
    assert set(policy.candidates()) == set(keys)


def test_a_request_that_ends_out_of_prefix_order_closes_no_cycle() -> None:
    policy, keys = PrefixPolicy(64), keys_of(0, 1, 2)
    policy.insert(keys[:2], 1.0)
    policy.insert(keys[2:], 1.0)
    policy.settle([keys[1], keys[2], keys[0]])
    policy.check_invariants()
    assert set(policy.candidates()) == set(keys)


def test_after_a_long_pause_no_call_moves_all_parts_at_once() -> None:
    table = ReuseTable()
    leaves = Leaves(table)
    ages, parts = Ages(table, leaves), [Part(keys_of(n), 0, 1, Request(n / 1000)) for n in range(2 * MAX_MOVED)]
    for part in parts:
        leaves.enter(part)
        ages.enter(part)
    for call in (1, 2):
        ages.advance(100_000.0)
        assert sum(part.bin == NUM_BINS - 1 for part in parts) == call * MAX_MOVED
    leaves.check_invariants(set(parts))


def test_what_is_taken_back_late_leaves_no_debt():
    table, kind = ReuseTable(), class_of(1, None)
    for _ in range(3):
        table.note_reached(kind, 0, 20)
        for _ in range(20):
            table.learn()
        table.take_back(kind, 20)
    table.learn()
    assert all(0 <= rank < 1 for rank in table.ranks[kind])


def test_ranks_rise_towards_the_age_at_which_blocks_come_back() -> None:
    table, tools, people = ReuseTable(), class_of(1, 60.0), class_of(1, None)
    for _ in range(100):
        for index in range(NUM_BINS):
            table.note_reached(people, index, 10)
            if EDGES[max(0, index - 1)] < 60.0:
                table.note_reached(tools, index, 10)
        table.note_used(tools, 60.0, 10)
    table.learn()
    young, old = (table.ranks[tools][sum(edge <= age for edge in EDGES)] for age in (1.0, 50.0))
    assert young < old
    assert max(table.ranks[people]) < young


def test_classes_are_told_apart_by_uses_and_gap() -> None:
    gaps = (None, 0.0, 5.0, 10.0, 20.0, 45.0, 90.0, 200.0, 600.0, 5000.0)
    classes = [class_of(uses, gap) for uses in (1, 2, 3, 5, 8, 20, 100) for gap in gaps]
    assert sorted(classes) == list(range(NUM_CLASSES))


def test_a_long_session_leaves_no_trace_of_its_requests() -> None:
    policy = PrefixPolicy(50)
    for now in range(1000):
        use(policy, keys_of(*range(5), 10 + now), now)
    gc.collect()
    assert sum(isinstance(found, Request) for found in gc.get_objects()) < 10 * policy.capacity


@pytest.mark.parametrize("with_tier", [False, True])
def test_a_long_prompt_does_not_flush_a_memory_whether_a_tier_is_below_or_not(with_tier: bool) -> None:
    view = memoryview(bytearray(50)).cast("B", (50, 1))
    tiers = [ExampleSecondaryTierManager(None, view, "example")] if with_tier else []
    primary = CPUPrimaryTierOffloadingManager(50, view, PrefixPolicy(50))
    clock = ManualClock()
    manager = TieringOffloadingManager(primary, tiers, clock=clock)

    def serve(keys: list[OffloadKey]) -> None:
        clock.advance(1.0)
        context = ReqContext(str(clock()))
        manager.on_new_request(context)
        output = manager.prepare_store(keys, context)
        if output is not None:
            manager.complete_store(set(output.keys_to_store), context)
        manager.on_request_finished(context)
        manager.on_schedule_end(ScheduleEndContext())
        manager.check_invariants()

    fresh = count(1000)
    for number in range(300):
        serve(keys_of(*range(20)))
        if number % 5 == 4:
            serve(keys_of(*islice(fresh, 60)))
            assert number < 100 or all(key in primary.table for key in keys_of(*range(20)))
    manager.shutdown()


def test_blocks_that_jobs_use_leave_no_block_out_of_memory_while_others_rank_as_low() -> None:
    table = BlockTable(100, PrefixPolicy(100))
    for now in range(10):
        held = keys_of(*range(10 * now, 10 * now + 10))
        table.publish(table.apply(table.plan(held, declining=Declining.REFUSED), now))
        table.settle(held)
    table.pin([table.slot_of[key] for key in table.pick_victims(10, (), ())])
    table.touch((), 10.0)
    placement = table.plan(keys_of(*range(100, 110)), declining=Declining.REFUSED)
    assert len(placement.victims) == 10
    assert placement.num_left_out == placement.num_passing == 0


def with_hints(table: BlockTable, quotas: bool = False) -> None:
    Retention(ManualClock(), quotas=quotas).serve(table, RequestUses(0.0, "first", Hint(tenant="one")))


@pytest.mark.parametrize("prepare", [lambda table: None, with_hints, lambda table: with_hints(table, quotas=True)])
def test_a_block_never_goes_before_one_that_a_job_uses_and_that_needs_it(prepare: Callable[[BlockTable], None]) -> None:
    """The later block would stay, and no request could load it."""
    table = BlockTable(20, PrefixPolicy(20))
    prepare(table)
    older, newer = keys_of(*range(10)), keys_of(*range(10, 20))
    for now, held in enumerate((older, newer)):
        table.publish(table.apply(table.plan(held), now))
        table.settle(held)
    table.pin([table.slot_of[older[6]]])
    assert table.pick_victims(6, (), ()) == [*older[:6:-1], *newer[:6:-1]]
    assert table.pick_victims(6, (), ({older[8]},)) == [older[9], *newer[:4:-1]]
    table.unpin([table.slot_of[older[6]]])
    assert table.pick_victims(6, (), ()) == older[:3:-1]


def test_the_blocks_that_two_sessions_share_stay_while_a_job_uses_one_of_the_sessions() -> None:
    table, shared = BlockTable(20, PrefixPolicy(20)), keys_of(*range(4))
    sessions = [[*shared, *keys_of(*range(start, start + 3))] for start in (10, 20)]
    for now, keys in enumerate(sessions):
        table.touch([key for key in keys if key in table], now)
        table.publish(table.apply(table.plan(keys), now))
        table.settle(keys)
    table.pin([table.slot_of[sessions[0][-1]]])
    assert table.pick_victims(20, (), ()) == sessions[1][:3:-1]


def test_sessions_have_no_holes_whatever_jobs_use() -> None:
    random, table, pinned = Random(5), BlockTable(64, PrefixPolicy(64)), list[int]()
    sessions = [keys_of(*range(100 * number, 100 * number + 40)) for number in range(12)]
    for now in range(600):
        keys = random.choice(sessions)[: random.randint(1, 40)]
        own = [key for key in keys if key in table]
        table.touch(own, now)
        placement = table.plan(keys, set(own), declining=random.choice([Declining.NEVER, Declining.REFUSED]))
        table.publish(table.apply(placement, now))
        table.settle(keys)
        table.unpin(pinned)
        pinned = random.sample(sorted(table.slot_of.values()), min(6, len(table)))
        table.pin(pinned)
        for chain in sessions:
            assert [key in table for key in chain] == sorted([key in table for key in chain], reverse=True)
        table.check_invariants()


def test_blocks_on_the_device_that_a_former_request_used_do_not_hide_which_request_ends():
    """An engine settles blocks that it found on its device, too, which this request has not touched in the policy."""
    policy = PrefixPolicy(100)
    keys = keys_of(*range(5))
    policy.insert(keys[:3], 1.0)
    policy.settle(keys[:3])
    former = policy._chains.find(keys[0]).request
    policy.insert(keys[3:], 2.0)
    request = policy._chains.find(keys[4]).request
    policy.settle(keys)
    assert (former.length, request.length) == (3, 5)
    assert request.last is None


def test_the_garbage_collector_visits_few_objects_per_block() -> None:
    """A full collection would grow with the held and the evicted blocks, and a policy may remember millions."""
    policy, keys = PrefixPolicy(70_000), tuple(keys_of(*range(800)))
    for start in range(0, len(keys), 40):
        admit(policy, keys[start : start + 40], float(start))
        policy.settle(keys[start : start + 40])
    policy.evict(list(islice(policy.candidates(), 300)))
    gc.collect()
    named = set(keys)
    visited = [seen for seen in gc.get_objects() if isinstance(seen, dict | list | tuple) and seen is not keys]
    visited = [seen for seen in visited if next((key for key in seen if key.__class__ is bytes), None) in named]
    assert sum(map(len, visited)) < 40, "more than the rest of the part of which some blocks were evicted"


@pytest.mark.parametrize("seed", range(4))
def test_frozen_parts_are_cut_joined_and_evicted_as_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same calls, a policy that freezes no part holds the same blocks in the same order."""
    random, keys = Random(seed), keys_of(*range(60))
    frozen, thawed = PrefixPolicy(70_000), PrefixPolicy(70_000)
    for time in range(150):
        some = keys[: random.randint(1, 60)] if random.random() < 0.7 else keys[random.randint(0, 50) :]
        gone = random.randint(0, 12)
        for policy in (frozen, thawed):
            with monkeypatch.context() as patch:
                if policy is thawed:
                    patch.setattr(Part, "freeze", lambda part: None)
                admit(policy, some, float(time))
                policy.settle(some)
                policy.evict(list(islice(policy.candidates(), min(gone, len(policy) // 2))))
                policy.check_invariants()
        assert list(frozen.candidates()) == list(thawed.candidates())


def test_parts_that_are_cut_and_joined_again_and_again_take_no_more_memory() -> None:
    policy, keys, sizes = PrefixPolicy(100), keys_of(*range(90)), set[tuple[int, int]]()
    admit(policy, keys, 0.0)
    for time in range(1, 400, 2):
        for used in (keys[:40], keys):
            time += 1
            policy.touch(used, float(time))
            policy.settle(used)
        policy.check_invariants()
        sizes.add((len(policy._chains.parts), len(policy._chains.find(keys[0]).numbers)))
    assert max(sizes) <= (6, 3)
