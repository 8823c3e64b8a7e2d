"""Tables with one entry per block that grow and churn without a pause.

A dict of a million keys is built anew whenever its memory is used up: by growth, and again and again by deletions and
insertions at a constant size. That takes tens of milliseconds, in an `OrderedDict` more than a hundred. So tables
that may become large are other ones: `ShardedDict` spreads its keys over several dicts, and `LongQueue`
(`long_queue.py`) keeps an order as a chain of short dicts. Small tables are a dict and an OrderedDict, which take less
time per key. `key_dict` and `key_queues` choose.

A large table does not fit into the processor's caches, so most of a call is waiting for memory. Methods for many keys
therefore find the dicts of all keys first, in a pass of their own. The second pass is a loop in C wherever it can be:
it has so few instructions per key that the processor fetches the next keys while it waits for one.

Large tables of plain values hold nothing that Python's garbage collector visits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from itertools import chain, compress, filterfalse
from operator import not_
from typing import Any, TypeVar, overload

from kvtier.keys import GROUP_BYTES, OffloadKey

V = TypeVar("V")
T = TypeVar("T")

MOST_IN_ONE = 65_536
"""Most entries for which one dict, and one OrderedDict, is built anew quickly enough: in some milliseconds."""

SHARD_BYTE = -1 - GROUP_BYTES
"""Which byte of a key chooses its shard: the last one of the block hash. Block hashes spread evenly over its values."""

NUM_SHARDS = 256

MOST_IN_PART = 16_384
"""Most entries of each dict of a table of up to four million. Several of them are often built anew in one call, since
they grow alike. With fewer entries in more dicts, looking into each of those takes longer than finding the key."""

NOT_A_KEY = (IndexError, TypeError)
"""What is raised when the shard of something too short or without bytes is asked for."""


MOST_FREED = 4096
"""Entries of a cleared table that a later call frees. To free a million at once takes tens of milliseconds."""


def free_some(former: list[dict[OffloadKey, Any]]) -> None:
    """Free some of the dicts that a table had before it was cleared."""
    left = MOST_FREED
    while former and left > 0:
        left -= len(former.pop())


class SmallDict(dict[OffloadKey, V]):
    """A dict of keys with the methods of a `ShardedDict`."""

    __slots__ = ()
    shards = None

    @property
    def parts(self) -> Sequence[dict[OffloadKey, V]]:
        """The dicts that hold the keys: this one."""
        return (self,)

    def get_all(self, keys: Collection[OffloadKey]) -> list[V | None]:
        """Return the value of each key, in order; None for keys that are not here."""
        return list(map(self.get, keys))

    def values_of(self, keys: Iterable[OffloadKey]) -> list[V]:
        """Return the value of each key, in order; all are here."""
        return list(map(self.__getitem__, keys))

    def isdisjoint(self, keys: Collection[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        return self.keys().isdisjoint(keys)

    def held(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        return list(filter(self.__contains__, keys))

    def missing(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are not here, in their order."""
        return list(filterfalse(self.__contains__, keys))

    def set_all(self, keys: Iterable[OffloadKey], values: Iterable[V]) -> None:
        """Enter `keys` with their `values`, of which there are as many."""
        self.update(zip(keys, values, strict=True))

    def pop_all(self, keys: Iterable[OffloadKey]) -> list[V]:
        """Remove `keys`, all of which are here, and return their values in order."""
        return list(map(self.pop, keys))

    def every_value(self) -> Iterator[V]:
        """Return the values in the order in which the keys are iterated."""
        return iter(self.values())


class ShardedDict(MutableMapping[OffloadKey, V]):
    """A dict of keys, without order.

    What `make_offload_key` does not make is not here, as it is not in a dict of keys.

    Attributes:
        shards: the dict for each value of a key's byte `SHARD_BYTE`; the same one for several values, unless the table
            is very large. Others may read it.
        former: what the last `clear` has removed. Each `set_all` frees some of it.
    """

    __slots__ = ("_num_parts", "former", "shards")

    def __init__(self, most: int = NUM_SHARDS * MOST_IN_PART) -> None:
        """Args: most: entries; more only make the dicts larger."""
        self._num_parts = min(NUM_SHARDS, 1 << (most // MOST_IN_PART).bit_length())
        self.shards: list[dict[OffloadKey, V]] = self._empty()
        self.former: list[dict[OffloadKey, Any]] = []

    def _empty(self) -> list[dict[OffloadKey, V]]:
        parts: list[dict[OffloadKey, V]] = [{} for _ in range(self._num_parts)]
        return parts * (NUM_SHARDS // self._num_parts)

    @property
    def parts(self) -> Sequence[dict[OffloadKey, V]]:
        """The dicts that hold the keys, each of them once."""
        return self.shards[: self._num_parts]

    def __getitem__(self, key: OffloadKey) -> V:
        return self.shards[key[SHARD_BYTE]][key]

    @overload
    def get(self, key: OffloadKey, /) -> V | None: ...
    @overload
    def get(self, key: OffloadKey, /, default: V | T) -> V | T: ...
    def get(self, key: OffloadKey, /, default: Any = None) -> Any:
        try:
            return self.shards[key[SHARD_BYTE]].get(key, default)
        except NOT_A_KEY:
            return default

    def __contains__(self, key: object) -> bool:
        try:
            return key in self.shards[key[SHARD_BYTE]]  # type: ignore[index]
        except NOT_A_KEY:
            return False

    def __setitem__(self, key: OffloadKey, value: V) -> None:
        self.shards[key[SHARD_BYTE]][key] = value

    def __delitem__(self, key: OffloadKey) -> None:
        del self.shards[key[SHARD_BYTE]][key]

    def __len__(self) -> int:
        """Return the number of keys, which takes some microseconds in a very large table."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[OffloadKey]:
        return chain.from_iterable(self.parts)

    def every_value(self) -> Iterator[V]:
        """Return the values in the order in which the keys are iterated; quicker than `values`."""
        return chain.from_iterable(map(dict.values, self.parts))

    def clear(self) -> None:
        """Remove everything. What is removed now is freed later."""
        self.former = list(filter(None, self.parts))
        self.shards[:] = self._empty()

    # -- many keys at once: a call per key would take as long as the rest ------------------------------------

    def _shards_of(self, keys: Iterable[OffloadKey]) -> list[dict[OffloadKey, V]]:
        """Return the dict of each key, in order."""
        shards = self.shards
        return [shards[key[SHARD_BYTE]] for key in keys]

    def get_all(self, keys: Collection[OffloadKey]) -> list[V | None]:
        """Return the value of each key, in order; None for keys that are not here."""
        try:
            return list(map(dict.get, self._shards_of(keys), keys))
        except NOT_A_KEY:
            return list(map(self.get, keys))

    def values_of(self, keys: Iterable[OffloadKey]) -> list[V]:
        """Return the value of each key, in order; all are here."""
        shards = self.shards
        return [shards[key[SHARD_BYTE]][key] for key in keys]

    def isdisjoint(self, keys: Collection[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        if next(iter(keys), None) in self:  # most often all are here, or none
            return False
        try:
            return True not in map(dict.__contains__, self._shards_of(keys), keys)
        except NOT_A_KEY:
            return True not in map(self.__contains__, keys)

    def held(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        try:
            return list(compress(keys, map(dict.__contains__, self._shards_of(keys), keys)))
        except NOT_A_KEY:
            return list(filter(self.__contains__, keys))

    def missing(self, keys: Collection[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are not here, in their order."""
        try:
            return list(compress(keys, map(not_, map(dict.__contains__, self._shards_of(keys), keys))))
        except NOT_A_KEY:
            return list(filterfalse(self.__contains__, keys))

    def set_all(self, keys: Iterable[OffloadKey], values: Iterable[V]) -> None:
        """Enter `keys` with their `values`, of which there are as many."""
        if self.former:
            free_some(self.former)
        shards = self.shards
        for key, value in zip(keys, values, strict=True):
            shards[key[SHARD_BYTE]][key] = value

    def pop_all(self, keys: Collection[OffloadKey]) -> list[V]:
        """Remove `keys`, all of which are here, and return their values in order."""
        return list(map(dict.pop, self._shards_of(keys), keys))


KeyDict = SmallDict[V] | ShardedDict[V]


def key_dict(most: int) -> KeyDict[Any]:
    """Return an empty table for up to `most` entries."""
    return SmallDict() if most <= MOST_IN_ONE else ShardedDict(most)


class KeySlots:
    """The slots of a table, as others may read them; no two keys have the same.

    Attributes:
        of: the slot of every key of the table.
        entering: the slots of the keys that the table tells its policy to insert, in the order of these, during that
            call; else, and also during the call if they are not at hand, empty.
    """

    __slots__ = ("entering", "of")

    def __init__(self, of: KeyDict[int]) -> None:
        self.of, self.entering = of, list[int]()
