"""The raw limit of a job on the scheduler's thread: its packet, the answer, and its keys in an index and out of it.

The packet goes to a process that waits for it, as a tier's does. The index is what any cache with exact capacity and an
order of eviction needs: a dict, and an `OrderedDict`; with no pins, no states, no checks.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import cycle, islice

from kvtier.keys import OffloadKey

HEAD_BYTES, BYTES_A_BLOCK, ANSWER_BYTES = 24, 44, 60
"""Of a job's packet: its head, a key and two slots for each block; of the result's."""


class LeastJob:
    """A process that answers packets and does nothing else, and an index that is always full."""

    def __init__(self, job_blocks: int, held: Sequence[OffloadKey], others: Sequence[OffloadKey]) -> None:
        """Args: job_blocks: of each job; held: keys that the index holds at first; others: those that come next."""
        self._job_blocks = job_blocks
        self._slot_of = {key: slot for slot, key in enumerate(held)}
        self._queue = OrderedDict.fromkeys(held)
        self._coming = cycle((*others, *held))
        self._packet = bytes(min(HEAD_BYTES + BYTES_A_BLOCK * job_blocks, 60_000))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=(theirs.fileno(),))
        theirs.close()
        self._waits = False
        self.seconds: list[float] = []
        """What this thread spent on each job, waiting excluded."""

    def run(self) -> None:
        """Take the answer to the packet before, which came while this thread did something else, and begin a job."""
        start = time.perf_counter()
        if self._waits:
            try:
                self._socket.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # not answered yet: no figure
        self._replace(list(islice(self._coming, self._job_blocks)))
        self._socket.send(self._packet)
        if self._waits:
            self.seconds.append(time.perf_counter() - start)
        self._waits = True

    def _replace(self, keys: Sequence[OffloadKey]) -> None:
        """Let the oldest keys give way to `keys`."""
        queue, slot_of = self._queue, self._slot_of
        victims = list(islice(queue, len(keys)))
        slots = [slot_of.pop(key) for key in victims]
        for key in victims:
            del queue[key]
        slot_of.update(zip(keys, slots, strict=True))
        for key in keys:
            queue[key] = None

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait()


def main() -> None:
    """Be the process."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError):  # the other end closes with an answer unread
        while answers.recv(1 << 16):
            answers.send(bytes(ANSWER_BYTES))


if __name__ == "__main__":
    main()
