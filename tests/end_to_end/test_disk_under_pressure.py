"""Many requests for the same cold blocks, and more first-seen prefixes than host memory holds, over a real disk."""

from pathlib import Path

import pytest
from whole_engine import BLOCK_BYTES, WholeEngine, make_keys, payload

from kvtier.events import JobFinished
from kvtier.testing.patience import wait_for
from kvtier.types import LookupResult

NUM_READERS, NUM_COLD = 50, 12
NUM_PREFIXES, PREFIX_BLOCKS, STEP_BLOCKS = 5, 24, 4


class Recorder:
    def __init__(self):
        self.reads = []

    def on_event(self, event):
        if isinstance(event, JobFinished) and event.is_promotion:
            self.reads.append(event)


@pytest.fixture
def engine(tmp_path):
    engine = WholeEngine(Path(tmp_path) / "disk", num_blocks=32, load_deadline=30.0).start()
    yield engine
    engine.close()


def push_out(engine, number):
    """Fill host memory with blocks that nobody asks for."""
    for part in range(8):
        engine.store(make_keys(8, f"filler {number}/{part}"))
        engine.idle()


def test_many_readers_of_one_cold_prefix_read_it_once(engine):
    keys = make_keys(NUM_COLD, "cold")
    engine.store(keys)
    engine.idle()
    push_out(engine, 0)
    recorder = Recorder()
    engine.spec.observers.add(recorder)
    contexts = [engine.request() for _ in range(NUM_READERS)]
    waiting = list(contexts)

    def all_served():
        for context in list(waiting):
            answers = [engine.manager.lookup(key, context) for key in keys]
            if answers == [LookupResult.HIT] * NUM_COLD:
                waiting.remove(context)
        engine.step()
        return not waiting

    wait_for(all_served, "every request finds all blocks")
    for context in contexts:
        spec = engine.manager.prepare_load(keys, context)
        for key, slot in zip(keys, spec.block_ids.tolist(), strict=True):
            assert bytes(engine.arena.row(slot)) == payload(key)
        engine.manager.complete_load(set(keys), context)
        engine.manager.on_request_finished(context)
    engine.step()
    assert sum(event.num_blocks for event in recorder.reads) == NUM_COLD
    assert sum(event.num_bytes for event in recorder.reads) == NUM_COLD * BLOCK_BYTES
    engine.manager.check_invariants()


def test_first_seen_prefixes_reach_the_disk_though_each_pushes_out_the_last(engine):
    prefixes = [make_keys(PREFIX_BLOCKS, f"prefix {number}") for number in range(NUM_PREFIXES)]

    def keeps_up():
        engine.step()
        return engine.manager.get_stats()["disk.store_blocks_in_flight"] <= 2 * STEP_BLOCKS

    for keys in prefixes:
        for start in range(0, PREFIX_BLOCKS, STEP_BLOCKS):  # an engine stores a few blocks a step
            part = keys[start : start + STEP_BLOCKS]
            assert len(engine.store(part)) == len(part)
            wait_for(keeps_up, "computing a step takes longer than writing its blocks")
    engine.idle()
    found = []
    for number, keys in enumerate(prefixes):
        push_out(engine, number)
        found.append(engine.restore(keys))
    assert found == [PREFIX_BLOCKS] * NUM_PREFIXES
