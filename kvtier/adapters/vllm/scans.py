"""Answers that end vLLM's scan of a waiting request early, when a whole scan would only find what the last one found.

vLLM (`offloading/scheduler.py`, 0.32) asks for one key at a time, group by group, and defers the request if any group's
lookup returns None:

- a full-attention group is asked from its first key on. `HIT_PENDING` makes the lookup return None whatever follows,
  and a `MISS` ends it: two calls.
- a sliding-window group is asked from its last key backwards. A `MISS` does not end this lookup, it only forgets what
  was pending in the window; `RETRY` does not end it either. As many `HIT_PENDING` in a row as the window has blocks end
  it, with None: as many calls as the window has blocks.

So the first key of a group is pending; the second one tells the direction: a miss for a key further on, pending for
one further back.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import LookupResult

from kvtier.keys import GROUP_BYTES, OffloadKey
from kvtier.types import ReqContext

_PENDING, _MISS = LookupResult.HIT_PENDING, LookupResult.MISS


class RepeatedScan:
    """The answers of one step to a request that waits as before."""

    def __init__(self, context: ReqContext) -> None:
        """Args: context: knows where the request's blocks end, in tokens."""
        self._context = context
        self._group = b""
        self._start: int | None = None
        self._backwards = False

    def answer(self, key: OffloadKey) -> Any:
        """Return what ends the scan soonest and defers the request."""
        if key[-GROUP_BYTES:] != self._group:
            self._group, self._backwards = key[-GROUP_BYTES:], False
            self._start = self._context.get_offload_key_position(key)
            return _PENDING
        if self._backwards:
            return _PENDING
        position = self._context.get_offload_key_position(key)
        self._backwards = position is None or self._start is None or position < self._start
        return _PENDING if self._backwards else _MISS
