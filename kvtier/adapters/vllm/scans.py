"""Answers that end vLLM's scan of a waiting request early, when a whole scan would only find what the last one found.

vLLM (`offloading/scheduler.py`, 0.32) asks for one key at a time, group by group, and defers the request if any group's
lookup returns None:

- a full-attention group is asked from its first key on. `HIT_PENDING` makes the lookup return None whatever follows,
  and a `MISS` ends it: two calls.
- a sliding-window group is asked from its last key backwards. A `MISS` does not end this lookup, it only forgets what
  was pending in the window; `RETRY` does not end it either. As many `HIT_PENDING` in a row as the window has blocks end
  it, with None: as many calls as the window has blocks.

So the first key of a group is pending; the second one tells the direction: a miss for a key further on, pending for
one further back. Versions before 0.32 do not say where a block ends. There the second key is a miss in any case, which
ends the first kind, and every key after it is pending: a window is complete again after as many calls as it has
blocks, if the group has at least three keys (`MIN_KEYS`); shorter scans are cheap and are left as they are.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import LookupResult

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.types import ReqContext

MIN_KEYS = 3
"""Fewest keys a group must have for `RepeatedScan` where the engine does not say where blocks end."""

_PENDING, _MISS = LookupResult.HIT_PENDING, LookupResult.MISS


class RepeatedScan:
    """The answers of one step to a request that waits as before."""

    def __init__(self, context: ReqContext) -> None:
        """Args: context: knows where the request's blocks end, in tokens, if the engine says so."""
        self._context = context
        self._group = b""
        self._start: int | None = None
        self._calls = 0

    def answer(self, key: OffloadKey) -> Any:
        """Return what ends the scan soonest and defers the request."""
        if key[-GROUP_BYTES:] != self._group:
            self._group, self._calls = key[-GROUP_BYTES:], 0
            self._start = self._context.get_offload_key_position(key)
        self._calls += 1
        return _MISS if self._calls == 2 and self._goes_forwards(key) else _PENDING

    def _goes_forwards(self, key: OffloadKey) -> bool:
        position = self._context.get_offload_key_position(key)
        return position is None or self._start is None or position > self._start
