"""When blocks are compressed that are compressed only if that is faster."""

import random
import threading

import pytest
from compressed_blocks import bfloat16

from kvtier.stores.compression.choice import Always, Measured
from kvtier.stores.compression.codec import BlockCodec
from kvtier.testing.patience import PATIENCE_SECONDS

BLOCK = 64 << 10
SLOW, FAST = 1e-5, 1e-12
"""Seconds per byte of a medium that is slower, or faster, than any processor."""


@pytest.fixture
def codec():
    return BlockCodec(BLOCK, 2)


def shorter(choice, codec, count=1, payload=None):
    """Let blocks be stored; return how many were compressed."""
    payload = memoryview(bfloat16(1, BLOCK) if payload is None else payload)
    room = memoryview(bytearray(codec.most_bytes))
    return sum(choice.shrink(codec, payload, room).nbytes < BLOCK for _ in range(count))


def wrote(choice, seconds_per_byte, calls=200):
    for _ in range(calls):
        choice.wrote(BLOCK, BLOCK * seconds_per_byte)


def read(choice, seconds_per_byte, calls=200):
    for _ in range(calls):
        choice.read(BLOCK, BLOCK * seconds_per_byte)


def test_all_blocks_or_those_of_a_slow_medium(codec):
    assert shorter(Always(), codec, 10) == 10
    choice = Measured()
    assert shorter(choice, codec, 64) == 1, "one to learn"
    wrote(choice, SLOW)
    assert shorter(choice, codec, 64) == 64
    assert choice.compresses
    wrote(choice, FAST)
    assert shorter(choice, codec, 128) == 2
    assert not choice.compresses


def test_a_fast_medium_stays_as_it_is(codec):
    choice = Measured()
    wrote(choice, FAST)
    assert shorter(choice, codec, 640) == 10


def test_no_load_becomes_slower(codec):
    choice = Measured()
    wrote(choice, SLOW)
    read(choice, FAST)
    assert shorter(choice, codec, 128) == 2, "it is slow to write, and fast to read"
    read(choice, SLOW)
    assert shorter(choice, codec, 64) == 64


def test_noise_costs_only_trials(codec):
    choice = Measured()
    wrote(choice, SLOW)
    noise = random.Random(1).randbytes(BLOCK)
    assert shorter(choice, codec, 128, noise) == 0
    assert not choice.compresses


def test_beside_loads_half_of_the_processors_compress(codec):
    choice = Measured(num_processors=2)
    shorter(choice, codec)
    wrote(choice, SLOW)
    began, go_on = threading.Event(), threading.Event()

    class Held(BlockCodec):
        def compress(self, payload, target):
            began.set()
            assert go_on.wait(PATIENCE_SECONDS)
            return super().compress(payload, target)

    done = []
    with choice.loading():
        first = threading.Thread(target=lambda: done.append(shorter(choice, Held(BLOCK, 2))))
        first.start()
        assert began.wait(PATIENCE_SECONDS)
        assert shorter(choice, codec, 5) == 0
        go_on.set()
        first.join()
        assert done == [1]
        assert shorter(choice, codec, 5) == 5
    alone = Measured(num_processors=1)
    shorter(alone, codec)
    wrote(alone, SLOW)
    with alone.loading():
        assert shorter(alone, codec, 5) == 0
    assert shorter(alone, codec, 5) == 5
