"""Killed at any moment: what a slab recovers reads back exactly, or is a miss."""

import random
import subprocess
import sys
from pathlib import Path

import slab_files

BLOCK = 128 << 10
SLOTS = 24
ROUNDS = 12

WRITER = """
import random, sys, threading
sys.path.insert(0, sys.argv[2])
import slab_files
from test_slab_kill import BLOCK, SLOTS, open_store, payload_of
from kvtier.testing.stores import make_key

store = open_store(sys.argv[1], slab_files.make_context(block_bytes=BLOCK))
list(store.recover())

def write(half):
    chance = random.Random()
    while True:
        first = half + chance.randrange(SLOTS // 2 - 4)
        slots = list(range(first, first + 1 + chance.randrange(4)))
        keys = [make_key(chance.randrange(200)) for _ in slots]
        store.write(slots, keys, [memoryview(payload_of(key)) for key in keys])

threading.Thread(target=write, args=(0,), daemon=True).start()
print("writing", flush=True)
write(SLOTS // 2)
"""


def payload_of(key):
    return random.Random(key).randbytes(BLOCK)


def open_store(directory, context):
    return slab_files.open_slab(directory, context, capacity=8 << 20)


def write_until_killed(directory, seconds):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout.readline() == "writing\n"
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.kill()


def test_killed_while_writing(tmp_path):
    chance = random.Random(9)
    most = 0
    for _ in range(ROUNDS):
        write_until_killed(tmp_path / "slab", chance.uniform(0.0, 0.1))
        context = slab_files.make_context(block_bytes=BLOCK)
        store = open_store(tmp_path / "slab", context)
        held = slab_files.recovered(store)
        assert len(set(held.values())) == len(held)
        buffers = [memoryview(bytearray(BLOCK)) for _ in held]
        results = store.read_into(list(held), list(held.values()), buffers)
        for key, result, buffer in zip(held.values(), results, buffers, strict=True):
            assert not result or bytes(buffer) == payload_of(key)
        most = max(most, sum(results))
        lost = sum(not result for result in results)
        assert lost <= 2 * 4, "only blocks in flight may be torn"
        assert sum(context.failures.take().values()) >= lost
        assert slab_files.real_bytes(tmp_path / "slab") <= 8 << 20
        store.close()
    assert most > SLOTS // 2
