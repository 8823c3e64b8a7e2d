"""What a plan decides on a known trace, and that its prices are the only reason."""

import json
from pathlib import Path

import pytest

from kvtier.keys import make_offload_key
from kvtier.simulator.planner import Prices, Target, candidates, cheapest, edge_note, frontier, price_all
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine
from kvtier.simulator.trace import Trace, TraceRequest
from kvtier.types import Admission

EXTRACT = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"
MACHINE = Machine(prefill_rate=40_000.0)


@pytest.fixture(scope="module")
def trace():
    lines = [json.loads(line) for line in EXTRACT.read_text().splitlines()[:600]]
    requests = [
        TraceRequest(0.3 * n, [make_offload_key(i.to_bytes(8, "big"), 0) for i in ids], 512 * len(ids), 1)
        for n, ids in enumerate(lines)
    ]
    return Trace("extract", "test", 512, requests)


@pytest.fixture(scope="module")
def results(trace):
    setups = candidates([500, 2000, 8000], [0, 10_000], ["lru", "arc"], 64 << 20, Admission.ALWAYS)
    return [Replay(trace, setup, MACHINE).run() for setup in setups]


GOLDEN = {
    "memory is cheap": (Prices(12.0, 4.0, 0.1), Target(), ("lru", 8000, 10000, 2674, 8681.24)),
    "memory is dear": (Prices(12.0, 400.0, 0.1), Target(), ("lru", 500, 10000, 1358, 9794.05)),
    "memory is gold": (Prices(12.0, 40_000.0, 0.1), Target(), ("none", 0, 0, 0, 10292.44)),
    "a target above all": (Prices(12.0, 4.0, 0.1), Target(hit_rate=0.5), None),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_choices(results, case):
    """Protects replay, prices and choice together; a change here must be meant."""
    prices, target, expected = GOLDEN[case]
    chosen = cheapest(price_all(results, MACHINE, prices), target)
    found = None
    if chosen is not None:
        setup = chosen.result.setup
        found = (setup.policy, setup.dram_blocks, setup.disk_blocks, chosen.result.num_hits, round(chosen.total, 2))
    assert found == expected


def test_an_offer_on_the_frontier_is_beaten_by_none(results):
    offers = price_all(results, MACHINE, Prices(12.0, 4.0, 0.1))
    best = frontier(offers, lambda result: result.hit_rate)
    assert best[0] is offers[0], "to buy nothing costs the least"
    for offer in offers:
        assert any(one.hardware <= offer.hardware and one.result.hit_rate >= offer.result.hit_rate for one in best)


def test_nothing_more_to_try_says_nothing(trace, results):
    offers = price_all(results, MACHINE, Prices(12.0, 0.0, 0.0))
    assert edge_note(offers, offers[0], trace) == ""
    assert "smallest memory that" in edge_note(offers, offers[1], trace)
