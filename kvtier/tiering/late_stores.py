"""Blocks that a tier was too busy to take when they were stored. They are offered once more when it has time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey
from kvtier.primary.table import BlockTable
from kvtier.types import ReqContext

MAX_LATE = 1 << 16
"""Most blocks of one tier that wait here: at 2 MiB each, a minute and more of writing."""

MAX_PROMPTS = 1 << 18
"""Most blocks of the prompts of all requests that wait here, some 25 MB: their contexts know each of these. Beyond that
the oldest request goes, whose blocks memory has the least of."""

_MAX_SKIPPED = 4096
"""Most blocks that one call passes over because memory does not hold them any more."""


@dataclass(slots=True, eq=False)
class _Rest:
    """What is left of one request's blocks, in prefix order."""

    context: ReqContext
    keys: deque[OffloadKey]
    prompt: int
    """Blocks of its prompt, as far as the engine has told them."""


class LateStores:
    """The late blocks of one tier, by request; those of the request that came first are offered first.

    A tier is busy for a moment and idle for long, or the other way round. Without these blocks, a prompt that met a
    busy moment would have a hole in the tier for as long as memory holds its blocks, since nobody stores them again.

    Attributes:
        has_let_go: whether a request has no more blocks here since somebody set this to False.
    """

    def __init__(self) -> None:
        self._by_request: dict[str, _Rest] = {}
        self._num_blocks = self._num_prompts = 0
        self.has_let_go = False

    def __bool__(self) -> bool:
        return bool(self._by_request)

    def __len__(self) -> int:
        return self._num_blocks

    def __contains__(self, req_id: object) -> bool:
        """Return whether blocks of the request of this name wait."""
        return req_id in self._by_request

    def add(self, keys: Sequence[OffloadKey], context: ReqContext) -> None:
        """Let blocks of a request wait, in prefix order; those beyond `MAX_LATE` do not."""
        keys = keys[: MAX_LATE - self._num_blocks]
        if not keys:
            return
        rest = self._by_request.get(context.req_id)
        if rest is None:
            rest = self._by_request[context.req_id] = _Rest(context, deque(), len(context.offload_key_positions))
            self._num_prompts += rest.prompt
        rest.keys.extend(keys)
        self._num_blocks += len(keys)
        while self._num_prompts > MAX_PROMPTS and len(self._by_request) > 1:
            self.drop(next(iter(self._by_request)))

    def take(self, most: int, table: BlockTable) -> tuple[ReqContext, list[OffloadKey]] | None:
        """Remove and return the next blocks that `table` holds READY, at most `most` and of one request, and the
        request. None if none was found; there may be more then, behind many that are not held any more.
        """
        skipped = 0
        while self._by_request and skipped < _MAX_SKIPPED:
            rest = next(iter(self._by_request.values()))
            named = [rest.keys.popleft() for _ in range(min(most, len(rest.keys)))]
            self._num_blocks -= len(named)
            if not rest.keys:
                self.drop(rest.context.req_id)
            keys = list(dict.fromkeys(filter(table.is_ready, named)))
            if keys:
                return rest.context, keys
            skipped += len(named)
        return None

    def drop(self, req_id: str) -> None:
        """Forget the blocks of a request."""
        rest = self._by_request.pop(req_id, None)
        if rest is not None:
            self._num_blocks -= len(rest.keys)
            self._num_prompts -= rest.prompt
            self.has_let_go = True

    def clear(self) -> None:
        """Forget all blocks."""
        self._by_request.clear()
        self._num_blocks = self._num_prompts = 0
        self.has_let_go = True

    def check_invariants(self) -> None:
        """Raise InvariantError if the blocks are miscounted, or a request without blocks waits."""
        counts = [len(rest.keys) for rest in self._by_request.values()]
        if self._num_prompts != sum(rest.prompt for rest in self._by_request.values()):
            raise InvariantError("late stores: the blocks of prompts are miscounted")
        if sum(counts) != self._num_blocks or not all(counts):
            raise InvariantError(f"late stores: {self._num_blocks} counted, {counts} here")
