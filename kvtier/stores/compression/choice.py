"""Chooses whether to compress a block: always, or only while storing becomes faster by that, and loading not slower."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum

from kvtier.stores.compression.codec import BlockCodec
from kvtier.stores.compression.pace import Mean, Pace

_FEWEST_TRIALS = 3
"""Trials before it is known what compression brings. They follow each other at once."""
_SECONDS_PER_TRIAL_SECOND = 100
"""While blocks are not compressed, trials take at most one part in so many of the time in which blocks are written."""
_GAIN_TO_BEGIN, _GAIN_TO_END = 1.1, 1.0
"""Times as fast as without compression."""
_CALLS_PER_LOOK = 4096
"""After so many calls that compress, some do not: a medium seems slower than it is beside busy processors. A look takes
as many calls as a pace needs, so it costs less than one part in a hundred, whatever the number of blocks per call."""


@dataclass(slots=True)
class Moved:
    """What a call has moved, to be filled in by its caller."""

    num_bytes: int = 0


class Choice(ABC):
    """Decides about each block, and learns from what is measured. Threads share it."""

    @abstractmethod
    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        """Return what to store for a block: its compressed form in `room`, or the block itself."""

    def storing(self) -> AbstractContextManager[None]:
        """Know that blocks are compressed, where that is chosen, and written."""
        return nullcontext()

    def loading(self) -> AbstractContextManager[None]:
        """Know that blocks are read and expanded."""
        return nullcontext()

    def writing(self) -> AbstractContextManager[Moved]:
        """Learn how long a call takes that writes so many bytes."""
        return nullcontext(Moved())

    def reading(self) -> AbstractContextManager[Moved]:
        """Learn how long a call takes that reads so many stored bytes."""
        return nullcontext(Moved())

    def expanding(self) -> AbstractContextManager[Moved]:
        """Learn how long it takes to restore blocks of so many bytes."""
        return nullcontext(Moved())


class Always(Choice):
    """Compresses every block."""

    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        return room[:length] if (length := codec.compress(payload, room)) else payload


class _Form(Enum):
    PLAIN = "plain"
    COMPRESSED = "compressed"
    TRIAL = "trial"
    """Compressed, and expanded again, to learn how long both take."""


class Measured(Choice):
    """Compresses only while the medium is slower than the processors, by what is measured of both.

    Several calls at once compress some blocks while others are written, so they take as long as the slower of the two;
    a single call takes as long as both together. The same is true of loads, which must not become slower.

    While a load runs, at most half of the processors compress.

    Attributes:
        compresses: whether blocks are compressed at the moment, other than to learn.
    """

    def __init__(self, num_processors: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: clock: seconds."""
        self.compresses = False
        self._clock = clock
        self._lock = threading.Lock()
        self._writes, self._reads = Pace(clock), Pace(clock)
        self._compression, self._expansion = Pace(clock, _FEWEST_TRIALS), Pace(clock, _FEWEST_TRIALS)
        self._share, self._stores_at_once, self._loads_at_once = Mean(), Mean(), Mean()
        self._num_loads = self._num_stores = self._num_compressing = 0
        self._most_beside_loads = (num_processors or len(os.sched_getaffinity(0))) // 2
        self._is_trying = False
        self._num_trials = 0
        self._next_trial_at = 0.0
        self._until_look = 0

    def shrink(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> memoryview:
        with self._lock:
            form = self._choose()
            if form is _Form.PLAIN:
                return payload
            self._num_compressing += 1
            self._is_trying = self._is_trying or form is _Form.TRIAL
        started = self._clock()
        try:
            length = self._try(codec, payload, room) if form is _Form.TRIAL else self._compress(codec, payload, room)
        finally:
            with self._lock:
                self._num_compressing -= 1
                if form is _Form.TRIAL:
                    self._end_trial(self._clock() - started)
        return room[:length] if length else payload

    def _choose(self) -> _Form:
        if self._num_loads and self._num_compressing >= self._most_beside_loads:
            return _Form.PLAIN
        gain = self._gain()
        if not self.compresses:
            self.compresses, self._until_look = gain > _GAIN_TO_BEGIN, _CALLS_PER_LOOK
        elif gain <= _GAIN_TO_END:
            self.compresses = False
        elif self._until_look <= 0:
            self._writes.forget()
            self.compresses = False
        if self.compresses:
            return _Form.COMPRESSED
        is_due = self._num_trials < _FEWEST_TRIALS or self._writes.busy_seconds >= self._next_trial_at
        return _Form.TRIAL if is_due and not self._is_trying else _Form.PLAIN

    def _gain(self) -> float:
        """Return how many times as fast compressed blocks are stored, by all that is known; 0 if too little is known,
        or if loads would take longer.
        """
        write, compression = self._writes.seconds_per_byte, self._compression.seconds_per_byte
        if write is None or compression is None:
            return 0.0
        share, read = self._share.value or 0.0, self._reads.seconds_per_byte
        expansion = self._expansion.seconds_per_byte or 0.0
        if _times_as_fast(write if read is None else read, share, expansion, self._loads_at_once) < 1:
            return 0.0
        return _times_as_fast(write, share, compression, self._stores_at_once)

    def _try(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> int:
        if length := codec.compress(payload, room):
            codec.try_expand(room[:length])  # what a thread does first takes longer, since it allocates memory
        length = self._compress(codec, payload, room)
        if length:
            with self.expanding() as moved:
                codec.try_expand(room[:length])
                moved.num_bytes = payload.nbytes
        return length

    def _compress(self, codec: BlockCodec, payload: memoryview, room: memoryview) -> int:
        with self._timing(self._compression) as moved:
            length = codec.compress(payload, room)
            moved.num_bytes = payload.nbytes
        with self._lock:
            self._share.learn(1 - length / payload.nbytes if length else 0.0)
        return length

    def _end_trial(self, seconds: float) -> None:
        self._is_trying = False
        self._num_trials += 1
        self._next_trial_at = self._writes.busy_seconds + _SECONDS_PER_TRIAL_SECOND * seconds

    @contextmanager
    def storing(self) -> Iterator[None]:
        with self._lock:
            self._num_stores += 1
            self._until_look -= 1
            self._stores_at_once.learn(self._num_stores)
        try:
            yield
        finally:
            with self._lock:
                self._num_stores -= 1

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self._lock:
            self._num_loads += 1
            self._loads_at_once.learn(self._num_loads)
        try:
            yield
        finally:
            with self._lock:
                self._num_loads -= 1

    def writing(self) -> AbstractContextManager[Moved]:
        return self._timing(self._writes)

    def reading(self) -> AbstractContextManager[Moved]:
        return self._timing(self._reads)

    def expanding(self) -> AbstractContextManager[Moved]:
        return self._timing(self._expansion)

    @contextmanager
    def _timing(self, pace: Pace) -> Iterator[Moved]:
        moved = Moved()
        with self._lock:
            pace.begin()
        try:
            yield moved
        finally:
            with self._lock:
                pace.end(moved.num_bytes)


def _times_as_fast(medium: float, share: float, processors: float, at_once: Mean) -> float:
    """Return how many times as fast blocks move if the medium moves less by `share` of them.

    Args:
        medium, processors: seconds per byte.
        at_once: calls.
    """
    shorter = medium * (1 - share)
    return medium / max(shorter, processors, (shorter + processors) / max(1.0, at_once.value or 1.0))
