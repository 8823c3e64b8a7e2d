"""A trace: the arrival times of requests and the keys of their blocks; equal prefixes have equal keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import msgspec

from kvtier.errors import TraceError
from kvtier.keys import OffloadKey, make_offload_key

MAX_TOKENS = 1 << 30
"""Most tokens of a prompt or an answer; the longest contexts of models have some millions."""
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class TraceRequest(NamedTuple):
    """One request.

    Attributes:
        time: arrival, seconds since the first request's arrival.
        keys: the prompt's blocks in order. The last one may be incomplete, except in recordings and where blocks were
            joined: there a prompt that fills no block has none.
        input_tokens, output_tokens: tokens of prompt and answer.
        answer_keys: blocks that the answer filled, if the trace has them.
        hint: the caller's hint, see `kvtier.hints`; None if there is none.
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
        name: name of the trace, for people.
        format: name of the file's format.
        tokens_per_block: tokens per block.
        block_bytes: bytes per block; None if the trace does not contain them.
        note: a line for people, about an unusual block size or about KV groups that are left out; else "".
    """

    name: str
    format: str
    tokens_per_block: int
    requests: Sequence[TraceRequest]
    block_bytes: int | None = None
    note: str = ""

    @cached_property
    def num_accesses(self) -> int:
        """Number of blocks of all prompts together."""
        return sum(len(request.keys) for request in self.requests)

    @cached_property
    def num_unique(self) -> int:
        """Number of different blocks of prompts."""
        return len({key for request in self.requests for key in request.keys})

    @cached_property
    def num_kept(self) -> int:
        """Number of different blocks, of prompts and answers; an unlimited cache holds so many at the end."""
        return len({key for request in self.requests for key in (*request.keys, *request.answer_keys)})

    @cached_property
    def num_ideal_hits(self) -> int:
        """Hits of an unlimited prefix cache: per request, the leading blocks that earlier requests had."""
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
    """Makes a key for every id of a trace; equal ids get equal keys."""

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
    """Joins consecutive blocks into larger ones.

    Two large blocks have equal keys if all small blocks up to their ends are equal.
    """

    def __init__(self) -> None:
        self._maker = KeyMaker()

    def join(self, keys: Sequence[OffloadKey], count: int) -> list[OffloadKey]:
        """Return the keys of larger blocks of `count` blocks each; blocks at the end that fill none are left out."""
        if count == 1:
            return list(keys)
        joined: list[OffloadKey] = []
        # Engines look up and store only whole blocks.
        for start in range(0, len(keys) - count + 1, count):
            joined += self._maker.keys([(joined[-1] if joined else None, *keys[start : start + count])])
        return joined


def blocks_to_join(name: str, tokens_per_block: int, wanted: int | None) -> int:
    """Return the number of a trace's blocks per block of `wanted` tokens; 1 if `wanted` is None.

    Raises:
        TraceError: it is no whole number.
    """
    count, rest = divmod(wanted or tokens_per_block, tokens_per_block)
    if rest:
        raise TraceError(f"{name}: --tokens-per-block {wanted}: a multiple of the trace's {tokens_per_block} expected")
    return count


def in_order(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Return requests in order of time, the first one at 0; equal times are spread evenly over one tick.

    A tick is the smallest difference between two times of the log.
    """
    # A log with a coarse clock, of three seconds for example, shows bursts of arrivals that did not happen.
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
