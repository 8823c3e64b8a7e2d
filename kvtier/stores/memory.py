"""A store in its process's memory. It is the reference for those who write stores."""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from kvtier.abc import BlockStore, StoreContext
from kvtier.errors import ConfigError
from kvtier.keys import MAX_KEY_BYTES, OffloadKey
from kvtier.options import StoreOptions, Threads, size_of
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.scratch import copy_bytes
from kvtier.types import KeyPage, StoreUsage


class MemoryOptions(StoreOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `memory`."""

    capacity: Annotated[int, size_of('most bytes of blocks, their keys and headers, for example "8GiB"')]
    threads: Threads = 4

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse a capacity that does not hold one block."""
        least = block_bytes + HEADER_BYTES + MAX_KEY_BYTES
        if self.capacity < least:
            raise ConfigError("capacity", self.capacity, f"at least {least} bytes, for one block of {block_bytes}")


class MemoryStore(BlockStore):
    """Keeps at most `capacity` bytes of keys and values in a dict, and evicts the least recently used.

    It refuses a value that is larger than the capacity. Its blocks are lost when the process ends.
    """

    def __init__(self, capacity: int) -> None:
        """Args: capacity: most bytes of keys and values together."""
        if capacity < 1:
            raise ConfigError("capacity", capacity, "a number of bytes, at least 1")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._values: OrderedDict[OffloadKey, bytes] = OrderedDict()
        self._used_bytes = 0
        self._kept_until: dict[OffloadKey, float] = {}
        """Until when `keep` keeps a value."""

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Make an empty store; options: `MemoryOptions`."""
        return cls(MemoryOptions.read(options).capacity)

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._used_bytes

    def snapshot(self) -> dict[OffloadKey, bytes]:
        """Return all keys and values, least recently used first, without counting this as a use."""
        with self._lock:
            return dict(self._values)

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Return, per key, whether a value is held."""
        with self._lock:
            return [key in self._values for key in keys]

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store copies of the buffers; False for a value larger than the whole capacity."""
        return [self._write_one(key, bytes(buffer)) for key, buffer in zip(keys, buffers, strict=True)]

    def read_into(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers; False for an absent value or one of another length."""
        return [self._read_one(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`."""
        with self._lock:
            for key in keys:
                self._forget(key)

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> list[bool]:
        """Make `keys` the most recently used, and evict others before them; they take half of the capacity at most."""
        until = time.monotonic() + seconds
        with self._lock:
            for key in keys:
                if key in self._values:
                    self._values.move_to_end(key)
                    self._kept_until[key] = until
            return [key in self._values for key in keys]

    def list_keys(self, cursor: bytes, most: int) -> KeyPage:
        """List the keys in their order."""
        with self._lock:
            keys = heapq.nsmallest(most, (key for key in self._values if key > cursor))
        return KeyPage(keys, keys[-1] if len(keys) == most else None)

    def usage(self) -> StoreUsage:
        """Return what is held, keys included."""
        return StoreUsage(len(self._values), self._used_bytes, self.capacity)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._kept_until.clear()
            self._used_bytes = 0

    def _write_one(self, key: OffloadKey, value: bytes) -> bool:
        with self._lock:
            self._forget(key)
            size = len(key) + len(value)
            if size > self.capacity:
                return False
            while self._used_bytes + size > self.capacity:
                self._forget(self._victim())
            self._values[key] = value
            self._used_bytes += size
            return True

    def _read_one(self, key: OffloadKey, buffer: memoryview) -> bool:
        with self._lock:
            value = self._values.get(key)
            if value is None or len(value) != buffer.nbytes:
                return False
            self._values.move_to_end(key)
        copy_bytes(buffer, memoryview(value))
        return True

    def _victim(self) -> OffloadKey:
        """Return the least recently used key that is not kept; the very oldest if half of the capacity is kept."""
        oldest, now, kept_bytes = next(iter(self._values)), time.monotonic(), 0
        for key, value in self._values.items() if self._kept_until else ():
            if self._kept_until.get(key, 0.0) <= now:
                self._kept_until.pop(key, None)
                return key
            kept_bytes += len(key) + len(value)
            if kept_bytes > self.capacity // 2:
                break
        return oldest

    def _forget(self, key: OffloadKey) -> None:
        self._kept_until.pop(key, None)
        value = self._values.pop(key, None)
        if value is not None:
            self._used_bytes -= len(key) + len(value)
