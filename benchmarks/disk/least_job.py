"""The raw limit of a job on the scheduler's thread: its packet, the answer, and the change of an index.

The packet goes to a process that waits for it, like a tier's I/O process. The index is the least that a cache with
exact capacity and an order of eviction needs: a dict and an `OrderedDict`, without pins, states and checks.
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
"""Bytes of a job's packet: its head, and a key and two slots per block; and of the answer."""


class LeastJob:
    """A process that only answers packets, and an index that is always full."""

    def __init__(self, job_blocks: int, held: Sequence[OffloadKey], others: Sequence[OffloadKey]) -> None:
        """Start the process.

        Args:
            job_blocks: blocks per job.
            held: keys in the index at first.
            others: keys that replace them, in turn with `held`.
        """
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
        """Seconds of this thread per job, without waiting."""

    def run(self) -> None:
        """Receive the last packet's answer, which has usually arrived meanwhile, and begin a job."""
        start = time.perf_counter()
        if self._waits:
            try:
                self._socket.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # no answer yet, so this call counts no job
        self._replace(list(islice(self._coming, self._job_blocks)))
        self._socket.send(self._packet)
        if self._waits:
            self.seconds.append(time.perf_counter() - start)
        self._waits = True

    def _replace(self, keys: Sequence[OffloadKey]) -> None:
        """Replace the oldest keys of the index by `keys`."""
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
    """Answer packets until the other end closes."""
    answers = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError):  # the other end may close before it reads the last answer
        while answers.recv(1 << 16):
            answers.send(bytes(ANSWER_BYTES))


if __name__ == "__main__":
    main()
