"""A trace: what requests asked for, when, in blocks whose keys say which prefixes are equal."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from kvtier.errors import TraceError
from kvtier.keys import OffloadKey, make_offload_key


class TraceRequest(NamedTuple):
    """One request.

    Attributes:
        time: of its arrival, seconds since the first one's.
        keys: the blocks of its prompt, first block first; the last one may be filled in part (not in recordings).
        input_tokens, output_tokens: lengths of prompt and answer.
        answer_keys: blocks that the answer filled, where the trace knows them.
        hint: what the caller said of the blocks, see `kvtier.hints`; None for nothing.
    """

    time: float
    keys: Sequence[OffloadKey]
    input_tokens: int
    output_tokens: int
    answer_keys: Sequence[OffloadKey] = ()
    hint: Any = None


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        name: for people.
        format: name of the format that it was read from.
        tokens_per_block: tokens in one block.
        block_bytes: bytes of one block, where the trace says so, else None.
        note: what of the log is left out, a line for people; else empty.
    """

    name: str
    format: str
    tokens_per_block: int
    requests: Sequence[TraceRequest]
    block_bytes: int | None = None
    note: str = ""

    @cached_property
    def num_accesses(self) -> int:
        """Blocks asked for, over all requests."""
        return sum(len(request.keys) for request in self.requests)

    @cached_property
    def num_unique(self) -> int:
        """Different blocks."""
        return len({key for request in self.requests for key in request.keys})

    @cached_property
    def num_kept(self) -> int:
        """Different blocks, those of answers included: what a cache without limit holds at the end."""
        return len({key for request in self.requests for key in (*request.keys, *request.answer_keys)})

    @cached_property
    def num_ideal_hits(self) -> int:
        """Blocks that a prefix cache without limit has when they are asked for: those that came before, in a row."""
        seen: set[OffloadKey] = set()
        hits = 0
        for request in self.requests:
            keys = request.keys
            hits += next((index for index, key in enumerate(keys) if key not in seen), len(keys))
            seen.update(keys)
            seen.update(request.answer_keys)
        return hits

    @property
    def seconds(self) -> float:
        """Time from the first arrival to the last, at least a microsecond."""
        return max(1e-6, self.requests[-1].time - self.requests[0].time) if self.requests else 1e-6


class KeyMaker:
    """Gives every id of a trace a key: equal ids, equal keys."""

    def __init__(self) -> None:
        self._keys: dict[Hashable, OffloadKey] = {}

    def keys(self, ids: Iterable[Hashable]) -> list[OffloadKey]:
        """Return the keys of `ids`, in order."""
        known, made = self._keys, []
        for number in ids:
            key = known.get(number)
            if key is None:
                key = known[number] = make_offload_key(len(known).to_bytes(8, "big"), 0)
            made.append(key)
        return made


class Joiner:
    """Joins blocks that follow one another into larger ones, which are equal if all before and in them are."""

    def __init__(self) -> None:
        self._maker = KeyMaker()

    def join(self, keys: Sequence[OffloadKey], count: int) -> list[OffloadKey]:
        """Return the keys of larger blocks, of `count` each; fewer are left for the last."""
        if count == 1:
            return list(keys)
        joined: list[OffloadKey] = []
        for start in range(0, len(keys), count):
            joined += self._maker.keys([(joined[-1] if joined else None, *keys[start : start + count])])
        return joined


def blocks_to_join(name: str, tokens_per_block: int, wanted: int | None) -> int:
    """Return how many blocks of a trace make one of `wanted` tokens; 1 if None.

    Raises:
        TraceError: no whole number of them.
    """
    count, rest = divmod(wanted or tokens_per_block, tokens_per_block)
    if rest:
        raise TraceError(f"{name}: --tokens-per-block {wanted}: a multiple of the trace's {tokens_per_block} expected")
    return count


def in_order(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Return requests by time, the first at 0; arrivals at one instant are spread until the clock would tick again.

    A log whose clock ticks every three seconds holds bursts that never were. The tick is the smallest step between
    two times of the log.
    """
    ordered = sorted(requests, key=lambda request: request.time)
    times = sorted({request.time for request in ordered})
    tick = min((later - earlier for earlier, later in pairwise(times)), default=0.0)
    counts: dict[float, int] = {}
    for request in ordered:
        counts[request.time] = counts.get(request.time, 0) + 1
    spread: list[TraceRequest] = []
    position, last = 0, -1.0
    for request in ordered:
        position = position + 1 if request.time == last else 0
        last = request.time
        offset = tick * position / counts[last]
        spread.append(request._replace(time=last - times[0] + offset))
    return spread
