"""The names of packs, and of the objects that delete blocks. The package's docstring says why names are the index."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import secrets
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from kvtier.keys import OffloadKey

LAYOUT = "v1"
MAX_BLOCKS = 64
"""Most blocks per pack: their digests take 683 of the 1,024 bytes of a name."""
MAX_PREFIX_BYTES = 200
_SEGMENT = 200
"""Most characters between two slashes: some servers store each part of a name as a file name."""
_STAMP = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}-[0-9a-f]{6}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_TAKEN_BACK = "x"


def digest_of(key: OffloadKey) -> int:
    """Return the 64-bit digest of a key. If two keys have the same one, the header makes the other a miss."""
    return xxhash.xxh3_64_intdigest(key)


@dataclass(frozen=True, slots=True)
class PackName:
    """The parts of a pack's name.

    Attributes:
        stamp: time, writer and a number; stamps sort by time.
        fingerprint: of the namespace, hexadecimal.
        digests: of the keys, in the order of the values.
    """

    stamp: str
    fingerprint: str
    digests: tuple[int, ...]

    def path(self, root: str) -> str:
        """Return the object's name below `root`."""
        packed = base64.urlsafe_b64encode(struct.pack(f"<{len(self.digests)}Q", *self.digests)).decode().rstrip("=")
        parts = [packed[start : start + _SEGMENT] for start in range(0, len(packed), _SEGMENT)]
        return "/".join((root, self.stamp, self.fingerprint, *parts))


@dataclass(frozen=True, slots=True)
class TakenBack:
    """The name of an object that deletes blocks of a pack.

    Attributes:
        stamp, fingerprint: as in `PackName`.
        target: stamp of the pack.
        places: bit mask of the deleted values: bit i for the value at place i.
    """

    stamp: str
    fingerprint: str
    target: str
    places: int

    def path(self, root: str) -> str:
        """Return the object's name below `root`."""
        return "/".join((root, self.stamp, self.fingerprint, _TAKEN_BACK, self.target, f"{self.places:016x}"))


def parse(path: str, root: str) -> PackName | TakenBack | None:
    """Return the parts of an object's name; None if the name is not kvtier's."""
    if not path.startswith(root + "/"):
        return None
    stamp, _, rest = path[len(root) + 1 :].partition("/")
    fingerprint, _, rest = rest.partition("/")
    if not (_STAMP.fullmatch(stamp) and _FINGERPRINT.fullmatch(fingerprint)):
        return None
    parts = rest.split("/")
    if parts[0] == _TAKEN_BACK:
        if len(parts) != 3 or not _STAMP.fullmatch(parts[1]) or not re.fullmatch(r"[0-9a-f]{16}", parts[2]):
            return None
        return TakenBack(stamp, fingerprint, parts[1], int(parts[2], 16))
    packed = "".join(parts)
    try:
        raw = base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    if not raw or len(raw) % 8 or len(raw) > 8 * MAX_BLOCKS:
        return None
    return PackName(stamp, fingerprint, struct.unpack(f"<{len(raw) // 8}Q", raw))


def stamp_at(seconds: float) -> str:
    """Return a lower bound of the stamps from a time on (`time.time`)."""
    return f"{max(0, int(seconds * 1000)):012x}"


def writer_of(stamp: str) -> str:
    """Return the writer's part of a stamp."""
    return stamp[13:21]


class Stamps:
    """Makes ascending stamps, even if the system's clock is set back. Threads may share it."""

    def __init__(self) -> None:
        self.writer = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._last = 0

    def make(self) -> str:
        with self._lock:
            self._last = max(self._last, int(time.time() * 1000))
            return f"{self._last:012x}-{self.writer}-{next(self._numbers) % 16**6:06x}"


def split(count: int, most: int) -> list[range]:
    """Return ranges of at most `most` indexes that together cover 0 to `count`."""
    step = max(1, most)
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def places_of(places: Sequence[int]) -> int:
    """Return the bit mask of `places`."""
    return sum(1 << place for place in set(places))
