"""Probes: a tier without an index asks its store in batches whether keys exist, and caches the answers for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvtier.clock import Clock
from kvtier.errors import InvariantError, ProtocolError
from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.types import LookupResult

_HIT, _MISS, _RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY


class AnswerCache:
    """A bounded set of keys that expire. When it is full, the oldest entry is dropped."""

    def __init__(self, clock: Clock, most: int, seconds: float) -> None:
        self._clock = clock
        self._most = most
        self._seconds = seconds
        self._expiry: OrderedDict[OffloadKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._expiry)

    def __contains__(self, key: OffloadKey) -> bool:
        expiry = self._expiry.get(key)
        if expiry is None:
            return False
        if self._clock() < expiry:
            return True
        del self._expiry[key]
        return False

    def add(self, keys: Iterable[OffloadKey], seconds: float | None = None) -> None:
        """Add `keys` for `seconds`; None for the cache's own time."""
        expiry = self._clock() + (self._seconds if seconds is None else seconds)
        for key in keys:
            self._expiry[key] = expiry
            self._expiry.move_to_end(key)
        while len(self._expiry) > self._most:
            self._expiry.popitem(last=False)

    def remove(self, keys: Iterable[OffloadKey]) -> None:
        """Remove `keys`."""
        for key in keys:
            self._expiry.pop(key, None)

    def clear(self) -> None:
        """Remove all keys."""
        self._expiry.clear()


class Probes:
    """Whether keys exist in a store: known, or being asked."""

    def __init__(
        self,
        clock: Clock,
        send: Callable[[int, Sequence[OffloadKey]], None],
        *,
        most_answers: int = 200_000,
        present_seconds: float = 60.0,
        absent_seconds: float = 2.0,
        batch: int = 256,
        batch_seconds: float = 0.0005,
    ) -> None:
        """Args:
        send: sends a batch of keys to the store, with an id for the answer.
        most_answers: most keys in each of the two caches.
        present_seconds, absent_seconds: how long the caches keep answers.
        batch, batch_seconds: a batch with this many keys, or of this age, is sent at the next lookup.
        """
        self._clock = clock
        self._send = send
        self._batch = batch
        self._batch_seconds = batch_seconds
        self._present_seconds = present_seconds
        self._present = AnswerCache(clock, most_answers, present_seconds)
        self._absent = AnswerCache(clock, most_answers, absent_seconds)
        self._waiting: dict[OffloadKey, None] = {}
        self._waiting_since = 0.0
        self._waiting_bytes = 0
        self._asked: dict[OffloadKey, int] = {}
        self._batches: dict[int, tuple[float, Sequence[OffloadKey]]] = {}
        self._next_id = 1

    @property
    def num_unanswered(self) -> int:
        """Number of keys that are asked or waiting to be."""
        return len(self._waiting) + len(self._asked)

    def lookup(self, key: OffloadKey) -> LookupResult:
        """Answer from the caches. An unknown key is queued, and answered RETRY until its answer arrives.

        Anything that cannot be a key is a MISS, and is not asked. A batch has keys of one length.
        """
        if key in self._present:
            return _HIT
        if key in self._absent:
            return _MISS
        if key not in self._asked and key not in self._waiting:
            if not isinstance(key, bytes) or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
                return _MISS
            if self._waiting and len(key) != self._waiting_bytes:
                self.flush()
            if not self._waiting:
                self._waiting_since, self._waiting_bytes = self._clock(), len(key)
            self._waiting[key] = None
        if len(self._waiting) >= self._batch or (
            self._waiting and self._clock() - self._waiting_since >= self._batch_seconds
        ):
            self.flush()
        return _RETRY

    def flush(self) -> None:
        """Send all waiting keys."""
        keys, self._waiting = list(self._waiting), {}
        for start in range(0, len(keys), self._batch):
            batch = keys[start : start + self._batch]
            probe_id, self._next_id = self._next_id, self._next_id + 1
            self._batches[probe_id] = (self._clock(), batch)
            self._asked.update(dict.fromkeys(batch, probe_id))
            self._send(probe_id, batch)

    def answer(self, probe_id: int, found: Sequence[bool]) -> None:
        """Cache an answer, except for keys about which something newer is known.

        Raises:
            ProtocolError: there is no such probe, or it has another number of keys.
        """
        _, keys = self._batches.pop(probe_id, (0.0, ()))
        if not keys or len(keys) != len(found):
            raise ProtocolError(f"answer {probe_id} with {len(found)} keys, {len(keys)} asked")
        open_keys = [self._asked.pop(key, None) == probe_id for key in keys]
        self._present.add(key for key, held, is_open in zip(keys, found, open_keys, strict=True) if held and is_open)
        self._absent.add(key for key, held, is_open in zip(keys, found, open_keys, strict=True) if is_open and not held)

    def is_present(self, key: OffloadKey) -> bool:
        """Return whether the block is known to exist."""
        return key in self._present

    def set_present(self, keys: Sequence[OffloadKey]) -> None:
        """Learn that `keys` were stored."""
        self._forget_questions(keys)
        self._absent.remove(keys)
        self._present.add(keys)

    def set_absent(self, keys: Sequence[OffloadKey], *, for_long: bool = False) -> None:
        """Learn that `keys` could not be loaded.

        Args:
            for_long: remember this as long as a positive answer, or until the keys are stored.
        """
        self._forget_questions(keys)
        self._present.remove(keys)
        self._absent.add(keys, self._present_seconds if for_long else None)

    def expire(self, seconds: float) -> int:
        """Answer MISS for keys that were asked more than `seconds` ago; return their number."""
        limit = self._clock() - seconds
        late = [probe_id for probe_id, (asked_at, _) in self._batches.items() if asked_at < limit]
        num_late = 0
        for probe_id in late:
            keys = [key for key in self._batches[probe_id][1] if self._asked.get(key) == probe_id]
            self.set_absent(keys)
            num_late += len(keys)
            asked_keys = self._batches[probe_id][1]
            self._batches[probe_id] = (float("inf"), asked_keys)  # its answer may still come, and is then ignored
        return num_late

    def clear(self) -> None:
        """Forget all answers and probes: the executor or the epoch has changed."""
        self._present.clear()
        self._absent.clear()
        self._waiting.clear()
        self._asked.clear()
        self._batches.clear()

    def _forget_questions(self, keys: Sequence[OffloadKey]) -> None:
        for key in keys:
            self._waiting.pop(key, None)
            self._asked.pop(key, None)

    def check_invariants(self) -> None:
        """Raise InvariantError if a key is known and being asked, or in two caches."""
        questions = self._asked.keys() | self._waiting.keys()
        if self._asked.keys() & self._waiting.keys():
            raise InvariantError("a key waits and is asked")
        if any(probe_id not in self._batches for probe_id in self._asked.values()):
            raise InvariantError("a key is asked by a batch that is not open")
        if any(key in self._present and key in self._absent for key in questions):
            raise InvariantError("a key is present and absent")
