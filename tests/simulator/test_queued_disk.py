"""A simulated disk with more to write than it can: it is slow, and it works."""

import hashlib

from kvtier.events import JobFinished, TierStateChanged
from kvtier.keys import make_offload_key
from kvtier.simulator.setup import Machine, Setup, SimulatedEngine
from kvtier.types import ReqContext, ScheduleEndContext


class Recorder:
    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)


def test_a_queue_of_minutes_is_not_called_down():
    recorder = Recorder()
    setup = Setup("lru", dram_blocks=512, disk_blocks=4096, block_bytes=1 << 20)
    engine = SimulatedEngine(setup, Machine(disk_write=1 << 20), 16, recorder)
    for number in range(20):
        keys = [make_offload_key(hashlib.sha256(f"{number}/{index}".encode()).digest(), 0) for index in range(8)]
        request = ReqContext(f"request {number}")
        engine.manager.on_new_request(request)
        engine.manager.prepare_store(keys, request)
        engine.manager.complete_store(keys, request)
        engine.manager.on_request_finished(request)
    for second in range(200):
        engine.clock.advance_to(second)
        engine.manager.on_schedule_end(ScheduleEndContext())
    finished = [event for event in recorder.events if isinstance(event, JobFinished)]
    assert max(event.seconds for event in finished) > 100
    assert not [event for event in recorder.events if isinstance(event, TierStateChanged)]


def test_stores_that_end_in_one_step_are_one_write():
    """As the real disk tier has it; up to 64 MiB, which a tier gets before the step ends."""
    setup = Setup("lru", dram_blocks=512, disk_blocks=4096, block_bytes=1 << 20)
    engine = SimulatedEngine(setup, Machine(), 16)
    engine.manager.on_schedule_end(ScheduleEndContext())
    for number, num_blocks in enumerate((5, 5, 64)):
        keys = [
            make_offload_key(hashlib.sha256(f"{number}/{index}".encode()).digest(), 0) for index in range(num_blocks)
        ]
        request = ReqContext(f"request {number}")
        engine.manager.on_new_request(request)
        engine.manager.prepare_store(keys, request)
        engine.manager.complete_store(keys, request)
        if number == 1:
            assert not engine.tiers[0].written
            engine.manager.on_schedule_end(ScheduleEndContext())
            assert [size for _, size in engine.tiers[0].written] == [10 << 20]
    assert [size for _, size in engine.tiers[0].written] == [10 << 20, 64 << 20]
