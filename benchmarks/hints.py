"""What hints are worth on a trace: LRU's hits in kvtier's manager without any, and with some that a caller could give.

Sessions are guessed from the trace: a request continues the session whose last prompt ended in one of its blocks. The
last request of a session has a hint that the session ends. A program that runs agents knows this, a policy does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvtier.keys import OffloadKey
from kvtier.simulator.formats import load_trace
from kvtier.simulator.replay import Replay
from kvtier.simulator.setup import Machine, Setup
from kvtier.simulator.trace import Trace

SHARES = (0.01, 0.05, 0.2)
TAIL = 3
"""Blocks at the end of a prompt that identify the next turn; more than one, since the last is often incomplete."""

Hints = Sequence[Mapping[str, Any] | None]


def sessions_of(trace: Trace) -> list[int]:
    """Return the number of each request's session."""
    ended_in: dict[OffloadKey, int] = {}
    sessions: list[int] = []
    for request in trace.requests:
        known = (ended_in[key] for key in reversed(request.keys) if key in ended_in)
        sessions.append(session := next(known, len(sessions)))
        ended_in.update(dict.fromkeys(request.keys[-TAIL:], session))
    return sessions


def hints_of(trace: Trace) -> dict[str, Hints]:
    """Return the hints of all requests, by the name of the hinting."""
    sessions = sessions_of(trace)
    last = {session: index for index, session in enumerate(sessions)}
    turns = [{"session": str(session), "ended": last[session] == index} for index, session in enumerate(sessions)]
    return {
        "no hints": [None] * len(sessions),
        "sessions say when they end": turns,
        "everybody retains 30 s": [{"retain": "30s"}] * len(sessions),
        "everybody retains 5 m": [{"retain": "5m"}] * len(sessions),
    }


def measure(trace: Trace, policy: str) -> dict[str, dict[str, float]]:
    """Return hits in percent of all blocks, by hinting and by cache size (a share of the different blocks)."""
    rows: dict[str, dict[str, float]] = {}
    for name, hints in hints_of(trace).items():
        requests = [request._replace(hint=hint) for request, hint in zip(trace.requests, hints, strict=True)]
        for share in SHARES:
            setup = Setup(policy, max(1, int(trace.num_unique * share)), 0, 1 << 20)
            hits = Replay(replace(trace, requests=requests), setup, Machine()).run().num_hits
            rows.setdefault(name, {})[f"{share:.0%}"] = 100 * hits / trace.num_accesses
    return rows


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="a trace that `kvtier simulate` reads")
    parser.add_argument("--tokens-per-block", type=int)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    trace = load_trace(arguments.trace, arguments.tokens_per_block)
    rows = measure(trace, arguments.policy)
    table = Table(title=f"{trace.name}: blocks hit, %; cache as a share of unique blocks; {arguments.policy}")
    for column in ("hints", *(f"{share:.0%}" for share in SHARES)):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
