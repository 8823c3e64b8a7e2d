"""The answers that a tier owes besides those to its jobs: what it deletes, and lists, in its executor."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.clock import Clock
from kvtier.errors import ProtocolError, StoreError
from kvtier.executors.protocol import ChoreDone
from kvtier.key_tables import KeyDict
from kvtier.keys import OffloadKey
from kvtier.types import Answer, KeyPage

KEYS_PER_CHORE = 256
"""As many as a probe has: other work of the store waits for a chore."""


@dataclass(eq=False)
class _Open:
    """A chore that the executor has not done: an answer may need several."""

    answer: Answer[Any]
    asked_at: float
    on_done: Callable[[ChoreDone], None]


class Chores:
    """The chores of one executor's life that have not ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[int, _Open] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, answer: Answer[Any], on_done: Callable[[ChoreDone], None]) -> int:
        """Note a chore of an answer; return the chore's number.

        Args:
            on_done: called with the report, also if the answer has failed meanwhile, but not after `end_life`.
        """
        chore_id, self._next_id = self._next_id, self._next_id + 1
        self._open[chore_id] = _Open(answer, self._clock(), on_done)
        return chore_id

    def end(self, report: ChoreDone) -> None:
        """Take a report.

        Raises:
            ProtocolError: there is no such chore.
        """
        chore = self._open.pop(report.chore_id, None)
        if chore is None:
            raise ProtocolError(f"the end of chore {report.chore_id}, which nobody asked for")
        if report.failed:
            chore.answer.fail()
        chore.on_done(report)

    def expire(self, seconds: float) -> int:
        """Fail the answers that are older than this; return how many. What their chores hold stays held."""
        limit = self._clock() - seconds
        late = [chore for chore in self._open.values() if chore.asked_at < limit]
        for chore in late:
            chore.answer.fail()
            chore.asked_at = float("inf")
        return len(late)

    def end_life(self) -> None:
        """Fail all answers: the executor has ended, or the namespace has changed."""
        for chore in self._open.values():
            chore.answer.fail()
        self._open.clear()


class Deletion:
    """Settles the answer to a `delete` when the last of its chores has ended."""

    def __init__(self, keys: Sequence[OffloadKey], gone: Iterable[OffloadKey] = ()) -> None:
        """Args: keys: to delete by chores; gone: further keys that are not there."""
        self.answer: Answer[Any] = Answer()
        self._gone = frozenset((*keys, *gone))
        self._num_left = -(-len(keys) // KEYS_PER_CHORE)
        self._settle()

    def end_chore(self) -> None:
        """Note the end of one chore. If it failed, the answer has failed."""
        self._num_left -= 1
        self._settle()

    def _settle(self) -> None:
        if not self._num_left:
            self.answer.settle(self._gone)


def failed() -> Answer[Any]:
    """Return an answer that has failed."""
    answer: Answer[Any] = Answer()
    answer.fail()
    return answer


def settled(page: KeyPage) -> Answer[KeyPage]:
    """Return a listing that needs no executor."""
    answer: Answer[KeyPage] = Answer()
    answer.settle(page)
    return answer


def page_of(keys: KeyDict[Any], cursor: bytes, most: int) -> KeyPage:
    """Return a page of an index, in order of keys within each of its parts.

    A large index is listed part by part: to order all of it for each page would hold up its owner.

    Raises:
        StoreError: the cursor is not one of an index, or `most` is below 1.
    """
    parts = keys.parts
    number, after = cursor[:1] or b"\0", cursor[1:]
    index = number[0]
    if index >= len(parts) or most < 1:
        raise StoreError("a cursor of another index, or a page without keys")
    found: list[OffloadKey] = []
    while index < len(parts):
        found += heapq.nsmallest(most - len(found), (key for key in parts[index] if key > after))
        if len(found) == most:
            return KeyPage(found, bytes([index]) + found[-1])
        index, after = index + 1, b""
    return KeyPage(found, None)
