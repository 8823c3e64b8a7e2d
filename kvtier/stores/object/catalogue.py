"""The index in memory: the known packs, the place of each block, and the bytes of all packs."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvtier.errors import InvariantError
from kvtier.stores.object.names import PackName, TakenBack, parse, places_of, writer_of

_MAX_GONE = 100_000


class Pack:
    """An object of kvtier's; it holds the values of several digests.

    Attributes:
        path: its name.
        size: in bytes.
        stamp: orders packs by time.
        dead: bit mask of the values that were deleted or replaced.
    """

    __slots__ = ("dead", "path", "size", "stamp")

    def __init__(self, path: str, size: int, stamp: str) -> None:
        self.path, self.size, self.stamp = path, size, stamp
        self.dead = 0


class Place:
    """The place of a block.

    Attributes:
        pack: the object.
        place: index of the value in the pack.
        value_bytes: length of each value of the pack.
    """

    __slots__ = ("pack", "place", "value_bytes")

    def __init__(self, pack: Pack, place: int, value_bytes: int) -> None:
        self.pack, self.place, self.value_bytes = pack, place, value_bytes


class Catalogue:
    """Packs by stamp, blocks of one namespace by digest. Threads share it."""

    def __init__(self, root: str, fingerprint: str, value_bytes: int, least_bytes: int | None = None) -> None:
        """Args:
        root: prefix of all names.
        value_bytes: length of each value of this namespace.
        least_bytes: shortest values, if those of a pack may all be shorter by the same number of bytes.
        """
        self._root = root
        self._fingerprint = fingerprint
        self._lengths = range(value_bytes if least_bytes is None else least_bytes, value_bytes + 1)
        self._lock = threading.Lock()
        self._packs: dict[str, Pack] = {}
        self._pack_of: dict[int, Pack] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Stamps of deleted packs. A listing that began before their deletion must not add them again."""
        self._kept_until: dict[str, float] = {}
        """By stamp, until when `keep` keeps a pack; the latest calls come last."""
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._pack_of)

    @property
    def num_packs(self) -> int:
        """Number of objects, of all namespaces."""
        return len(self._packs)

    def holds(self, digests: Iterable[int]) -> list[bool]:
        """Return, per digest, whether a block is known."""
        pack_of = self._pack_of
        return [digest in pack_of for digest in digests]

    def find(self, digest: int) -> Place | None:
        """Return the place of a block; None if it is unknown."""
        pack = self._pack_of.get(digest)
        if pack is None:
            return None
        digests = self._digests(pack)
        return Place(pack, digests.index(digest), pack.size // len(digests))

    def value_bytes_of(self, pack: Pack) -> int:
        """Return the length of each value of a pack."""
        return pack.size // max(1, len(self._digests(pack)))

    def add(self, path: str, size: int) -> str | None:
        """Add an object, once or again, in any order; return its stamp, None if its name is not kvtier's."""
        name = parse(path, self._root)
        if name is None:
            return None
        with self._lock:
            if name.stamp not in self._packs and name.stamp not in self._gone:
                self._packs[name.stamp] = pack = Pack(path, size, name.stamp)
                self.total_bytes += size
                if name.fingerprint == self._fingerprint:
                    self._index(name, pack)
        return name.stamp

    def forget(self, stamps: Iterable[str]) -> None:
        """Remove objects that were deleted."""
        with self._lock:
            for stamp in stamps:
                self._gone[stamp] = None
                pack = self._packs.pop(stamp, None)
                self._kept_until.pop(stamp, None)
                if pack is not None:
                    self.total_bytes -= pack.size
                    for digest in self._digests(pack):
                        if self._pack_of.get(digest) is pack:
                            del self._pack_of[digest]
            while len(self._gone) > _MAX_GONE:
                self._gone.popitem(last=False)

    def take_back(self, digests: Iterable[int]) -> list[tuple[Pack, int, bool]]:
        """Remove blocks; return per pack a bit mask of their places, and whether the pack has no other blocks."""
        places: dict[str, list[int]] = {}
        with self._lock:
            for digest in digests:
                pack = self._pack_of.pop(digest, None)
                if pack is not None:
                    places.setdefault(pack.stamp, []).append(self._digests(pack).index(digest))
            taken = []
            for stamp, those in places.items():
                pack = self._packs[stamp]
                bits = places_of(those)
                pack.dead |= bits
                taken.append((pack, bits, pack.dead == (1 << len(self._digests(pack))) - 1))
            return taken

    def keep(self, digests: Iterable[int], until: float, now: float, since: str = "") -> list[bool]:
        """Spare the packs of blocks in `oldest` until a time; return, per digest, whether a block is known.

        Args:
            now, until: seconds of a monotonic clock.
            since: packs with earlier stamps are not spared.
        """
        with self._lock:
            packs = [self._pack_of.get(digest) for digest in digests]
            for pack in reversed(packs):  # a prompt's head last, which is worth more than its tail
                if pack is not None and pack.stamp >= since:
                    self._spare(pack.stamp, until)
            for stamp in list(itertools.takewhile(lambda one: self._kept_until[one] <= now, self._kept_until)):
                del self._kept_until[stamp]
        return [pack is not None for pack in packs]

    def _spare(self, stamp: str, until: float) -> None:
        self._kept_until[stamp] = max(until, self._kept_until.pop(stamp, 0.0))

    def oldest(self, until_bytes: int, before: str = "", now: float = math.inf) -> list[Pack]:
        """Return the packs to delete: those with stamps below `before`, and the oldest until `until_bytes` are left.

        Args:
            now: packs that are kept beyond this time stay, if they take half of `until_bytes` at most; else those that
                were kept last.
        """
        with self._lock:
            spared = self._spared(until_bytes // 2, now)
            candidates = [stamp for stamp in self._packs if stamp not in spared and stamp < before] if before else []
            left = self.total_bytes - sum(self._packs[stamp].size for stamp in candidates)
            if left > until_bytes:
                candidates, left = [stamp for stamp in self._packs if stamp not in spared], self.total_bytes
            victims = []
            for stamp in sorted(candidates):
                if left <= until_bytes and stamp >= before:
                    break
                victims.append(self._packs[stamp])
                left -= self._packs[stamp].size
            return victims

    def _spared(self, most_bytes: int, now: float) -> set[str]:
        spared: set[str] = set()
        for stamp, until in reversed(self._kept_until.items()):
            if until > now and stamp in self._packs:
                most_bytes -= self._packs[stamp].size
                if most_bytes < 0:
                    break
                spared.add(stamp)
        return spared

    def after(self, stamp: str, most: int) -> list[tuple[Pack, list[int]]]:
        """Return the next `most` objects with later stamps, in order, each with the places of this namespace's blocks.

        Fewer only if no more follow. An object may have no such blocks.
        """
        with self._lock:
            later = heapq.nsmallest(most, (one for one in self._packs if one > stamp))
            return [(self._packs[one], self._places(self._packs[one])) for one in later]

    def _places(self, pack: Pack) -> list[int]:
        return [place for place, digest in enumerate(self._digests(pack)) if self._pack_of.get(digest) is pack]

    def stamps(self, since: str = "", before: str = "~") -> list[str]:
        """Return the stamps of known objects that are at least `since` and below `before`."""
        with self._lock:
            return [stamp for stamp in self._packs if since <= stamp < before]

    def writers(self, since: str) -> set[str]:
        """Return the writers of the objects with stamps from `since` on."""
        return {writer_of(stamp) for stamp in self.stamps(since)}

    def check_invariants(self) -> None:
        """Raise InvariantError if sizes, packs and blocks contradict each other."""
        with self._lock:
            if self.total_bytes != sum(pack.size for pack in self._packs.values()):
                raise InvariantError(f"total_bytes is {self.total_bytes}, which is not the sum of the packs")
            for digest, pack in self._pack_of.items():
                if self._packs.get(pack.stamp) is not pack or digest not in self._digests(pack):
                    raise InvariantError("a block's pack is unknown, or its name does not contain the block")

    def _index(self, name: PackName | TakenBack, pack: Pack) -> None:
        if isinstance(name, TakenBack):
            target = self._packs.get(name.target)
            if target is not None:
                target.dead |= name.places
                for place, digest in enumerate(self._digests(target)):
                    if name.places >> place & 1 and self._pack_of.get(digest) is target:
                        del self._pack_of[digest]
            return
        length, rest = divmod(pack.size, len(name.digests))
        if rest or length not in self._lengths:
            return  # its size contradicts its name: the bytes count, and it is deleted when it is the oldest
        for place, digest in enumerate(name.digests):
            former = self._pack_of.get(digest)
            if former is None or former.stamp < pack.stamp:
                if former is not None:
                    former.dead |= 1 << self._digests(former).index(digest)
                    if until := self._kept_until.get(former.stamp):
                        self._spare(pack.stamp, until)
                self._pack_of[digest] = pack
            elif former is not pack:
                pack.dead |= 1 << place

    def _digests(self, pack: Pack) -> Sequence[int]:
        name = parse(pack.path, self._root)
        return name.digests if isinstance(name, PackName) else ()
