"""The suites must fail for every store that is broken; else they would pass anything."""

import inspect
import json
import subprocess
import sys
import threading

import pytest

from kvtier.errors import StoreError
from kvtier.stores.integrity.checked_store import CheckedStore
from kvtier.stores.memory import MemoryStore
from kvtier.stores.slab import SlabStore
from kvtier.testing.faulty_stores import (
    EXIT_STATUS,
    Fault,
    FaultPlan,
    FaultyBlockStore,
    FaultySlotStore,
    Injection,
    LyingBlockStore,
)
from kvtier.testing.slot_stores import SlotStoreSuite
from kvtier.testing.stores import StoreSuite, make_key

HANG_DEADLINE = 0.5
IN_PROCESS = [fault for fault in Fault if fault is not Fault.EXIT]


def first_failure(suite_class, plan):
    """Run the suite's tests until one fails; return its name, or None. A test that hangs has failed."""
    for name, _ in inspect.getmembers(suite_class, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        suite = suite_class()
        failures = []

        def run(suite=suite, name=name, failures=failures):
            try:
                suite.setup_method()
                try:
                    getattr(suite, name)()
                finally:
                    suite.teardown_method()
            except Exception as error:  # noqa: BLE001 - any failure is what we look for
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(HANG_DEADLINE if plan.hangs else None)
        hung = thread.is_alive()
        plan.release.set()
        thread.join()
        if hung or failures:
            return name
    return None


class Plan(FaultPlan):
    hangs = False


def make_plan(*faults):
    plan = Plan(*faults)
    plan.hangs = Fault.HANG in faults
    return plan


def lying_suite(plan):
    class Suite(StoreSuite):
        def open_store(self, medium, context):
            return LyingBlockStore(CheckedStore(MemoryStore(1 << 20), context), plan)

        def plant(self, store, key, raw):
            store.inner.inner.write([key], [memoryview(raw)])

        def peek(self, store, key):
            return store.inner.inner.snapshot().get(key)

    return Suite


def unsealed_suite():
    class Suite(StoreSuite):
        def open_store(self, medium, context):
            return MemoryStore(1 << 20)

        def plant(self, store, key, raw):
            store.write([key], [memoryview(raw)])

        def peek(self, store, key):
            return store.snapshot().get(key)

    return Suite


def slot_suite(plan):
    class Suite(SlotStoreSuite):
        def open_store(self, medium, context):
            return FaultySlotStore(SlabStore.open({"path": str(medium / "slab"), "capacity": 1 << 20}, context), plan)

        def file(self, name):
            return self.medium / "slab" / self.context.namespace.fingerprint.hex() / name

        def replace(self, name, offset, raw):
            with self.file(name).open("r+b") as file:
                file.seek(offset)
                file.write(raw)

        def part(self, name, offset, length):
            return self.file(name).read_bytes()[offset : offset + length]

        def plant(self, store, slot, raw):
            self.replace("data-00000", slot * self.block_bytes, raw)

        def peek(self, store, slot):
            return self.part("data-00000", slot * self.block_bytes, self.block_bytes)

        def plant_record(self, store, slot, raw):
            self.replace("headers", slot * 128, raw)

        def peek_record(self, store, slot):
            return self.part("headers", slot * 128, 128)

    return Suite


def test_a_sound_store_passes():
    plan = make_plan()
    assert first_failure(lying_suite(plan), plan) is None
    assert first_failure(slot_suite(plan), plan) is None


@pytest.mark.parametrize("fault", IN_PROCESS)
def test_every_fault_fails_the_store_suite(fault):
    plan = make_plan(fault)
    assert first_failure(lying_suite(plan), plan) is not None


@pytest.mark.parametrize("fault", IN_PROCESS)
def test_every_fault_fails_the_slot_store_suite(fault):
    plan = make_plan(fault)
    assert first_failure(slot_suite(plan), plan) is not None


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (call, fault)
        for call in ("contains", "write", "read_into", "delete")
        for fault in (Fault.RAISE, Fault.LIE_ABOUT_PRESENCE, Fault.RETURN_FALSE, Fault.TOO_FEW_ANSWERS)
        if (call, fault)
        not in {
            ("read_into", Fault.LIE_ABOUT_PRESENCE),
            ("delete", Fault.LIE_ABOUT_PRESENCE),
            ("delete", Fault.TOO_FEW_ANSWERS),
        }  # these change nothing
    ],
)
def test_one_broken_method_fails_the_store_suite(call, fault):
    plan = make_plan(Injection(fault, [call]))
    assert first_failure(lying_suite(plan), plan) is not None


def test_a_store_without_seal_fails_the_store_suite():
    assert first_failure(unsealed_suite(), make_plan()) is not None


def open_faulty(context, *rows, cls=FaultyBlockStore):
    inner = {"inner": "kvtier.stores.memory:MemoryStore", "inner_options": {"capacity": 1 << 20}}
    return cls.open({**inner, "plan": list(rows)}, context)


@pytest.fixture
def context():
    return StoreSuite().make_context()


def test_a_plan_of_json_counts_calls(context):
    store = open_faulty(context, {"fault": "raise", "calls": ["contains"], "skip": 1, "times": 2})
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(store.contains([make_key(1)]))
        except RuntimeError:
            outcomes.append("raised")
    assert outcomes == [[False], "raised", "raised", [False]]


def test_a_fault_lasts_as_long_as_its_file(context, tmp_path):
    switch = tmp_path / "switch"
    store = open_faulty(context, {"fault": "lie_about_presence", "while_path": str(switch)})
    assert store.contains([make_key(1)]) == [False]
    switch.touch()
    assert store.contains([make_key(1)]) == [True]
    switch.unlink()
    assert store.contains([make_key(1)]) == [False]


def test_a_hang_ends_with_its_file(context, tmp_path):
    switch = tmp_path / "switch"
    switch.touch()
    store = open_faulty(context, {"fault": "hang", "calls": ["contains"], "while_path": str(switch)})
    thread = threading.Thread(target=store.contains, args=([make_key(1)],))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    switch.unlink()
    thread.join(10)
    assert not thread.is_alive()


EXITING = """
import json, sys
from kvtier.testing.faulty_stores import FaultySlotStore
from kvtier.testing.stores import StoreSuite, make_key
suite = StoreSuite()
store = FaultySlotStore.open(json.loads(sys.argv[1]), suite.make_context())
for slot in range(3):
    print(slot, store.write([slot], [make_key(slot)], suite.buffers(1)), flush=True)
"""


def test_a_process_that_exits_in_mid_call(tmp_path):
    options = {
        "inner": "kvtier.stores.slab:SlabStore",
        "inner_options": {"path": str(tmp_path / "slab"), "capacity": 1 << 20},
        "plan": [{"fault": "exit", "calls": ["write"], "skip": 2}],
    }
    ended = subprocess.run([sys.executable, "-c", EXITING, json.dumps(options)], capture_output=True, text=True)
    assert ended.returncode == EXIT_STATUS
    assert ended.stdout.splitlines() == ["0 [True]", "1 [True]"]


@pytest.mark.parametrize("cls", [FaultyBlockStore, LyingBlockStore])
def test_opening_can_fail_by_plan(context, cls):
    with pytest.raises(RuntimeError):
        open_faulty(context, {"fault": "raise", "calls": ["open"]}, cls=cls)


@pytest.mark.parametrize("fault", [fault for fault in IN_PROCESS if fault is not Fault.HANG])
def test_the_seal_makes_every_fault_of_a_plain_store_a_miss(context, fault):
    plan = make_plan()
    store = CheckedStore(FaultyBlockStore(MemoryStore(1 << 20), plan), context)
    payloads = {number: StoreSuite().payload(number) for number in range(4)}
    keys = [make_key(number) for number in payloads]
    assert all(store.write(keys, [memoryview(payload) for payload in payloads.values()]))
    plan.add(fault)
    buffers = StoreSuite().buffers(4)
    try:
        results = store.read_into(keys, buffers)
    except StoreError:
        results = [False] * 4
    assert not any(results) or fault in (Fault.OLD_VALUE, Fault.LIE_ABOUT_PRESENCE)
    for number, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
        assert bytes(buffer) == (payloads[number] if result else bytes([0xA5]) * context.block_bytes)
    if not all(results):
        assert sum(context.failures.take().values()) >= 4
