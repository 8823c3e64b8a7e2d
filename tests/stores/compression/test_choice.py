"""When blocks are compressed that are compressed only if that is faster."""

import contextlib
import threading

import pytest

from kvtier.stores.compression.choice import Always, Measured
from kvtier.testing.clock import ManualClock
from kvtier.testing.patience import PATIENCE_SECONDS

BLOCK = 64 << 10
FEW, MANY = 1, 7
"""Calls at once."""
FEWEST_CALLS, FEWEST_TRIALS = 16, 3
"""That must have ended before anything is decided."""


class Processor:
    """A codec by the clock: seconds per byte of a block."""

    def __init__(self, clock, compression=1e-9, expansion=0.5e-9, share=0.3):
        self.clock, self.compression, self.expansion, self.share = clock, compression, expansion, share

    def compress(self, payload, target):
        self.clock.advance(payload.nbytes * self.compression)
        return int(payload.nbytes * (1 - self.share)) if self.share else 0

    def try_expand(self, stored):
        self.clock.advance(BLOCK * self.expansion)


class Engine:
    """Stores and loads blocks over a medium by the clock."""

    def __init__(self, num_processors=8, **processor):
        self.clock = ManualClock()
        self.choice = Measured(num_processors, self.clock)
        self.processor = Processor(self.clock, **processor)
        self.payload, self.room = (memoryview(bytearray(BLOCK)) for _ in range(2))

    def shrink(self, count=1):
        """Return how many of so many blocks are compressed."""
        return sum(self.choice.shrink(self.processor, self.payload, self.room).nbytes < BLOCK for _ in range(count))

    def store(self, seconds_per_byte, calls=MANY, rounds=20, blocks=1):
        """Store with so many calls at once, again and again; return how many blocks were compressed."""
        compressed = 0
        for _ in range(rounds):
            with contextlib.ExitStack() as stores, contextlib.ExitStack() as writes:
                shrunk, moves = [], []
                for _ in range(calls):
                    stores.enter_context(self.choice.storing())
                    shrunk.append([self.choice.shrink(self.processor, self.payload, self.room) for _ in range(blocks)])
                for payloads in shrunk:
                    moves.append(writes.enter_context(self.choice.writing()))
                    moves[-1].num_bytes = sum(payload.nbytes for payload in payloads)
                # they end together, as they do where they share a medium
                self.clock.advance(sum(move.num_bytes for move in moves) * seconds_per_byte)
            compressed += sum(payload.nbytes < BLOCK for payloads in shrunk for payload in payloads)
        return compressed

    def load(self, seconds_per_byte, count=40):
        for _ in range(count):
            with self.choice.loading(), self.choice.reading() as moved:
                self.clock.advance(BLOCK * seconds_per_byte)
                moved.num_bytes = BLOCK


@pytest.fixture
def engine():
    return Engine()


def test_all_blocks_if_told_so(engine):
    payload, room = (memoryview(bytearray(BLOCK)) for _ in range(2))
    choice = Always()
    assert all(choice.shrink(engine.processor, payload, room).nbytes < BLOCK for _ in range(10))


def test_blocks_of_a_slow_medium_after_few_of_them(engine):
    blocks = 10 * MANY
    plain = blocks - engine.store(20e-9, rounds=10)
    assert plain <= FEWEST_CALLS + MANY
    assert engine.choice.compresses


def test_a_fast_medium_stays_as_it_is_and_trials_cost_one_part_in_a_hundred(engine):
    assert engine.store(1e-9, rounds=3) == FEWEST_TRIALS
    started, busy = engine.clock(), 0.0
    for _ in range(40):
        engine.store(1e-9, rounds=20)
        busy += 20 * MANY * BLOCK * 1e-9
    assert not engine.choice.compresses
    assert 0 < engine.clock() - started - busy < 0.011 * busy


def test_calls_at_once_compress_beside_each_other_and_single_ones_do_not():
    medium = 2e-9  # to compress takes half as long as to write, and saves a third of it
    for calls, compresses in ((MANY, True), (FEW, False)):
        engine = Engine(compression=1e-9, share=0.3)
        engine.store(medium, calls, rounds=40)
        assert engine.choice.compresses is compresses


def test_several_calls_do_not_make_a_fast_medium_slow(engine):
    engine.store(0.9e-9, calls=32, rounds=40)
    assert not engine.choice.compresses, "each call waited 32 times as long as it would have alone"


def test_no_load_becomes_slower(engine):
    engine.load(1e-9)
    engine.store(20e-9)
    assert not engine.choice.compresses, "it is slow to write, and fast to read"
    engine.load(20e-9)
    engine.store(20e-9)
    assert engine.choice.compresses


def test_loads_at_once_expand_beside_each_other():
    reads = 1.2e-9  # to expand takes half as long, and saves a third of it
    for calls, compresses in ((MANY, True), (FEW, False)):
        engine = Engine(expansion=0.6e-9)
        with contextlib.ExitStack() as others:
            for _ in range(calls - 1):
                others.enter_context(engine.choice.loading())
            engine.load(reads)
        engine.store(20e-9)
        assert engine.choice.compresses is compresses


def test_what_loads_take_counts_once_there_are_some(engine):
    engine.store(20e-9)
    assert engine.choice.compresses
    for _ in range(40):
        with engine.choice.expanding() as moved:
            engine.clock.advance(BLOCK * 50e-9)
            moved.num_bytes = BLOCK
    engine.store(20e-9, rounds=1)
    assert not engine.choice.compresses


def test_a_medium_that_has_become_faster_or_slower_is_noticed(engine):
    engine.store(20e-9)
    assert engine.choice.compresses
    engine.store(0.5e-9, rounds=400)
    assert not engine.choice.compresses
    engine.store(20e-9)
    assert engine.choice.compresses


def test_a_medium_that_seems_slow_beside_busy_processors_is_looked_at_without_them(engine):
    engine.store(20e-9)
    for _ in range(1000):
        # as busy processors make it seem, and as it is
        engine.store(20e-9 if engine.choice.compresses else 0.5e-9, rounds=1)
    assert not engine.choice.compresses


@pytest.mark.parametrize("blocks", [1, 16])
def test_a_look_leaves_one_block_in_a_hundred_plain_however_many_a_call_has(engine, blocks):
    engine.store(20e-9, blocks=blocks)
    plain, total = 0, 0
    while total < 6000 * blocks:
        plain += 10 * MANY * blocks - engine.store(20e-9, rounds=10, blocks=blocks)
        total += 10 * MANY * blocks
    assert 0 < plain < 0.01 * total


def test_noise_costs_only_trials():
    engine = Engine(share=0.0)
    assert engine.store(20e-9) == 0
    assert not engine.choice.compresses


def test_a_failed_call_teaches_nothing(engine):
    def fail():
        with engine.choice.writing():
            engine.clock.advance(60)
            raise OSError

    for _ in range(2 * FEWEST_CALLS):
        engine.shrink()
        with pytest.raises(OSError):
            fail()
    engine.store(1e-9)
    assert not engine.choice.compresses


def test_beside_loads_half_of_the_processors_compress():
    engine = Engine(num_processors=2)
    engine.store(20e-9)
    began, go_on = threading.Event(), threading.Event()

    class Held(Processor):
        def compress(self, payload, target):
            began.set()
            assert go_on.wait(PATIENCE_SECONDS)
            return super().compress(payload, target)

    done = []
    held, room = Held(engine.clock), memoryview(bytearray(BLOCK))
    with engine.choice.loading():
        first = threading.Thread(target=lambda: done.append(engine.choice.shrink(held, engine.payload, room)))
        first.start()
        assert began.wait(PATIENCE_SECONDS)
        assert engine.shrink(5) == 0
        go_on.set()
        first.join()
        assert done[0].nbytes < BLOCK
        assert engine.shrink(5) == 5
    alone = Engine(num_processors=1)
    alone.store(20e-9)
    with alone.choice.loading():
        assert alone.shrink(5) == 0
    assert alone.shrink(5) == 5
