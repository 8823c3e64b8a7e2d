"""The whole manager against a dict, over slow and failing tiers and over the real ones."""

import hashlib
import shutil
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvtier.abc import TierContext
from kvtier.errors import InvariantError
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.namespace import Namespace
from kvtier.secondary.disk import DiskTierManager
from kvtier.secondary.example import ExampleSecondaryTierManager
from kvtier.secondary.memory_tier import MemoryTierManager
from kvtier.testing.machine import TieringMachine, chain
from kvtier.testing.scripted_tier import ScriptedTier
from kvtier.types import JobResult

QUICK = settings(
    max_examples=60,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class JoiningTier(ScriptedTier):
    joins_stores = True


class ScriptedMachine(TieringMachine):
    """Two tiers that answer when and how Hypothesis says."""

    def make_tiers(self, arena, clock):
        tiers = [JoiningTier(arena.view, "slow"), ScriptedTier(arena.view, "quick")]
        tiers[0].auto = False
        return tiers

    def make_policy(self, capacity):
        return ARCPolicy(capacity)

    @precondition(lambda self: self.tiers[0].waiting)
    @rule(data=st.data())
    def answer(self, data):
        self.tiers[0].finish(data.draw(st.sampled_from(self.tiers[0].waiting)))

    @rule(data=st.data(), tier=st.integers(0, 1))
    def fail_some(self, data, tier):
        held = sorted(self.tiers[tier].blocks)
        self.tiers[tier].fail = set(data.draw(st.lists(st.sampled_from(held), max_size=3))) if held else set()

    @rule(data=st.data(), tier=st.integers(0, 1))
    def lose_some(self, data, tier):
        for key in sorted(self.tiers[tier].blocks)[:: data.draw(st.integers(1, 3))]:
            del self.tiers[tier].blocks[key]

    @rule(tier=st.integers(0, 1), full=st.booleans())
    def throttle(self, tier, full):
        self.tiers[tier].full = full

    @rule(job_id=st.integers(0, 40))
    def answer_nonsense(self, job_id):
        if all(job.job_id != job_id for job in self.tiers[0].waiting):
            self.tiers[1].results.append(JobResult(10_000 + job_id, True))

    def teardown(self):
        for tier in self.tiers:
            tier.fail = set()
        super().teardown()


class RealMachine(TieringMachine):
    """The disk, memory and example tiers, run in line, under quotas of tenants; blocks are spoilt on the disk."""

    settings_of_manager = replace(TieringMachine.settings_of_manager, tenant_quotas=True)

    def make_tiers(self, arena, clock):
        self.directory = tempfile.mkdtemp()
        context = TierContext(Namespace({"model": "machine"}), arena.fd, clock, tenant_quotas=True, inline_io=True)
        spec = SimpleNamespace(tier_context=context)
        tiers = [
            MemoryTierManager(spec, arena.view, "memory", capacity=6 * 4400),
            DiskTierManager(spec, arena.view, "disk", path=self.directory, capacity=300_000),
            ExampleSecondaryTierManager(spec, arena.view, "example"),
        ]
        for tier in tiers:
            tier.start()
        return tiers

    @rule(data=st.data())
    def spoil(self, data):
        files = sorted(Path(self.directory).glob("*/data-*"))
        if files:
            path = data.draw(st.sampled_from(files))
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.seek(data.draw(st.integers(0, max(0, size - 1))))
                file.write(b"\x5a")

    def teardown(self):
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.directory)


class TestScripted(ScriptedMachine.TestCase):
    settings = QUICK


class ChoosyPolicy(LRUPolicy):
    """Declines the second half of what finds no room."""

    def candidates(self, incoming=()):
        wanted = len(self) + len(incoming) - self.capacity
        return islice(super().candidates(), wanted // 2 if incoming and self.may_decline else None)


class ChoosyMachine(ScriptedMachine):
    """The same tiers below a policy that declines, so that blocks are in transit."""

    def make_policy(self, capacity):
        return ChoosyPolicy(capacity)


class TestChoosy(ChoosyMachine.TestCase):
    settings = QUICK


class TestReal(RealMachine.TestCase):
    settings = settings(QUICK, max_examples=25)


class First:
    """Draws the first of what there is to draw."""

    def draw(self, strategy):
        return strategy.elements[0]


def store_then_load(machine):
    """One request stores and leaves; after a reset another finds, loads and checks the same prefix."""
    machine.arrive(prefix=0, length=3)
    machine.begin_store(data=First())
    machine.end_store(data=First(), success=True)
    machine.finish(data=First())
    machine.step(preempt=False)
    machine.reset()
    machine.arrive(prefix=0, length=3)
    for _ in range(3):
        machine.scan(data=First())
        machine.step(preempt=False)
    machine.begin_load(data=First())
    if machine.requests[0].loads:
        machine.end_load(data=First())


def test_the_machine_notices_bytes_of_former_weights():
    class Spoilt(ScriptedMachine):
        def make_tiers(self, arena, clock):
            tiers = super().make_tiers(arena, clock)
            for tier in tiers:
                tier.start_epoch = lambda epoch: None  # blocks of the old weights stay
                tier.auto = True
            return tiers

    sound, spoilt = ScriptedMachine(), Spoilt()
    store_then_load(sound)
    sound.teardown()
    with pytest.raises(InvariantError, match="bytes loaded are not the bytes stored"):
        store_then_load(spoilt)
    spoilt.arena.close()


class RecencyMachine(ScriptedMachine):
    def make_policy(self, capacity):
        return LRUPolicy(capacity)


def test_the_machine_notices_a_slot_that_is_reused_under_a_load():
    machine = RecencyMachine()
    machine.arrive(prefix=0, length=3)
    machine.begin_store(data=First())
    machine.end_store(data=First(), success=True)
    machine.begin_load(data=First())
    machine.primary.table.unpin(machine.requests[0].loads[0].slots)  # somebody lost count
    machine.arrive(prefix=1, length=6)
    machine.requests.reverse()
    for prefix in (1, 2, 3):
        machine.requests[0].keys = chain(prefix)
        machine.begin_store(data=First())
        if machine.requests[0].stores:
            machine.end_store(data=First(), success=True)
        for tier in machine.tiers:
            for job in list(tier.waiting):
                tier.finish(job)
        machine.step(preempt=False)
    machine.requests.reverse()
    with pytest.raises(InvariantError):
        machine.end_load(data=First())


def test_the_machine_notices_a_leaked_slot():
    machine = ScriptedMachine()
    machine.arrive(prefix=0, length=3)
    machine.begin_store(data=First())
    machine.requests[0].stores.clear()  # a completion that never comes
    with pytest.raises(InvariantError, match="3 slots leaked"):
        machine.teardown()


def test_the_payload_depends_on_the_weights():
    machine = ScriptedMachine()
    key = hashlib.sha256(b"x").digest()
    assert machine.payload(key, 0) != machine.payload(key, 1)
    machine.teardown()
