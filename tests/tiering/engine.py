"""An engine in miniature: drives the manager as a scheduler does, with real bytes in a real arena."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from kvtier.eviction.lru import LRUPolicy
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.primary.arena import Arena
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.testing.clock import ManualClock
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.tiering.settings import TieringSettings
from kvtier.types import Admission, LookupResult, ReqContext, ScheduleEndContext

BLOCK_BYTES = 4096
DEFERRED = (LookupResult.HIT_PENDING, LookupResult.RETRY)


class EventLog:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list:
        return [event for event in self.events if type(event) is kind]


def make_keys(count: int, prefix: str = "p", group: int = 0) -> list[OffloadKey]:
    return [make_offload_key(hashlib.sha256(f"{prefix}/{i}".encode()).digest(), group) for i in range(count)]


def payload(key: OffloadKey, version: int = 0) -> bytes:
    return hashlib.blake2b(key + bytes([version]), digest_size=64).digest() * (BLOCK_BYTES // 64)


class Engine:
    """One manager over scripted tiers, a manual clock, and the bytes of a device."""

    def __init__(
        self,
        num_blocks: int = 8,
        num_tiers: int = 1,
        policy: Callable = LRUPolicy,
        admissions: Sequence[Admission] | None = None,
        tiers: Callable[[memoryview], Sequence] | None = None,
        probe_deadlines: Sequence[float | None] | None = None,
        said_bytes: int = BLOCK_BYTES,
        **settings,
    ) -> None:
        """Args: said_bytes: size of a block by which the manager guesses how fast a tier is."""
        self.arena = Arena.create(num_blocks, BLOCK_BYTES)
        self.clock = ManualClock()
        self.log = EventLog()
        self.primary = CPUPrimaryTierOffloadingManager(
            num_blocks, self.arena.view, policy(num_blocks), control=self.arena.control
        )
        self.primary.block_bytes = said_bytes
        names = [f"tier{i}" for i in range(num_tiers)]
        made = tiers(self.arena.view) if tiers else [ScriptedTier(self.arena.view, name) for name in names]
        self.tiers = list(made)
        self.manager = TieringOffloadingManager(
            self.primary,
            self.tiers,
            admissions=admissions,
            probe_deadlines=probe_deadlines,
            settings=TieringSettings(**settings),
            clock=self.clock,
            observer=self.log,
        )

    @property
    def tier(self) -> ScriptedTier:
        return self.tiers[0]

    @property
    def table(self):
        return self.primary.table

    def request(self, name: str = "r", **context) -> ReqContext:
        req_context = ReqContext(name, **context)
        self.manager.on_new_request(req_context)
        return req_context

    def step(self, *, new: Iterable[str] = (), preempted: Iterable[str] = ()) -> None:
        self.manager.on_schedule_end(ScheduleEndContext(tuple(new), tuple(preempted)))
        self.manager.check_invariants()

    def scan(self, keys: Iterable[OffloadKey], context: ReqContext) -> list[LookupResult]:
        """Look up a prefix as an engine does: to the first MISS."""
        answers = []
        for key in keys:
            answers.append(self.manager.lookup(key, context))
            if answers[-1] is LookupResult.MISS:
                break
        return answers

    def hits(self, keys: Iterable[OffloadKey], context: ReqContext) -> int:
        """Scan once; return the length of the prefix that is ready."""
        answers = self.scan(keys, context)
        return next((i for i, answer in enumerate(answers) if answer is not LookupResult.HIT), len(answers))

    def let_tiers_answer(self) -> None:
        """Have every tier answer one question: the first of a life may take longer."""
        key, context = make_keys(1, "first question"), self.request("first question")
        for tier in self.tiers:
            tier.unknown |= set(key)
        self.scan(key, context)
        self.step()
        for tier in self.tiers:
            tier.unknown -= set(key)
        self.step()
        self.finish(context)

    def wait_hits(self, keys: Sequence[OffloadKey], context: ReqContext, steps: int = 50) -> int:
        """Scan, a step at a time, until nothing is deferred; return the length of the prefix that is ready."""
        for _ in range(steps):
            answers = self.scan(keys, context)
            self.step()
            if not any(answer in DEFERRED for answer in answers):
                return sum(answer is LookupResult.HIT for answer in answers)
        raise AssertionError("a key stayed deferred")

    def fill(self, slots: Iterable[int], keys: Iterable[OffloadKey], version: int = 0) -> None:
        """The device copy of a store."""
        for slot, key in zip(slots, keys, strict=True):
            self.arena.row(slot)[:] = payload(key, version)

    def store(self, keys: Sequence[OffloadKey], context: ReqContext, version: int = 0) -> list[OffloadKey]:
        """Prepare, copy, complete; return the keys stored."""
        output = self.manager.prepare_store(keys, context)
        if output is None:
            return []
        self.fill(output.store_spec.block_ids.tolist(), output.keys_to_store, version)
        self.manager.complete_store(set(output.keys_to_store), context)
        return output.keys_to_store

    def load(self, keys: Sequence[OffloadKey], context: ReqContext) -> list[bytes]:
        """Prepare, copy, complete; return the bytes loaded."""
        spec = self.manager.prepare_load(keys, context)
        loaded = [bytes(self.arena.row(slot)) for slot in spec.block_ids.tolist()]
        self.manager.complete_load(set(keys), context)
        return loaded

    def finish(self, context: ReqContext) -> None:
        self.manager.on_request_finished(context)

    def run(self, keys: Sequence[OffloadKey], name: str) -> int:
        """A whole request: restore what is there, verify it, store the rest. Return the blocks restored."""
        context = self.request(name)
        num_hits = self.wait_hits(keys, context)
        if num_hits:
            assert self.load(keys[:num_hits], context) == [payload(key) for key in keys[:num_hits]]
        self.store(keys[num_hits:], context)
        self.finish(context)
        self.step()
        return num_hits

    def plant(self, keys: Iterable[OffloadKey], tier: int = 0) -> None:
        """Put blocks straight into a tier."""
        for key in keys:
            self.tiers[tier].blocks[key] = payload(key)

    def close(self) -> None:
        self.manager.shutdown()
        self.arena.close()
