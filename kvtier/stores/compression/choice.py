"""Chooses whether to compress a block: always, or only while storing and loading it become faster by that."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from kvtier.stores.compression.codec import BlockCodec

_BLOCKS_PER_TRIAL = 64
"""While blocks are not compressed, one in so many is, to learn what it would bring."""
_KEPT = 0.95
"""Weight that a measurement keeps when the next one comes: about the last twenty count."""
_PATIENCE = 3
"""Once blocks are compressed, it ends only when it takes so many times as long as it saves. Threads that wait for a
processor leave the medium to others meanwhile: it seems faster than it is, and the processor slower."""


class CallCosts:
    """Seconds per byte of the latest calls, their latency included."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0

    def learn(self, num_bytes: int, seconds: float) -> None:
        """Note a call."""
        self._bytes = self._bytes * _KEPT + num_bytes
        self._seconds = self._seconds * _KEPT + seconds

    @property
    def seconds_per_byte(self) -> float | None:
        """Return what a byte takes; None before the first call."""
        return self._seconds / self._bytes if self._bytes else None


class Choice(ABC):
    """Decides about each block, and learns from what is measured. Threads share it."""

    @abstractmethod
    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        """Return what to store for a block: its compressed form in `room`, or the block itself."""

    def wrote(self, num_bytes: int, seconds: float) -> None:
        """Learn how long a call took that stored so many bytes."""
        return

    def read(self, num_bytes: int, seconds: float) -> None:
        """Learn how long a call took that read so many stored bytes."""
        return

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Know that a load runs."""
        yield


class Always(Choice):
    """Compresses every block."""

    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        return room[:length] if (length := codec.compress(payload, room)) else payload


class Measured(Choice):
    """Compresses only while the medium is slower than the processor, in both directions: the bytes that are saved would
    take longer than to compress them, and than to restore them, so that no load becomes slower.

    While a load runs, at most half of the processors compress.

    Attributes:
        compresses: whether blocks are compressed at the moment, other than to learn.
    """

    def __init__(self, num_processors: int | None = None) -> None:
        self.compresses = False
        self._lock = threading.Lock()
        self._writes, self._reads = CallCosts(), CallCosts()
        self._compression, self._expansion, self._share = _Mean(), _Mean(), _Mean()
        self._until_trial = 0
        self._num_loads = self._num_compressing = 0
        self._most_beside_loads = (num_processors or len(os.sched_getaffinity(0))) // 2

    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        with self._lock:
            self.compresses = self._is_faster()
            is_trial = not self.compresses
            if is_trial and self._until_trial:
                self._until_trial -= 1
                return payload
            if self._num_loads and self._num_compressing >= self._most_beside_loads:
                return payload
            self._until_trial = _BLOCKS_PER_TRIAL - 1
            self._num_compressing += 1
        try:
            if is_trial and (length := codec.compress(payload, room)):
                codec.try_expand(room[:length])  # what a thread does first takes longer, since it allocates memory
            started = time.perf_counter()
            length = codec.compress(payload, room)
            compressed = time.perf_counter()
            if is_trial and length:
                codec.try_expand(room[:length])
            expanded = time.perf_counter()
        finally:
            with self._lock:
                self._num_compressing -= 1
        self._learn(payload.nbytes, length, compressed - started, expanded - compressed if is_trial else 0.0)
        return room[:length] if length else payload

    def _is_faster(self) -> bool:
        """Return whether compressed blocks are stored and loaded faster than others, by all that is known."""
        write = self._writes.seconds_per_byte
        if write is None or self._share.value is None:
            return False
        read = self._reads.seconds_per_byte
        saved = self._share.value * (_PATIENCE if self.compresses else 1)
        compression, expansion = self._compression.value or 0.0, self._expansion.value or 0.0
        return saved * write > compression and saved * (write if read is None else read) > expansion

    def wrote(self, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            with self._lock:
                self._writes.learn(num_bytes, seconds)

    def read(self, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            with self._lock:
                self._reads.learn(num_bytes, seconds)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        with self._lock:
            self._num_loads += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_loads -= 1

    def _learn(self, block_bytes: int, length: int, compression: float, expansion: float) -> None:
        with self._lock:
            self._share.learn(1 - length / block_bytes if length else 0.0)
            self._compression.learn(compression / block_bytes)
            if expansion and length:
                self._expansion.learn(expansion / block_bytes)


class _Mean:
    """The mean of the latest values."""

    def __init__(self) -> None:
        self._weight = self._sum = 0.0

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None

    def learn(self, value: float) -> None:
        self._weight = self._weight * _KEPT + 1
        self._sum = self._sum * _KEPT + value
