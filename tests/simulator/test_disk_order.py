"""The disk below host memory keeps chains whole: block for block what an independent replay of both tiers keeps."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.tiering.settings import TieringSettings

DATA = Path(__file__).parents[1] / "data"
AT_ONCE = Machine(prefill_rate=1e15, disk_read=1e18, disk_write=1e18, disk_latency=0)


class LRU:
    """Keys from the one used longest ago; a request's own keys give way to none of its others."""

    def __init__(self, capacity):
        self.capacity, self.held = capacity, OrderedDict()

    def use(self, keys):
        """Use those that are held, the head last."""
        for key in reversed(keys):
            if key in self.held:
                self.held.move_to_end(key)

    def bring(self, keys, own):
        """Hold as many of `keys` as possible, the head last; return those held now."""
        new = [key for key in keys if key not in self.held]
        victims = [key for key in self.held if key not in own][: max(0, len(self.held) + len(new) - self.capacity)]
        for key in victims:
            del self.held[key]
        new = new[: self.capacity - len(self.held)]
        self.held.update(dict.fromkeys(reversed(new)))
        return new


def replay(requests, memory_blocks, disk_blocks):
    """Yield what each request loads: blocks that were in memory, and blocks that were on the disk only."""
    memory, disk = LRU(memory_blocks), LRU(disk_blocks)
    for keys in requests:
        own = set(keys)
        found = [key for key in keys if key in memory.held or key in disk.held]
        found = keys[
            : next((i for i, (key, one) in enumerate(zip(found, keys, strict=False)) if key != one), len(found))
        ]
        promoted = memory.bring([key for key in found if key not in memory.held], set(found))
        memory.use(found)
        disk.use(found)
        rest = keys[len(found) :]
        memory.use(rest)
        disk.use([key for key in rest if key in memory.held])
        stored = memory.bring(rest, own)
        disk.use(stored)
        disk.bring(stored, own)
        memory.use(keys)
        disk.use(keys)
        yield len(found) - len(promoted), len(promoted)


@pytest.mark.parametrize("name", ["agent_prompts.jsonl", "coding_agents.jsonl"])
@pytest.mark.parametrize("disk_share", [0.6, 1.5, 4.0])
def test_both_tiers_hit_what_an_independent_replay_hits(name, disk_share):
    trace = load_trace(DATA / name, {"agent_prompts.jsonl": 64, "coding_agents.jsonl": 1024}[name])
    one_by_one = [request._replace(time=1000.0 * number) for number, request in enumerate(trace.requests)]
    trace = replace(trace, requests=one_by_one)
    memory_blocks = 1 + max(len(request.keys) for request in trace.requests)
    disk_blocks = int(memory_blocks * disk_share)
    setup = Setup("lru", memory_blocks, disk_blocks, 64, settings=TieringSettings(promotion_budget=1.0), predicts=False)
    run = Replay(trace, setup, AT_ONCE)
    run.run()
    hits = [(o.by_source.get("primary", 0), o.by_source.get("disk", 0)) for o in run.outcomes]
    assert hits == list(replay([request.keys for request in trace.requests], memory_blocks, disk_blocks))
    if disk_share > 1:
        assert sum(disk for _, disk in hits) > 0
