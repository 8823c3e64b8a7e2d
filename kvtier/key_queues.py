"""Orders of keys that grow and churn without a pause: `key_tables.py` says why, and which tables are large.

An order is a queue from the oldest to the newest key. `key_queues` chooses between an OrderedDict and a `LongQueue`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from itertools import chain, compress, islice
from sys import getsizeof
from typing import Any, TypeVar, overload

from kvtier import key_tables
from kvtier.errors import InvariantError
from kvtier.key_tables import MOST_IN_PART, NOT_A_KEY, NUM_SHARDS, SHARD_BYTE, ShardedDict, free_some
from kvtier.keys import OffloadKey

V = TypeVar("V")
T = TypeVar("T")

LONGEST_RUN = 2048
"""More keys that enter a queue together are several runs. A key that leaves a run stays a hole, which every iteration
passes, so longer runs would make a look at the oldest key slower."""

SHORT_RUN = 16
"""Fewer keys that enter together join a last run of fewer keys, so that a queue does not consist of many short runs."""

MOST_BYTES_PER_KEY = 400
"""A run that takes more memory than this per key is mostly holes, and is built anew."""


class _Places(ShardedDict[int]):
    """Where the keys of some queues are: the number of each key's run.

    Attributes:
        last: the last number that was given to a run of any of the queues.
        queues: those that share these places.
    """

    __slots__ = ("last", "queues")

    def __init__(self, most: int) -> None:
        """Args: most: keys in each queue."""
        super().__init__(most)
        self.last = 0
        self.queues: list[LongQueue[Any]] = []

    def clear(self) -> None:
        """Remove all keys of all queues. What is removed now is freed later, some of it by each `append`."""
        super().clear()
        for queue in self.queues:
            self.former += queue._runs.values()
            queue._runs = OrderedDict()
            queue._size = 0


class LongQueue(MutableMapping[OffloadKey, V]):
    """An ordered dict of keys, from the oldest to the newest; iteration starts at the oldest.

    The order is a chain of runs: keys that entered together, like the blocks of a request. Requests use again what an
    earlier one has left, so most often whole runs move to the new end, and no key of them has to be looked up. A key
    that leaves its run enters the last one, or a new one with the keys that came with it.
    """

    __slots__ = ("_places", "_runs", "_size")

    def __init__(self, beside: LongQueue[Any] | None = None, most: int = NUM_SHARDS * MOST_IN_PART) -> None:
        """Args:
        beside: a queue that never holds the same key. Keys move between the two by whole runs.
        most: keys; more only make the dicts larger. Ignored if there is a queue beside.
        """
        self._places: _Places = _Places(most) if beside is None else beside._places
        self._places.queues.append(self)
        self._runs: OrderedDict[int, dict[OffloadKey, V]] = OrderedDict()
        """Runs by number, oldest first. None is empty."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        try:
            return self._places.shards[key[SHARD_BYTE]].get(key) in self._runs  # type: ignore[index,call-overload]
        except NOT_A_KEY:
            return False

    def __iter__(self) -> Iterator[OffloadKey]:
        return chain.from_iterable(self._runs.values())

    def entries(self) -> Iterator[tuple[OffloadKey, V]]:
        """Return keys and values, oldest first; quicker than `items`."""
        return chain.from_iterable(map(dict.items, self._runs.values()))

    def _run_of(self, key: OffloadKey) -> dict[OffloadKey, V]:
        """Return the run that holds a key; an empty dict if it is not here."""
        try:
            return self._runs.get(self._places.shards[key[SHARD_BYTE]].get(key, 0), {})
        except NOT_A_KEY:
            return {}

    def __getitem__(self, key: OffloadKey) -> V:
        return self._run_of(key)[key]

    @overload
    def get(self, key: OffloadKey, /) -> V | None: ...
    @overload
    def get(self, key: OffloadKey, /, default: V | T) -> V | T: ...
    def get(self, key: OffloadKey, /, default: Any = None) -> Any:
        return self._run_of(key).get(key, default)

    def __setitem__(self, key: OffloadKey, value: V) -> None:
        """Change the value of a key where it stands, or append a new key."""
        run = self._run_of(key)
        if run:
            run[key] = value
        else:
            self.append((key,), value)

    def __delitem__(self, key: OffloadKey) -> None:
        if key not in self:
            raise KeyError(key)
        self.drop((key,))

    def clear(self) -> None:
        """Remove everything; without a look at each key, if no queue beside this one holds any."""
        shards = self._places.shards
        if not any(queue._size for queue in self._places.queues if queue is not self):
            self._places.clear()
            return
        for key in self:
            del shards[key[SHARD_BYTE]][key]
        self._runs.clear()
        self._size = 0

    # -- many keys at once --------------------------------------------------------------------------------

    def isdisjoint(self, keys: Collection[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        return are_disjoint((self,), keys)

    def held(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        runs = self._runs
        return list(compress(keys, map(runs.__contains__, self._places.get_all(keys)))) if runs else []

    def oldest(self, count: int) -> list[OffloadKey]:
        """Return up to `count` keys, oldest first; none if it is below 1."""
        return list(islice(self, count)) if count > 0 else []

    def append(self, keys: Sequence[OffloadKey], value: V) -> None:
        """Append `keys`, none of which is here or in a queue beside, and none of which comes twice, with one value."""
        self._enter(dict.fromkeys(keys, value))

    def _enter(self, keys: dict[OffloadKey, V]) -> None:
        """Put `keys`, which have no place yet, at the new end: in the last run if they and it are short."""
        if self._places.former:
            free_some(self._places.former)
        if not keys:
            return
        if len(keys) > LONGEST_RUN:
            entries = iter(keys.items())
            while part := dict(islice(entries, LONGEST_RUN)):
                self._enter(part)
            return
        number, runs, places = 0, self._runs, self._places
        if runs and len(keys) < SHORT_RUN:
            number = next(reversed(runs))
            last = runs[number]
            if len(last) < SHORT_RUN:
                last.update(keys)
            else:
                number = 0
        if not number:
            places.last = number = places.last + 1
            runs[number] = keys
        shards = places.shards
        for key in keys:
            shards[key[SHARD_BYTE]][key] = number
        self._size += len(keys)

    def renew(self, keys: Sequence[OffloadKey]) -> bool:
        """Move those of `keys` that are here to the new end, one after the other; return whether all are here."""
        return self.take(keys, self)

    def renew_all(self, keys: Sequence[OffloadKey], *beside: Any) -> None:
        """Move those of `keys` that are here or in queues `beside` to the new end of their own queue."""
        whole = self._whole_runs(keys, (self, *beside))
        if whole is None:
            for queue in (self, *beside):
                queue.renew(keys)
            return
        for queue, number, _ in whole:
            queue._runs.move_to_end(number)

    def _whole_runs(
        self, keys: Sequence[OffloadKey], sources: Sequence[Any]
    ) -> list[tuple[Any, int, dict[OffloadKey, V]]] | None:
        """Return the runs of `sources` that `keys` consist of, as (queue, number, run), or None.

        So it is with nearly all blocks of a request. To compare the keys of all runs at once takes half the time of a
        comparison per run.
        """
        shards, place, count = self._places.shards, 0, len(keys)
        found: dict[int, tuple[Any, int, dict[OffloadKey, V]]] = {}
        try:
            while place < count:
                key = keys[place]
                number = shards[key[SHARD_BYTE]].get(key, 0)
                for source in sources:
                    if number in source._runs:
                        break
                else:
                    return None
                run = source._runs[number]
                if number in found:  # keys come twice
                    return None
                found[number] = source, number, run
                place += len(run)
        except NOT_A_KEY:
            return None
        if place > count or keys != list(chain.from_iterable([run for _, _, run in found.values()])):
            return None
        return list(found.values())

    def take(self, keys: Sequence[OffloadKey], *sources: Any) -> bool:
        """Move those of `keys` that are in `sources` to the new end, one after the other.

        Args:
            sources: queues beside this one, or itself. Unless it is among them, no key comes twice.

        Returns:
            True if each key was in one of `sources`; False if one was not, or came twice.
        """
        whole = self._whole_runs(keys, sources)
        if whole is not None:
            for source, number, run in whole:
                source._pass_on(number, run, self)
            return True
        shards = self._places.shards
        place, count, found_all = 0, len(keys), True
        moving: dict[OffloadKey, V] = {}
        while place < count:
            key = keys[place]
            try:
                number = shards[key[SHARD_BYTE]].get(key, 0)
            except NOT_A_KEY:
                number = 0
            for source in sources:
                run = source._runs.get(number)
                if run is not None and key in run:
                    break
            else:
                found_all = False
                if key in moving:  # it comes twice
                    moving[key] = moving.pop(key)
                    place += 1
                else:
                    place += self._length_of_run(keys, place, number)
                continue
            end = place + len(run)
            if end <= count and keys[end - 1] == next(reversed(run)) and keys[place:end] == list(run):
                if moving:
                    self._enter(moving)  # perhaps into this very run
                    moving = {}
                if len(run) == end - place:
                    source._pass_on(number, run, self)
                    place = end
                continue
            former = place
            try:
                while True:
                    moving[key] = run.pop(key)
                    place += 1
                    key = keys[place]
            except (KeyError, IndexError):
                source._size -= place - former
                source._thin_out(number, run)
            if len(moving) >= LONGEST_RUN:
                self._enter(moving)
                moving = {}
        if moving:
            self._enter(moving)
        return found_all

    def _length_of_run(self, keys: Sequence[OffloadKey], place: int, number: int) -> int:
        """Return how many of `keys`, from `place` on, are the whole of one run in any queue; 1 if they are not."""
        for queue in self._places.queues:
            run = queue._runs.get(number)
            if run and keys[place] == next(iter(run)) and keys[place : place + len(run)] == list(run):
                return len(run)
        return 1

    def _pass_on(self, number: int, run: dict[OffloadKey, V], target: LongQueue[V]) -> None:
        """Move a whole run to the new end of another queue, or of this one."""
        if target is self:
            self._runs.move_to_end(number)
            return
        target._runs[number] = self._runs.pop(number)
        self._size -= len(run)
        target._size += len(run)

    def drop(self, keys: Sequence[OffloadKey]) -> None:
        """Remove `keys`, all of which are here.

        Raises:
            KeyError: one of them is not; those before it are removed.
        """
        shards, runs = self._places.shards, self._runs
        place, count = 0, len(keys)
        while place < count:
            former, key = place, keys[place]
            number = shards[key[SHARD_BYTE]][key]
            run = runs[number]
            place += len(run)
            if keys[former:place] == list(run):
                del runs[number]
            else:
                place = former
                try:
                    while True:
                        del run[keys[place]]
                        place += 1
                except (KeyError, IndexError):
                    self._thin_out(number, run)
            self._size -= place - former
            self._places.pop_all(keys[former:place])

    def discard(self, keys: Sequence[OffloadKey]) -> None:
        """Remove those of `keys` that are here."""
        self.drop(self.held(dict.fromkeys(keys)))

    def _thin_out(self, number: int, run: dict[OffloadKey, V]) -> None:
        """Remove a run that is empty, and give the memory back that keys have left in it."""
        if not run:
            del self._runs[number]
        elif getsizeof(run) > MOST_BYTES_PER_KEY * (len(run) + 1):
            self._runs[number] = dict(run)

    def check_invariants(self) -> None:
        """Raise InvariantError if runs and places of this queue and those beside contradict each other."""
        queues, parts = self._places.queues, self._places.parts
        runs = [(number, run) for queue in queues for number, run in queue._runs.items()]
        places = {key: number for part in parts for key, number in part.items()}
        if sum(map(len, parts)) != len(places) or len(dict(runs)) != len(runs):
            raise InvariantError("key queues: a key or a run is in two places")
        if places != {key: number for number, run in runs for key in run}:
            raise InvariantError("key queues: runs and places differ")
        if any(sum(map(len, queue._runs.values())) != queue._size for queue in queues):
            raise InvariantError("key queues: keys are miscounted")
        if not all(run and len(run) < LONGEST_RUN + SHORT_RUN for _, run in runs):
            raise InvariantError("key queues: a run is empty or too long")


class SmallQueue(OrderedDict[OffloadKey, V]):
    """An OrderedDict of keys with the methods of a `LongQueue`."""

    __slots__ = ()

    def entries(self) -> Iterator[tuple[OffloadKey, V]]:
        """Return keys and values, oldest first."""
        return iter(self.items())

    def isdisjoint(self, keys: Iterable[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        return self.keys().isdisjoint(keys)

    def held(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        return list(filter(self.__contains__, keys))

    def oldest(self, count: int) -> list[OffloadKey]:
        """Return up to `count` keys, oldest first; none if it is below 1."""
        return list(islice(self, count)) if count > 0 else []

    def append(self, keys: Sequence[OffloadKey], value: V) -> None:
        """Append `keys`, none of which is here, with one value."""
        for key in keys:  # takes half the time of OrderedDict.update
            self[key] = value

    def renew(self, keys: Sequence[OffloadKey]) -> bool:
        """Move those of `keys` that are here to the new end, one after the other; return whether all are here."""
        move = self.move_to_end
        # `map` runs in C and takes half the time of a loop. The deque of length 0 only consumes it.
        try:
            deque(map(move, keys), maxlen=0)
            return True
        except KeyError:  # some are not held; a check of each beforehand takes a third longer if all are held
            deque(map(move, filter(self.__contains__, keys)), maxlen=0)
            return False

    def renew_all(self, keys: Sequence[OffloadKey], *beside: Any) -> None:
        """Move those of `keys` that are here or in queues `beside` to the new end of their own queue."""
        if not self.renew(keys):
            for queue in beside:
                queue.renew(keys)

    def take(self, keys: Sequence[OffloadKey], *sources: Any) -> bool:
        """Move those of `keys` that are in `sources`, this queue perhaps among them, to the new end, one after the
        other.

        Returns:
            True if all keys were in one of `sources`; False if they were not, or in several.
        """
        rest = iter(keys)
        for source in sources:
            if keys and keys[0] in source:
                try:  # usually all keys are in one queue: nothing is asked twice
                    if source is self:
                        deque(map(self.move_to_end, keys), maxlen=0)
                    else:
                        for key in rest:
                            self[key] = source.pop(key)
                    return True
                except KeyError:
                    rest = iter(keys) if source is self else chain((key,), rest)
                    break
        for key in rest:
            for source in sources:
                if key in source:
                    self[key] = source.pop(key)
                    break
        return False

    def drop(self, keys: Iterable[OffloadKey]) -> None:
        """Remove `keys`, all of which are here.

        Raises:
            KeyError: one of them is not; those before it are removed.
        """
        for key in keys:
            del self[key]

    def discard(self, keys: Iterable[OffloadKey]) -> None:
        """Remove those of `keys` that are here."""
        if self:
            for key in keys:
                self.pop(key, None)

    def check_invariants(self) -> None:
        """Do nothing: an OrderedDict cannot contradict itself."""


KeyQueue = SmallQueue[V] | LongQueue[V]


def key_queues(count: int, most: int) -> list[Any]:
    """Return empty queues of which each has up to `most` entries, and no two the same key."""
    if most <= key_tables.MOST_IN_ONE:
        return [SmallQueue() for _ in range(count)]
    first: LongQueue[Any] = LongQueue(most=most)
    return [first, *(LongQueue(beside=first) for _ in range(count - 1))]


def are_disjoint(queues: Sequence[KeyQueue[Any]], keys: Collection[OffloadKey]) -> bool:
    """Return whether none of `keys` is in any of `queues`, which `key_queues` has returned together."""
    long = [queue for queue in queues if isinstance(queue, LongQueue)]
    if not long:
        return all(queue.isdisjoint(keys) for queue in queues)
    runs = [queue._runs.keys() for queue in long if queue._runs]
    if not runs:
        return True
    # Those of a few runs, and None. The places are shared, so keys are looked for once, however many the queues are.
    numbers = set(long[0]._places.get_all(keys))
    return all(held.isdisjoint(numbers) for held in runs)


def clear_queues(queues: Sequence[KeyQueue[Any]]) -> None:
    """Empty `queues`, which `key_queues` has returned together."""
    first = queues[0]
    if isinstance(first, LongQueue):
        first._places.clear()
        return
    for queue in queues:
        queue.clear()
