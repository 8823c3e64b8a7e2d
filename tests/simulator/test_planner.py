"""What a plan decides on a known trace, and that its prices are the only reason."""

import json
from pathlib import Path

import pytest

from kvtier.keys import make_offload_key
from kvtier.simulator.planner import cheapest, edge_note, frontier, wear_note
from kvtier.simulator.prices import Offer, Prices, Target, price, price_all
from kvtier.simulator.rates import DAY
from kvtier.simulator.replay import Replay
from kvtier.simulator.results import Result
from kvtier.simulator.setup import Machine, Setup, combinations
from kvtier.simulator.trace import Trace, TraceRequest

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
    setups = combinations(Setup("lru", 1, 0, 64 << 20), [500, 2000, 8000], [0, 10_000], ["lru", "arc"])
    return [Replay(trace, setup, MACHINE).run() for setup in setups]


STURDY = 1e6
"""Whole writes a day that no trace reaches."""
GOLDEN = {
    "memory is cheap": (Prices(12.0, 4.0, 0.1, drive_writes=STURDY), Target(), ("lru", 8000, 10000, 2783, 8613.22)),
    "disks wear out": (Prices(12.0, 4.0, 0.1), Target(), ("lru", 8000, 0, 2612, 8718.19)),
    "memory is dear": (Prices(12.0, 400.0, 0.1, drive_writes=STURDY), Target(), ("arc", 500, 10000, 1940, 9430.89)),
    "memory is gold": (Prices(12.0, 40_000.0, 0.1), Target(), ("none", 0, 0, 0, 10292.44)),
    "a target above all": (Prices(12.0, 4.0, 0.1), Target(hit_rate=0.5), None),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_choices(results, case):
    """Protects replay, prices and choice together; a change here must be meant."""
    prices, target, expected = GOLDEN[case]
    chosen = cheapest(price_all(results, prices), target)
    found = None
    if chosen is not None:
        setup = chosen.result.setup
        found = (setup.policy, setup.dram_blocks, setup.disk_blocks, chosen.result.num_hits, round(chosen.total, 2))
    assert found == expected


def test_an_offer_on_the_frontier_is_beaten_by_none(results):
    offers = price_all(results, Prices(12.0, 4.0, 0.1))
    best = frontier(offers, lambda result: result.hit_rate)
    assert best[0] is offers[0], "to buy nothing costs the least"
    for offer in offers:
        assert any(one.hardware <= offer.hardware and one.result.hit_rate >= offer.result.hit_rate for one in best)


def test_nothing_more_to_try_says_nothing(trace, results):
    offers = price_all(results, Prices(12.0, 0.0, 0.0))
    assert edge_note(offers, offers[0], trace) == ""
    assert "smallest memory that" in edge_note(offers, offers[1], trace)


def offer(hits, gpu, dram=0.0, disk=0.0, writes=0.0):
    """Return an offer with these costs, of a configuration that finds so many of 10,000 blocks."""
    setup = Setup("lru", int(dram), int(disk), 1 << 20)
    result = Result(
        setup=setup,
        num_requests=1,
        num_accesses=10_000,
        hits={"primary": hits},
        input_tokens=1,
        saved_tokens=0,
        first_token=[0.0] * 101,
        recompute=[0.0] * 101,
        loaded_bytes=0,
        stored_bytes=0,
        promoted_bytes=0,
        cascaded_bytes=0,
        computing=gpu,
        recomputing=1.0,
        busiest_computing=gpu,
        busiest_recomputing=1.0,
        busiest_written=writes * setup.disk_bytes / DAY,
        refused_blocks={},
        gave_up={},
        evicted_blocks={},
        timeline=[],
        seconds=DAY,
        replay_seconds=0.0,
    )
    return Offer(result, dram, disk, 1.0, gpu, gpu)


def test_nothing_is_bought_for_a_tenth_of_a_point():
    small, large = offer(3491, 1000.0, dram=10), offer(3500, 998.0, dram=10, disk=1)
    assert large.total < small.total
    assert cheapest([offer(0, 5000.0), small, large], Target()) is small
    assert cheapest([offer(0, 5000.0), small, large], Target(hit_rate=0.35)) is large, "the target asks for it"
    much = offer(3600, 900.0, dram=10, disk=1)
    assert cheapest([small, large, much], Target()) is much


def test_a_tenth_of_a_point_is_bought_where_few_misses_make_it_worth_much():
    """From 1.09% of misses to 1.00%, the accelerators have 9% less to compute."""
    small, large = offer(9891, 1090.0, dram=90), offer(9900, 1000.0, dram=100)
    assert cheapest([offer(0, 5000.0), small, large], Target()) is large
    alike = offer(9895, 1015.0, dram=95)
    assert cheapest([small, alike, large], Target()) is alike, "within 1% of the least cost less hardware is preferred"


def test_a_disk_that_is_written_more_than_it_is_made_for_costs_as_much_more():
    result = offer(1, 1.0, dram=1 << 10, disk=1 << 20, writes=6.0).result
    assert price(result, Prices(1.0, 1.0, 1.0, drive_writes=6.0)).wear == 1.0
    worn, lasting = (price(result, Prices(1.0, 1.0, 1.0, drive_writes=rated)) for rated in (2.0, 60.0))
    assert worn.wear == 3.0
    assert worn.disk == pytest.approx(3 * lasting.disk)
    assert "written 6.0 times a day: one made for 2 a day lasts 12.0 months instead of 36" in wear_note(
        worn, Prices(1.0, 1.0, 1.0, drive_writes=2.0)
    )
    assert wear_note(lasting, Prices(1.0, 1.0, 1.0, drive_writes=60.0)) == ""
