"""A slab beside a dict, through writes, damage, kills and reopening: it serves what was stored, or nothing."""

import shutil
import tempfile
from pathlib import Path

import slab_files
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.testing.stores import flip_bit, make_key, make_payload

BLOCK = 4096
SLOTS = 12
slots = st.integers(0, SLOTS - 1)
numbers = st.integers(0, 30)


class SlabMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-machine-"))
        self.context = slab_files.make_context(block_bytes=BLOCK)
        self.store = slab_files.open_slab(self.directory, self.context)
        self.contents = {}
        self.damaged = set()

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.directory)

    @rule(pairs=st.dictionaries(slots, numbers, max_size=SLOTS))
    def write(self, pairs):
        keys = [make_key(number) for number in pairs.values()]
        payloads = [memoryview(make_payload(number, BLOCK)) for number in pairs.values()]
        assert self.store.write(list(pairs), keys, payloads) == [True] * len(pairs)
        self.contents.update(pairs)
        self.damaged -= set(pairs)

    @rule(wanted=st.lists(slots, unique=True), other=st.booleans())
    def read(self, wanted, other):
        asked = [31 if other else self.contents.get(slot, 0) for slot in wanted]
        buffers = [memoryview(bytearray(BLOCK)) for _ in wanted]
        results = self.store.read_into(wanted, [make_key(number) for number in asked], buffers)
        for slot, number, result, buffer in zip(wanted, asked, results, buffers, strict=True):
            held = self.contents.get(slot) == number and slot not in self.damaged
            assert result == held
            assert not result or bytes(buffer) == make_payload(number, BLOCK)
            if not result:
                self.contents.pop(slot, None)
                self.damaged.discard(slot)

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def damage(self, data):
        slot = data.draw(st.sampled_from(sorted(self.contents)))
        if slot in self.damaged:
            return
        if data.draw(st.booleans()):
            path, offset, length = slab_files.segment_file(self.directory, self.context), slot * BLOCK, BLOCK
        else:
            path, offset, length = slab_files.headers_file(self.directory, self.context), slot * 128, 128
        bit = data.draw(st.integers(0, length * 8 - 1))
        slab_files.write_at(path, offset, flip_bit(slab_files.read_at(path, offset, length), bit))
        self.damaged.add(slot)

    @rule()
    def reopen(self):
        self.store.close()
        self.context.failures.take()
        self.store = slab_files.open_slab(self.directory, self.context)
        held = slab_files.recovered(self.store)
        assert all(held[slot] == make_key(self.contents[slot]) for slot in held)
        sound = {number for slot, number in self.contents.items() if slot not in self.damaged}
        found = {self.contents[slot] for slot in held}
        damaged = {self.contents[slot] for slot in self.damaged}
        assert sound - damaged <= found, "a block was lost that nothing happened to"
        self.contents = {slot: self.contents[slot] for slot in held}
        self.damaged &= set(held)

    @invariant()
    def keeps_to_its_capacity(self):
        assert slab_files.real_bytes(self.directory) <= 1 << 20


TestSlabMachine = SlabMachine.TestCase
TestSlabMachine.settings = settings(max_examples=60, stateful_step_count=30)
