"""Rates by the busiest hour, beside the mean."""

import pytest

from kvtier.keys import make_offload_key
from kvtier.simulator.rates import HOUR, busiest_hour
from kvtier.simulator.replay import Replay
from kvtier.simulator.report import uneven_note
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace, TraceRequest


def test_the_hour_may_begin_at_any_time():
    amounts = [(0.0, 1.0), (3000.0, 10.0), (6000.0, 10.0), (20_000.0, 5.0)]
    assert busiest_hour(amounts, 20_000.0) == 20.0 / HOUR


def test_of_a_short_trace_it_is_all_of_it():
    assert busiest_hour([(0.0, 1.0), (99.0, 3.0)], 100.0) == 0.04
    assert busiest_hour([], 100.0) == 0.0


def keys(first, count):
    return [make_offload_key(n.to_bytes(8, "big"), 0) for n in range(first, first + count)]


def trace(hours):
    """A request of 8 new blocks every 36 seconds for an hour, and one more when so many hours have passed."""
    requests = [TraceRequest(36.0 * n, keys(8 * n, 8), 8 * 512, 1) for n in range(100)]
    requests.append(TraceRequest(hours * HOUR, keys(800, 8), 8 * 512, 1))
    return Trace("one hour", "test", 512, requests)


@pytest.fixture(scope="module")
def result():
    return Replay(trace(50), Setup("lru", 400, 200, 64 << 20), Machine()).run()


def test_quiet_hours_do_not_hide_wear_and_accelerators(result):
    assert result.computing == pytest.approx(101 * 8 * 512 / 10_000 / (50 * HOUR))
    assert result.busiest_computing == pytest.approx(100 * 8 * 512 / 10_000 / HOUR)
    assert result.drive_writes_a_day == pytest.approx(808 / 200 * 24 / 50)
    assert result.busiest_drive_writes_a_day == pytest.approx(800 / 200 * 24)
    nothing = result.without_offloading()
    assert (nothing.computing, nothing.busiest_computing) == (result.recomputing, result.busiest_recomputing)


def test_warns_where_the_mean_misleads():
    assert "the busiest hour has 50 times the mean hour's work in 50 h" in uneven_note(trace(50), Machine())
    assert uneven_note(trace(2), Machine()) == ""
