"""Replays give the rates and the misses that independent code gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eviction.textbook_filters import TextbookS3FIFO, TextbookTinyLFU
from eviction.textbook_prefix import TextbookPrefix

from kvtier.keys import make_offload_key
from kvtier.registry import POLICIES
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace, TraceRequest

FULL = Path(__file__).parents[3] / "shared" / "traces"
EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"
BLOCK_BYTES = 64 << 20
FAST = Machine(disk_read=1e15, disk_write=1e15, disk_latency=0.0)


@pytest.fixture(scope="module")
def extract():
    return trace_of([json.loads(line) for line in EXTRACT.read_text().splitlines()])


def trace_of(requests):
    made = [
        TraceRequest(float(n), [make_offload_key(i.to_bytes(8, "big"), 0) for i in ids], 512 * len(ids), 1)
        for n, ids in enumerate(requests)
    ]
    return Trace("extract", "test", 512, made)


def run(trace, dram, disk=0, policy="lru", machine=FAST, **setup):
    return Replay(trace, Setup(policy, dram, disk, BLOCK_BYTES, **setup), machine).run()


@pytest.mark.parametrize(("name", "percent"), [("conversation", 36.6), ("synthetic", 64.0)])
def test_one_tier_without_limit_reaches_what_the_trace_allows(name, percent):
    path = FULL / f"{name}_trace.jsonl"
    if not path.is_file():
        pytest.skip(f"FULL TRACE NOT FOUND: {path}; its ideal rate was not checked")
    trace = load_trace(path)
    result = run(trace, trace.num_unique)
    assert result.num_hits == trace.num_ideal_hits
    assert 100 * result.hit_rate == pytest.approx(percent, abs=0.05)


def test_two_tiers_without_limit_do_so_too(extract):
    result = run(extract, 2000, extract.num_unique)
    assert result.num_hits + sum(result.refused_blocks.values()) >= extract.num_ideal_hits
    assert result.hits["disk"] > 0


class PlainLRU:
    """Least recently used, a block at a time: a list, oldest first."""

    def __init__(self, capacity):
        self.capacity, self.order = capacity, {}

    def use(self, block):
        hit = block in self.order
        if hit:
            del self.order[block]
        elif len(self.order) == self.capacity:
            del self.order[next(iter(self.order))]
        self.order[block] = None
        return hit


class PlainARC:
    """Megiddo and Modha's figure 4, a block at a time, with plain lists."""

    def __init__(self, capacity):
        self.c, self.p = capacity, 0.0
        self.t1, self.t2, self.b1, self.b2 = {}, {}, {}, {}

    def use(self, x):
        for part in (self.t1, self.t2):
            if x in part:
                del part[x]
                self.t2[x] = None
                return True
        if x in self.b1:
            self.p = min(self.c, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.replace(x)
            del self.b1[x]
            self.t2[x] = None
        elif x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.replace(x)
            del self.b2[x]
            self.t2[x] = None
        else:
            self.make_room(x)
            self.t1[x] = None
        return False

    def make_room(self, x):
        total = sum(map(len, (self.t1, self.t2, self.b1, self.b2)))
        if len(self.t1) + len(self.b1) == self.c:
            if len(self.t1) < self.c:
                pop_first(self.b1)
                self.replace(x)
            else:
                pop_first(self.t1)
        elif total >= self.c:
            if total == 2 * self.c:
                pop_first(self.b2)
            self.replace(x)

    def replace(self, x):
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1[pop_first(self.t1)] = None
        else:
            self.b2[pop_first(self.t2)] = None


def pop_first(part):
    first = next(iter(part))
    del part[first]
    return first


@pytest.mark.parametrize(("policy", "plain"), [("lru", PlainLRU), ("arc", PlainARC)])
@pytest.mark.parametrize("capacity", [50, 400, 3000])
def test_misses_equal_the_textbook_block_by_block(extract, policy, plain, capacity):
    blocks = [key for request in extract.requests[:700] for key in request.keys]
    cache = plain(capacity)
    hits = sum(cache.use(block) for block in blocks)
    single = Trace("single", "test", 512, [TraceRequest(float(n), [block], 512, 1) for n, block in enumerate(blocks)])
    assert run(single, capacity, policy=policy).num_hits == hits


@pytest.mark.parametrize(
    ("policy", "textbook", "capacity", "length"),
    [
        ("s3fifo", TextbookS3FIFO, 50, 4_000),
        ("s3fifo", TextbookS3FIFO, 400, 5_000),
        ("tinylfu", TextbookTinyLFU, 50, 4_000),
        ("tinylfu", TextbookTinyLFU, 400, 5_000),
        ("prefix", TextbookPrefix, 30, 1_500),
    ],
)
def test_misses_of_the_newer_policies_equal_their_textbooks(extract, policy, textbook, capacity, length):
    blocks = [key for request in extract.requests for key in request.keys][:length]
    cache, hits = textbook(capacity), 0
    for block in blocks:
        hits += block in cache
        cache.request(block)
    assert hits > 50
    single = Trace("single", "test", 512, [TraceRequest(float(n), [block], 512, 1) for n, block in enumerate(blocks)])
    assert run(single, capacity, policy=policy).num_hits == hits


@pytest.mark.parametrize("capacity", [300, 1500, 6000])
def test_lru_equals_the_textbook_request_by_request(extract, capacity):
    """The head that is held is used; then what is missing is stored, tail first; what is held behind a gap stays."""
    cache, hits = PlainLRU(capacity), 0
    for request in extract.requests:
        found = next((n for n, key in enumerate(request.keys) if key not in cache.order), len(request.keys))
        hits += found
        for key in reversed(request.keys[:found]):
            cache.use(key)
        later = request.keys[found:]
        held = {key for key in later if key in cache.order}
        missing = [key for key in later if key not in held][: capacity - len(held)]
        room = capacity - len(cache.order)
        victims = [key for key in cache.order if key not in held][: max(0, len(missing) - room)]
        for key in victims:
            del cache.order[key]
        for key in reversed(missing):
            cache.order[key] = None
    assert run(extract, capacity).num_hits == hits


@pytest.mark.parametrize("policy", POLICIES.names())
def test_slots_that_no_block_can_use_change_nothing(extract, policy, monkeypatch):
    few = Trace("few", "test", 512, extract.requests[:150])
    sizes = [(few.num_kept + more, few.num_kept + 7 * more) for more in (1, 5000)] + [(300, 3 * few.num_kept)]
    limited = [run(few, *size, policy, Machine(disk_read=50e9)) for size in sizes]
    monkeypatch.setattr(Setup, "limited_to", lambda setup, _: setup)
    for size, result in zip(sizes, limited, strict=True):
        assert replace(run(few, *size, policy, Machine(disk_read=50e9)), replay_seconds=0.0) == replace(
            result, replay_seconds=0.0
        )
        assert (result.setup.dram_blocks, result.setup.disk_blocks) == size


GOLDEN = {
    ("lru", 300, 0): (1555, 0),
    ("lru", 1500, 0): (1718, 0),
    ("arc", 1500, 0): (2089, 0),
    ("lru", 300, 6000): (1555, 4237),
    ("arc", 1500, 6000): (2954, 3002),
    ("s3fifo", 1500, 0): (2330, 0),
    ("s3fifo", 1500, 6000): (2906, 2735),
    ("tinylfu", 1500, 0): (1933, 0),
    ("tinylfu", 1500, 6000): (2760, 2878),
    ("prefix", 1500, 0): (3026, 0),
    ("prefix", 1500, 6000): (2726, 3508),
}


@pytest.mark.parametrize(("policy", "dram", "disk"), GOLDEN)
def test_golden_hits(extract, policy, dram, disk):
    """Protects the replay, the manager and the policies together; a change here must be meant."""
    result = run(extract, dram, disk, policy, Machine(disk_read=50e9, disk_write=50e9))
    assert (result.hits["primary"], result.hits.get("disk", 0)) == GOLDEN[policy, dram, disk]


def test_every_registered_policy_replays(extract):
    few = Trace("few", "test", 512, extract.requests[:200])
    for policy in POLICIES.names():
        assert run(few, 200, 500, policy).num_hits > 0
