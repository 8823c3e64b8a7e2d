"""Hints in the lines of a trace: the simulator gives them to the production manager."""

import json
from dataclasses import replace

import pytest

from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.tiering.settings import TieringSettings

QUICK = Machine(prefill_rate=1e9, disk_read=1e18, disk_write=1e18, disk_latency=0)


def line(second, ids, **more):
    return json.dumps({"timestamp": 1000 * second, "input_length": 512 * len(ids), "hash_ids": ids, **more})


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def scan_between(hint, pause):
    """Return lines of one prompt, many that come once, and the prompt again `pause` seconds later."""
    first = list(range(8))
    lines = [line(0, first, **({} if hint is None else {"kvtier": hint}))]
    lines += [line(1 + number, list(range(100 + 8 * number, 108 + 8 * number))) for number in range(20)]
    return [*lines, line(pause, first)]


@pytest.mark.parametrize("disk_blocks", [0, 64])
@pytest.mark.parametrize(
    ("hint", "pause", "hits"),
    [
        (None, 100, 0),
        ({"retain": "10m"}, 100, 8),
        ({"retain": "30s"}, 100, 8),  # nothing came after the 30 seconds that would have taken their place
        ({"priority": "high"}, 100, 8),
        ({"priority": "low"}, 100, 0),
        ({"retain": "never"}, 100, 0),
    ],
)
def test_a_line_may_have_a_hint(tmp_path, hint, pause, hits, disk_blocks):
    trace = load_trace(write(tmp_path / "trace.jsonl", scan_between(hint, pause)))
    run = Replay(trace, Setup("lru", 32, disk_blocks, 4096, settings=TieringSettings(retain_share=0.25)), QUICK).run()
    assert run.num_hits == hits


def test_no_share_keeps_nothing(tmp_path):
    trace = load_trace(write(tmp_path / "trace.jsonl", scan_between({"retain": "10m"}, 100)))
    setup = Setup("lru", 32, 0, 4096, settings=TieringSettings(retain_share=0.0))
    assert Replay(trace, setup, QUICK).run().num_hits == 0


def test_hints_of_normal_priority_change_nothing(tmp_path):
    lines = [line(number, [number % 7, 50 + number % 5, 90 + number]) for number in range(200)]
    plain = load_trace(write(tmp_path / "plain.jsonl", lines))
    hinted = replace(plain, requests=[request._replace(hint={"priority": "normal"}) for request in plain.requests])
    runs = [Replay(trace, Setup("lru", 24, 0, 4096), QUICK).run() for trace in (plain, hinted)]
    assert runs[0].num_hits == runs[1].num_hits > 0


@pytest.mark.parametrize(("quotas", "hits"), [(False, 0), (True, 8)])
def test_lines_may_name_tenants(tmp_path, quotas, hits):
    small, first = {"tenant": "small"}, list(range(8))
    lines = [line(0, first, kvtier=small)]
    for number in range(20):
        ids = list(range(100 + 8 * number, 108 + 8 * number))
        lines.append(line(1 + number, ids, kvtier={"tenant": "large"}))
    trace = load_trace(write(tmp_path / "trace.jsonl", [*lines, line(30, first, kvtier=small)]))
    setup = Setup("lru", 32, 0, 4096, settings=TieringSettings(tenant_quotas=quotas))
    assert Replay(trace, setup, QUICK).run().num_hits == hits
