"""Answers for whole scans of vLLM's, which need no lookup of each key.

`RepeatedScan` ends vLLM's scan of a waiting request early, when a whole scan would only repeat the result of the last
one. `GivenUpScan` lets a request miss.

vLLM (`offloading/scheduler.py`, 0.32) asks for one key at a time, one KV group after the other. It defers the request
if the lookup of any group returns None:

- In a group with full attention vLLM asks from the first key forwards. After a `HIT_PENDING` the lookup returns None,
  whatever follows, and a `MISS` ends it. So two calls are enough.
- In a group with a sliding window vLLM asks from the last key backwards. A `MISS` does not end this lookup; it only
  resets the count of pending blocks. `RETRY` does not end it either. It ends with None after as many `HIT_PENDING` in a
  row as the window has blocks. So it takes as many calls as the window has blocks.

So the first key of a group gets `HIT_PENDING`, or the `RETRY` that stands for it (`compat.groups_to_retry`). The second
key shows the direction: it gets `MISS` if its block ends later than the first one's, else `HIT_PENDING`. Versions
before 0.32 do not tell where a block ends. There the second key always gets `MISS`, which ends a scan of the first
kind, and all later keys get `HIT_PENDING`. A window then counts anew from the third key. This needs a group of at least
three keys (`MIN_KEYS`); shorter scans are cheap and run whole.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from vllm.v1.kv_offload.base import LookupResult

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.types import ReqContext

MIN_KEYS = 3
"""Least number of keys per group for a `RepeatedScan`, if the engine does not tell where blocks end."""

_PENDING, _RETRY, _MISS = LookupResult.HIT_PENDING, LookupResult.RETRY, LookupResult.MISS


def pending_answer(key: OffloadKey, retried_groups: Set[bytes]) -> Any:
    """Return vLLM's answer for a block that is not ready yet.

    Args:
        retried_groups: as `compat.groups_to_retry` returns them.
    """
    return _RETRY if key[-GROUP_BYTES:] in retried_groups else _PENDING


class GivenUpScan:
    """The answers to a request that shall load nothing more."""

    def answer(self, key: OffloadKey) -> Any:
        """Return a miss."""
        return _MISS


class RepeatedScan:
    """The answers in one step to a request that still waits for the same blocks."""

    def __init__(self, context: ReqContext, retried_groups: Set[bytes] = frozenset()) -> None:
        """Args: context: has the ends of the request's blocks, if the engine tells them."""
        self._context, self._retried_groups = context, retried_groups
        self._group = b""
        self._start: int | None = None
        self._calls = 0

    def answer(self, key: OffloadKey) -> Any:
        """Return the answer that ends the scan soonest and lets vLLM defer the request."""
        if key[-GROUP_BYTES:] != self._group:
            self._group, self._calls = key[-GROUP_BYTES:], 0
            self._start = self._context.get_offload_key_position(key)
        self._calls += 1
        if self._calls == 2 and self._goes_forwards(key):
            return _MISS
        return pending_answer(key, self._retried_groups)

    def _goes_forwards(self, key: OffloadKey) -> bool:
        position = self._context.get_offload_key_position(key)
        return position is None or self._start is None or position > self._start
