"""Replays requests of a trace through a policy, the way an engine with a prefix cache uses one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kvtier.abc import EvictionPolicy
from kvtier.keys import OffloadKey, make_offload_key

Requests = Sequence[Sequence[OffloadKey]]


@dataclass(frozen=True)
class Counts:
    accesses: int
    misses: int

    @property
    def hit_percent(self) -> float:
        return 100 * (1 - self.misses / self.accesses)


def read_requests(lines: Iterable[str]) -> Requests:
    """Return the requests' keys; a line is a list of block ids, or an object that has them as `hash_ids`."""
    keys: dict[int, OffloadKey] = {}
    requests = []
    for line in lines:
        record = json.loads(line)
        numbers = record["hash_ids"] if isinstance(record, dict) else record
        requests.append([keys.setdefault(number, make_offload_key(number.to_bytes(8, "big"), 0)) for number in numbers])
    return requests


def read_extract() -> Requests:
    path = Path(__file__).parents[1] / "data" / "conversation_prefixes.jsonl"
    return read_requests(path.read_text().splitlines())


def held_prefix(policy: EvictionPolicy, keys: Sequence[OffloadKey]) -> int:
    """Return how many leading keys are held: what an engine can load."""
    return next((index for index, key in enumerate(keys) if key not in policy), len(keys))


def replay(policy: EvictionPolicy, requests: Requests) -> Counts:
    """Serve `requests` in order and count the blocks that had to be computed.

    A request's held prefix is its hits, touched in one call; whatever else of it is held was computed again and
    is touched, too; the rest is inserted in one call. Victims are never keys of the same request, so that what
    does not fit beside them stays outside. At its end all of it is settled, tail-first. A request comes every second.
    """
    misses = 0
    for now, keys in enumerate(requests):
        hits = held_prefix(policy, keys)
        misses += len(keys) - hits
        policy.touch(keys[:hits], now)
        policy.touch([key for key in keys[hits:] if key in policy], now)
        missing = [key for key in keys[hits:] if key not in policy]
        own = set(keys)
        wanted = max(0, len(policy) + len(missing) - policy.capacity)
        victims = list(islice((key for key in policy.candidates(missing) if key not in own), wanted))
        policy.evict(victims)
        policy.insert(missing[: policy.capacity - len(policy)], now)
        policy.settle(keys)
    return Counts(sum(map(len, requests)), misses)
