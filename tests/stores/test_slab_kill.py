"""Killed at any moment: what a slab recovers reads back exactly, or is a miss."""

import functools
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import slab_files

BLOCK = 128 << 10
SLOTS = 24
ROUNDS = 60

WRITER = """
import os, random, sys, threading
sys.path.insert(0, sys.argv[2])
import slab_files
from test_slab_kill import BLOCK, SLOTS, open_store, payload_of
from kvtier.testing.stores import make_key

payloads = {number: memoryview(payload_of(make_key(number))) for number in range(200)}
keys = {number: make_key(number) for number in range(200)}

def live():
    store = open_store(sys.argv[1], slab_files.make_context(block_bytes=BLOCK))
    list(store.recover())

    def write(half):
        chance = random.Random()
        while True:
            first = half + chance.randrange(SLOTS // 2 - 4)
            slots = list(range(first, first + 1 + chance.randrange(4)))
            numbers = [chance.randrange(200) for _ in slots]
            store.write(slots, [keys[number] for number in numbers], [payloads[number] for number in numbers])

    threading.Thread(target=write, args=(0,), daemon=True).start()
    print(os.getpid(), flush=True)
    write(SLOTS // 2)

for _ in sys.stdin:  # every life is a copy of this warm process
    child = os.fork()
    if child == 0:
        live()
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@functools.cache
def payload_of(key):
    return random.Random(key).randbytes(BLOCK)


def open_store(directory, context):
    return slab_files.open_slab(directory, context, capacity=8 << 20)


def write_until_killed(writer, seconds):
    """Let a new process write for a while, and kill it."""
    writer.stdin.write("live\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline())
    threading.Event().wait(seconds)
    os.kill(pid, signal.SIGKILL)
    assert writer.stdout.readline() == "gone\n"


@pytest.fixture
def writer(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "slab"), str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        yield process
        process.stdin.close()


def test_killed_while_writing(tmp_path, writer):
    chance = random.Random(9)
    most = 0
    for _ in range(ROUNDS):
        write_until_killed(writer, chance.uniform(0.0, 0.05))
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
