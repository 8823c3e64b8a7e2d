"""An order of very many keys: a chain of runs. `key_queues.py` chooses where it is used, `key_tables.py` says why."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from itertools import chain, islice
from sys import getsizeof
from typing import Any, TypeVar, overload

import numpy as np

from kvtier.errors import InvariantError
from kvtier.key_tables import MOST_IN_PART, NUM_SHARDS, SHARD_BYTE, KeySlots, ShardedDict, free_some
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


def _take_runs(queues: Iterable[LongQueue[Any]]) -> list[dict[OffloadKey, Any]]:
    """Empty `queues`, and return their runs."""
    former: list[dict[OffloadKey, Any]] = []
    for queue in queues:
        former += queue._runs.values()
        queue._runs = OrderedDict()
        queue._size = 0
    return former


class KeyPlaces(ShardedDict[int]):
    """The number of each key's run, by key.

    Attributes:
        last: the last number that was given to a run of any of the queues.
        queues: those that share these places. No two of them hold the same key.
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
        self.former += _take_runs(self.queues)

    def enter(self, keys: Collection[OffloadKey], number: int) -> None:
        """Note the run of `keys`."""
        shards = self.shards
        for key in keys:
            shards[key[SHARD_BYTE]][key] = number


class SlotPlaces:
    """The number of each key's run, by the slot of the key, which another table knows.

    That table has just been asked for the same keys, so this takes half the time of a second table by key, and a tenth
    of its memory. A key that has left its run keeps its number as long as it has its slot, so the run decides whether
    it holds the key.

    Attributes:
        last, queues: as of `KeyPlaces`.
        former: what the last `clear` has removed. Each `append` frees some of it.
    """

    __slots__ = ("_numbers", "_slots", "_view", "former", "last", "queues")

    def __init__(self, slots: KeySlots, num_slots: int) -> None:
        self.last = 0
        self.queues: list[LongQueue[Any]] = []
        self.former: list[dict[OffloadKey, Any]] = []
        self._slots = slots
        self._numbers = array("q", bytes(8 * num_slots))
        self._view = np.frombuffer(self._numbers, np.int64)  # sets many at once; the array tells one in half the time

    def get(self, key: OffloadKey, default: int = 0) -> int:
        """Return the number of the only run that may hold a key."""
        slot = self._slots.of.get(key)
        return default if slot is None else self._numbers[slot]

    def get_all(self, keys: Collection[OffloadKey]) -> list[int]:
        """Return the numbers of the only runs that may hold `keys`, in order; 0 for keys without a slot."""
        return list(map(self.get, keys))

    def enter(self, keys: Collection[OffloadKey], number: int) -> None:
        """Note the run of `keys`."""
        slots, slot_of = self._slots.entering, self._slots.of
        if len(slots) != len(keys) or slot_of.get(next(iter(keys))) not in (slots[0], slots[-1]):
            slots = slot_of.values_of(keys)
        self._view[slots] = number

    def pop_all(self, keys: Collection[OffloadKey]) -> None:
        """Forget `keys`: nothing is to be done."""

    def clear(self) -> None:
        """Remove all keys of all queues. What is removed now is freed later, some of it by each `append`."""
        self.former = _take_runs(self.queues)


class LongQueue(MutableMapping[OffloadKey, V]):
    """An ordered dict of keys, from the oldest to the newest; iteration starts at the oldest.

    The order is a chain of runs: keys that entered together, like the blocks of a request. Requests use again what an
    earlier one has left, so most often whole runs move to the new end, and no key of them has to be looked up. A key
    that leaves its run enters the last one, or a new one with the keys that came with it.
    """

    __slots__ = ("_places", "_runs", "_size")

    def __init__(self, places: KeyPlaces | SlotPlaces | None = None) -> None:
        """Args: places: shared with queues that never hold the same key. Keys move between these by whole runs."""
        self._places = KeyPlaces(NUM_SHARDS * MOST_IN_PART) if places is None else places
        self._places.queues.append(self)
        self._runs: OrderedDict[int, dict[OffloadKey, V]] = OrderedDict()
        """Runs by number, oldest first. None is empty."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        return key in self._run_of(key)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[OffloadKey]:
        return chain.from_iterable(self._runs.values())

    def entries(self) -> Iterator[tuple[OffloadKey, V]]:
        """Return keys and values, oldest first; quicker than `items`."""
        return chain.from_iterable(map(dict.items, self._runs.values()))

    def _run_of(self, key: OffloadKey) -> dict[OffloadKey, V]:
        """Return the only run that may hold a key; an empty dict if none may."""
        return self._runs.get(self._places.get(key, 0), {})

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
        if key in run:
            run[key] = value
        else:
            self.append((key,), value)

    def __delitem__(self, key: OffloadKey) -> None:
        if key not in self:
            raise KeyError(key)
        self.drop((key,))

    def clear(self) -> None:
        """Remove everything; without a look at each key, if no queue beside this one holds any."""
        if not any(queue._size for queue in self._places.queues if queue is not self):
            self._places.clear()
            return
        self._places.pop_all(list(self))
        self._runs.clear()
        self._size = 0

    def clear_all(self) -> None:
        """Remove everything from this queue and from those beside it, without a look at each key."""
        self._places.clear()

    # -- many keys at once --------------------------------------------------------------------------------

    def isdisjoint(self, keys: Collection[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        return are_in_no_run((self,), keys)

    def held(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        runs = self._runs
        if not runs:
            return []
        return [
            key
            for key, number in zip(keys, self._places.get_all(keys), strict=True)
            if key in runs.get(number or 0, ())
        ]

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
        places.enter(keys, number)
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
        find, place, count = self._places.get, 0, len(keys)
        found: dict[int, tuple[Any, int, dict[OffloadKey, V]]] = {}
        while place < count:
            number = find(keys[place], 0)
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
        find = self._places.get
        place, count, found_all = 0, len(keys), True
        moving: dict[OffloadKey, V] = {}
        while place < count:
            key = keys[place]
            number = find(key, 0)
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
        find, runs = self._places.get, self._runs
        place, count = 0, len(keys)
        while place < count:
            former, key = place, keys[place]
            number = find(key, 0)
            run = runs.get(number, {})
            if key not in run:
                raise KeyError(key)
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
        queues, places = self._places.queues, self._places
        runs = [(number, run) for queue in queues for number, run in queue._runs.items()]
        number_of = {key: number for number, run in runs for key in run}
        if sum(len(run) for _, run in runs) != len(number_of) or len(dict(runs)) != len(runs):
            raise InvariantError("key queues: a key or a run is in two places")
        is_exact = isinstance(places, SlotPlaces) or len(places) == len(number_of)
        if not is_exact or places.get_all(number_of) != list(number_of.values()):
            raise InvariantError("key queues: runs and places differ")
        if any(sum(map(len, queue._runs.values())) != queue._size for queue in queues):
            raise InvariantError("key queues: keys are miscounted")
        if not all(run and len(run) < LONGEST_RUN + SHORT_RUN for _, run in runs):
            raise InvariantError("key queues: a run is empty or too long")


def are_in_no_run(queues: Sequence[LongQueue[Any]], keys: Collection[OffloadKey]) -> bool:
    """Return whether none of `keys` is in any of `queues`, which share their places."""
    runs = [queue._runs.keys() for queue in queues if queue._runs]
    if not runs:
        return True
    # Those of a few runs, and None. The places are shared, so keys are looked for once, however many the queues are.
    numbers = set(queues[0]._places.get_all(keys))
    if all(held.isdisjoint(numbers) for held in runs):
        return True
    return isinstance(queues[0]._places, SlotPlaces) and not any(queue.held(keys) for queue in queues)
