"""Random operations on a store beside a model of it: what is loaded is what was stored, or a miss.

An operation is the storing, loading, evicting or damaging of one block, or an end (a reopening, a kill) of the store.
The model knows, by slot, which version of which block was last written; a payload is made of key and version, so that
a stale byte is as wrong as a foreign one.
"""

import os
import random
from collections import Counter

import numpy as np

from kvtier.abc import StoreContext
from kvtier.keys import make_offload_key
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore

BLOCK = 4096
RECORD = 128
CAPACITY = 1 << 20


def payload_of(number, version):
    """4 KiB that no other number and version has."""
    return np.random.Generator(np.random.PCG64([number, version])).bytes(BLOCK)


class Driver:
    """Drives one directory. `counts` says what happened; `run` raises AssertionError at the first wrong byte."""

    def __init__(self, path, seed):
        self.path, self.chance = path, random.Random(seed)
        self.context = StoreContext(Namespace({"model": "random"}), BLOCK)
        self.keys = [make_offload_key(random.Random(number).randbytes(32), 0) for number in range(400)]
        self.number_of = {key: number for number, key in enumerate(self.keys)}
        self.versions = [0] * len(self.keys)
        self.slots = {}
        """What each slot should hold: (number, version)."""
        self.damaged = set()
        self.counts = Counter()
        self.capacity = CAPACITY
        self._pool = [memoryview(bytearray(BLOCK)) for _ in range(64)]
        self._open()

    def _open(self):
        self.store = SlabStore.open({"path": str(self.path), "capacity": self.capacity}, self.context)
        found = dict(pair for slots, keys in self.store.recover() for pair in zip(slots, keys, strict=True))
        assert len(set(found.values())) == len(found), "a key in two slots"
        for slot, key in found.items():
            number, _ = self.slots.get(slot, (None, None))
            assert number == self.number_of[key], "a slot is said to hold what was never stored there"
        lost = [slot for slot in self.slots if slot not in found and slot not in self.damaged]
        stale = [slot for slot in lost if self._is_newest(slot) and slot < self.store.num_slots]
        assert not stale, f"lost without a reason: {stale}"
        self.slots = {slot: self.slots[slot] for slot in found}
        self.damaged &= found.keys()
        names = (os.path.join(at, name) for at, _, names in os.walk(self.path) for name in names)
        used = sum(os.lstat(name).st_blocks * 512 for name in names)
        assert used <= self.capacity
        folder = self.path / self.context.namespace.fingerprint.hex()
        self.data, self.headers = folder / "data-00000", folder / "headers"

    def _is_newest(self, slot):
        number, version = self.slots[slot]
        return not any(other == number and at != slot and then > version for at, (other, then) in self.slots.items())

    def run(self, operations):
        """Do at least so many operations."""
        end = sum(self.counts.values()) + operations
        steps = [self.write, self.read, self.read, self.read_wrong, self.damage, self.evict]
        while sum(self.counts.values()) < end:
            self.chance.choice(steps)()
            if self.chance.random() < 0.004:
                self.reopen()
        self.reopen()
        self.read(list(self.slots))

    def _some_slots(self):
        first = self.chance.randrange(self.store.num_slots)
        count = min(self.chance.choice([1, 1, 2, 8, 40]), self.store.num_slots - first)
        if self.chance.random() < 0.5:
            return list(range(first, first + count))
        return self.chance.sample(range(self.store.num_slots), count)

    def write(self):
        slots = self._some_slots()
        numbers = self.chance.sample(range(len(self.keys)), len(slots))
        for number in numbers:
            self.versions[number] += 1
        payloads = [memoryview(payload_of(number, self.versions[number])) for number in numbers]
        results = self.store.write(slots, [self.keys[number] for number in numbers], payloads)
        assert all(results)
        for slot, number in zip(slots, numbers, strict=True):
            self.slots[slot] = (number, self.versions[number])
            self.damaged.discard(slot)
        self.counts["stored"] += len(slots)

    def read(self, slots=None):
        known = self.slots.keys()
        slots = [slot for slot in (self._some_slots() if slots is None else slots) if slot in known]
        for start in range(0, len(slots), len(self._pool)):
            part = slots[start : start + len(self._pool)]
            self._read(part, [self.slots[slot][0] for slot in part])

    def read_wrong(self):
        """Ask for what is not there: another block's key, an empty slot."""
        slots = self._some_slots()[: len(self._pool)]
        self._read(slots, self.chance.sample(range(len(self.keys)), len(slots)))

    def _read(self, slots, numbers):
        buffers = self._pool[: len(slots)]
        results = self.store.read_into(slots, [self.keys[number] for number in numbers], buffers)
        for slot, number, result, buffer in zip(slots, numbers, results, buffers, strict=True):
            held, version = self.slots.get(slot, (None, 0))
            if result:
                assert held == number, f"slot {slot} served block {number} instead of {held}"
                assert buffer == payload_of(number, version), f"slot {slot}: wrong bytes of block {number}"
                assert slot not in self.damaged, "damaged bytes were served"
                self.counts["loaded"] += 1
            else:
                assert held != number or slot in self.damaged, f"slot {slot} lost block {number}"
                self.slots.pop(slot, None)
                self.damaged.discard(slot)
                self.counts["missed"] += 1

    def evict(self):
        """Forget some blocks as a tier does: their slots are simply given to others, much later or never."""
        if len(self.slots) > self.store.num_slots // 2:
            slots = self.chance.sample(sorted(self.slots), 4)
            self.store.read_into(slots, [self.keys[0][:-1] + b"x"] * 4, self._pool[:4])
            for slot in slots:
                del self.slots[slot]
                self.damaged.discard(slot)
            self.counts["evicted"] += 4

    def damage(self):
        """Flip, zero, swap or overwrite on the medium itself, payload or record."""
        if not self.slots or self.chance.random() < 0.6:
            return
        slot, other = self.chance.choices(sorted(self.slots), k=2)
        path, size = self.chance.choice([(self.data, BLOCK), (self.headers, RECORD)])
        with open(path, "r+b") as file:
            before = os.pread(file.fileno(), size, slot * size)
            kind = self.chance.choice(["flip", "zero", "copy", "noise"])
            if kind == "flip":
                raw = bytearray(before)
                raw[self.chance.randrange(size)] ^= 1 << self.chance.randrange(8)
            else:
                theirs = os.pread(file.fileno(), size, other * size)
                raw = {"zero": bytes(size), "copy": theirs, "noise": self.chance.randbytes(size)}[kind]
            os.pwrite(file.fileno(), raw, slot * size)
        if bytes(raw) != before:
            self.damaged.add(slot)
            self.counts["damaged"] += 1

    def reopen(self):
        """End the store, in peace or as a killed process leaves it, sometimes with another capacity after it."""
        if self.chance.random() < 0.3:
            self.capacity = self.chance.choice([CAPACITY // 2, CAPACITY, CAPACITY + 300_000])
        self.store.close()
        self._open()
        self.counts["reopened"] += 1
