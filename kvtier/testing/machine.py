"""A stateful Hypothesis test of the whole manager: the bytes that are loaded must be the bytes that were stored.

Requests look up, wait, load, store, finish and are preempted. Tiers are slow, fail, lose and spoil blocks. The cache is
reset meanwhile; after a reset the same keys have other bytes, as after a change of weights. To use it, derive a class,
define `make_tiers`, and let pytest collect `TestMine = MyMachine.TestCase`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.abc import EvictionPolicy, SecondaryTierManager
from kvtier.errors import InvariantError
from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.testing.clock import ManualClock
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import CPULoadStoreSpec, LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 4096
NUM_BLOCKS = 8
PREFIXES = 4
LONGEST = 6


def chain(prefix: int) -> list[OffloadKey]:
    """Return the keys of one prefix. All prefixes share the first two blocks."""
    return [
        make_offload_key(hashlib.sha256(f"{prefix if i > 1 else 's'}/{i}".encode()).digest(), 0) for i in range(LONGEST)
    ]


@dataclass
class _Store:
    keys: list[OffloadKey]
    slots: list[int]
    weights: int


@dataclass
class _Load:
    keys: list[OffloadKey]
    slots: list[int]
    weights: int


@dataclass
class _Request:
    context: ReqContext
    keys: list[OffloadKey]
    num_hits: int = 0
    stores: list[_Store] = field(default_factory=list)
    loads: list[_Load] = field(default_factory=list)


HINTS = (
    None,
    {"retain": 3},
    {"retain": "2s", "session": "s"},
    {"session": "s", "ended": True},
    {"priority": "high"},
    {"priority": "low"},
    {"tenant": "t", "ended": True},
    {"tenant": "u", "retain": "1h"},
    {"malformed": True},
)


class TieringMachine(RuleBasedStateMachine):
    """An engine with up to five requests and one manager. `weights` counts the resets."""

    settings_of_manager = TieringSettings(
        load_deadline=2.0, lease_timeout=5.0, drain_timeout=5.0, tier_deadline=8.0, promotion_budget=0.7
    )

    def make_tiers(self, arena: Arena, clock: ManualClock) -> Sequence[SecondaryTierManager]:
        """Return the tiers to test, which must be started."""
        raise NotImplementedError

    def make_policy(self, capacity: int) -> EvictionPolicy:
        """Return the primary tier's policy."""
        return LRUPolicy(capacity)

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.arena = Arena.create(NUM_BLOCKS, BLOCK_BYTES)
        self.primary = CPUPrimaryTierOffloadingManager(
            NUM_BLOCKS, self.arena.view, self.make_policy(NUM_BLOCKS), control=None
        )
        self.tiers = list(self.make_tiers(self.arena, self.clock))
        self.manager = TieringOffloadingManager(
            self.primary, self.tiers, settings=self.settings_of_manager, clock=self.clock
        )
        self.requests: list[_Request] = []
        self.weights = 0
        self.count = 0
        self.loaded = 0

    def payload(self, key: OffloadKey, weights: int) -> bytes:
        """Return the bytes of a block, which the model computes with these weights."""
        return hashlib.blake2b(key + weights.to_bytes(4, "big")).digest() * (BLOCK_BYTES // 64)

    @rule(prefix=st.integers(0, PREFIXES - 1), length=st.integers(1, LONGEST), hint=st.sampled_from(HINTS))
    def arrive(self, prefix: int, length: int, hint: object = None) -> None:
        """A request arrives, with or without a hint."""
        if len(self.requests) < 5:
            self.count += 1
            context = ReqContext(f"r{self.count}", None if hint is None else {"kvtier": hint})
            self.manager.on_new_request(context)
            self.requests.append(_Request(context, chain(prefix)[:length]))

    def _pick(self, data: st.DataObject) -> _Request:
        return data.draw(st.sampled_from(self.requests))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def scan(self, data: st.DataObject) -> None:
        """A request looks up its prefix, up to the first miss."""
        request = self._pick(data)
        request.num_hits = 0
        ready = True
        for key in request.keys:
            answer = self.manager.lookup(key, request.context)
            ready = ready and answer is LookupResult.HIT
            request.num_hits += ready
            if answer is LookupResult.MISS:
                break

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def begin_load(self, data: st.DataObject) -> None:
        """A request looks up its prefix and begins to load the hits."""
        request = self._pick(data)
        self.scan_one(request)
        if request.num_hits:
            keys = request.keys[: request.num_hits]
            spec = self.manager.prepare_load(keys, request.context)
            request.loads.append(_Load(keys, spec.block_ids.tolist(), self.weights))

    def scan_one(self, request: _Request) -> None:
        """Count the blocks at the head of a request that are ready."""
        request.num_hits = 0
        for key in request.keys:
            if self.manager.lookup(key, request.context) is not LookupResult.HIT:
                break
            request.num_hits += 1

    @precondition(lambda self: any(request.loads for request in self.requests))
    @rule(data=st.data(), success=st.booleans())
    def end_load(self, data: st.DataObject, success: bool = True) -> None:
        """A device copy from slots ends. Until now, the slots must hold the bytes that were stored."""
        request = data.draw(st.sampled_from([request for request in self.requests if request.loads]))
        load = data.draw(st.sampled_from(request.loads))
        request.loads.remove(load)
        for key, slot in zip(load.keys, load.slots, strict=True):
            if bytes(self.arena.row(slot)) != self.payload(key, load.weights):
                raise InvariantError("bytes loaded are not the bytes stored")
        self.loaded += len(load.keys)
        self.manager.complete_load(set(load.keys), request.context, success)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def begin_store(self, data: st.DataObject) -> None:
        """A request begins to store its prefix."""
        request = self._pick(data)
        output = self.manager.prepare_store(request.keys, request.context)
        if output is not None and output.keys_to_store:
            spec = output.store_spec
            slots = spec.block_ids.tolist() if isinstance(spec, CPULoadStoreSpec) else []
            request.stores.append(_Store(output.keys_to_store, slots, self.weights))

    @precondition(lambda self: any(request.stores for request in self.requests))
    @rule(data=st.data(), success=st.booleans())
    def end_store(self, data: st.DataObject, success: bool) -> None:
        """A device copy to slots ends; it may write to the slots until now."""
        request = data.draw(st.sampled_from([request for request in self.requests if request.stores]))
        store = request.stores.pop(0)
        for key, slot in zip(store.keys, store.slots, strict=True):
            self.arena.row(slot)[:] = self.payload(key, store.weights)
        self.manager.complete_store(set(store.keys), request.context, success)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A request ends. Its device copies go on, and complete later."""
        request = self._pick(data)
        self.manager.on_request_finished(request.context)
        if not request.loads and not request.stores:
            self.requests.remove(request)

    @rule(preempt=st.booleans())
    def step(self, preempt: bool) -> None:
        """A scheduler step ends."""
        preempted = [request.context.req_id for request in self.requests] if preempt else []
        self.manager.on_schedule_end(ScheduleEndContext(preempted_req_ids=preempted))

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.clock.advance(seconds)

    @rule()
    def reset(self) -> None:
        """The weights change while requests are in progress."""
        self.manager.reset_cache()
        self.weights += 1

    @invariant()
    def agrees_with_itself(self) -> None:
        """The manager's parts agree with each other after every step."""
        self.manager.check_invariants()

    def settle(self) -> None:
        """End all copies, jobs and requests."""
        for request in self.requests:
            while request.loads:
                self.manager.complete_load(set(request.loads.pop().keys), request.context)
            while request.stores:
                self.manager.complete_store(set(request.stores.pop().keys), request.context, False)
            self.manager.on_request_finished(request.context)
        self.manager.reset_cache()
        self.manager.on_schedule_end(ScheduleEndContext())

    def teardown(self) -> None:
        """Check that every slot is free after everything has ended."""
        try:
            self.settle()
            self.manager.check_invariants()
            table = self.primary.table
            if table.num_free != table.num_slots:
                raise InvariantError(f"{table.num_slots - table.num_free} slots leaked")
            self.manager.shutdown()
        finally:
            self.arena.close()
