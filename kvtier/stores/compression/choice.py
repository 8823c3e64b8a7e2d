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
_LEAST_SPREAD = 0.001
"""Variance of the lengths, as a share of their mean's square, from which they tell latency and bandwidth apart."""


class CallCosts:
    """How long a medium takes for one more byte, measured: a line through calls of different lengths, the newest ones
    counting most. Its height is what a call takes without a byte, which compression does not save.
    """

    def __init__(self) -> None:
        self._weight = self._bytes = self._seconds = self._squares = self._products = 0.0

    def learn(self, num_bytes: int, seconds: float) -> None:
        """Note a call."""
        self._weight = self._weight * _KEPT + 1
        self._bytes = self._bytes * _KEPT + num_bytes
        self._seconds = self._seconds * _KEPT + seconds
        self._squares = self._squares * _KEPT + num_bytes * num_bytes
        self._products = self._products * _KEPT + num_bytes * seconds

    @property
    def seconds_per_byte(self) -> float | None:
        """Return the slope of the line; None before the first call."""
        if not self._bytes:
            return None
        whole = self._seconds / self._bytes
        spread = self._weight * self._squares - self._bytes * self._bytes
        if spread < _LEAST_SPREAD * self._bytes * self._bytes:
            return whole
        slope = (self._weight * self._products - self._bytes * self._seconds) / spread
        return min(max(slope, 0.0), whole)


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
    """

    def __init__(self, num_processors: int | None = None) -> None:
        self._lock = threading.Lock()
        self._writes, self._reads = CallCosts(), CallCosts()
        self._compression, self._expansion, self._share = _Mean(), _Mean(), _Mean()
        self._until_trial = 0
        self._num_loads = self._num_compressing = 0
        self._most_beside_loads = (num_processors or len(os.sched_getaffinity(0))) // 2

    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        with self._lock:
            is_trial = not self.is_faster
            if is_trial and self._until_trial:
                self._until_trial -= 1
                return payload
            if self._num_loads and self._num_compressing >= self._most_beside_loads:
                return payload
            self._until_trial = _BLOCKS_PER_TRIAL - 1
            self._num_compressing += 1
        try:
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

    @property
    def is_faster(self) -> bool:
        """Whether compressed blocks are stored and loaded faster than others, by all that is known."""
        write = self._writes.seconds_per_byte
        if write is None or self._share.value is None:
            return False
        read = self._reads.seconds_per_byte
        saved, compression, expansion = self._share.value, self._compression.value or 0.0, self._expansion.value or 0.0
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
    """A mean in which the newest values count most."""

    def __init__(self) -> None:
        self.value: float | None = None

    def learn(self, value: float) -> None:
        self.value = value if self.value is None else self.value + (value - self.value) * (1 - _KEPT)
