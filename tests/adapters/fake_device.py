"""A device of ordinary memory whose streams run whenever a test lets them, in any order that events allow.

It stands for CUDA where there is none: it checks what is copied, and what waits for what. It cannot show that a driver
takes these calls, nor how fast they are.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtier.adapters.page_copies import PageCopies

DEFAULT = "the current stream"


class FakeEvent:
    """Completes when its stream gets there."""

    def __init__(self, device: "FakeDevice", stream: Any) -> None:
        self.done, self._device, self.stream = False, device, stream

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            self._device.run_some()


@dataclass
class FakeDevice:
    """Queues what it is told.

    Attributes:
        calls: what the worker called, in order, by name with the arguments that matter.
        streams: by stream, what it has yet to do: a function, or an event that it waits for or completes.
    """

    random: np.random.Generator
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    streams: dict[Any, deque[Callable[[], bool]]] = field(default_factory=lambda: {DEFAULT: deque()})
    registered: dict[int, int] = field(default_factory=dict)
    refuses: bool = False

    def register(self, address: int, num_bytes: int) -> None:
        self.registered[address] = num_bytes

    def unregister(self, address: int) -> None:
        assert not any(self.streams.values()), "memory is given back while copies run"
        del self.registered[address]

    def make_stream(self) -> str:
        name = f"stream {len(self.streams) - 1}"
        self.streams[name] = deque()
        return name

    def wait(self, stream: Any, events: Sequence[FakeEvent]) -> None:
        self.calls.append(("wait", stream, len(events)))
        for event in (self.record(DEFAULT), *events):
            self.streams[stream].append(event.query)

    def copy(self, stream: Any, copies: PageCopies, *, to_slots: bool, early: bool) -> None:
        self.calls.append(("copy", stream, len(copies), to_slots, early))
        if self.refuses:
            raise RuntimeError("refused")
        targets, sources = (copies.host, copies.device) if to_slots else (copies.device, copies.host)
        moves = list(zip(targets.tolist(), sources.tolist(), copies.sizes.tolist(), strict=True))
        if early:  # at once, which is as early as a driver may read
            moves = [(target, ctypes.string_at(source, size), size) for target, source, size in moves]

        def step() -> bool:
            """Copy one of the pages: a batch has no order within."""
            ctypes.memmove(*moves.pop(self.random.integers(len(moves))))
            return not moves

        self.streams[stream].append(step)

    def record(self, stream: Any) -> FakeEvent:
        event = FakeEvent(self, stream)

        def complete() -> bool:
            event.done = True
            return True

        self.streams[stream].append(complete)
        return event

    def compute(self, work: Callable[[], None]) -> None:
        """Queue the program's own work on the current stream."""
        self.streams[DEFAULT].append(lambda: (work(), True)[1])

    def run_some(self) -> None:
        """Let a stream that can go on do its next piece of work."""
        streams = [stream for stream, queue in self.streams.items() if queue]
        assert streams, "everything has run, and an event has not completed"
        for index in self.random.permutation(len(streams)):
            queue = self.streams[streams[index]]
            if queue[0]():
                queue.popleft()
                return

    def run_all(self) -> None:
        """Let all streams come to their ends."""
        while any(self.streams.values()):
            self.run_some()


def some_pages() -> tuple[np.ndarray, np.ndarray, PageCopies]:
    """Return memory that stands for a device, host memory, and three pages of both."""
    device, host = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    places, sizes = np.array([3, 40, 70]), np.array([5, 20, 11])
    none = np.empty(0, np.int64)
    return device, host, PageCopies(device.ctypes.data + places, host.ctypes.data + places, sizes, none, none)
