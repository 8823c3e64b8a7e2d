"""The raw limit of a job's messages: a packet to a process that waits for it, and one back."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from kvtier.cli.disk_speed.processes import command

HEAD_BYTES, BYTES_A_BLOCK, ANSWER_BYTES = 24, 44, 60
"""Of a job's packet: its head, a key and two slots for each block; of the result's."""


class Echo:
    """A process that answers packets and does nothing else."""

    def __init__(self, job_blocks: int) -> None:
        """Args: job_blocks: whose packet is as long as those that are sent here."""
        self._packet = bytes(min(HEAD_BYTES + BYTES_A_BLOCK * job_blocks, 60_000))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(command(__name__, str(theirs.fileno())), pass_fds=(theirs.fileno(),))
        theirs.close()
        self._waits = False
        self.seconds: list[float] = []
        """What this thread spent on each packet and its answer, waiting excluded."""

    def exchange(self) -> None:
        """Take the answer to the packet before, which came while this thread did something else, and send another."""
        start = time.perf_counter()
        if self._waits:
            try:
                self._socket.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # not answered yet: no figure
        self._socket.send(self._packet)
        if self._waits:
            self.seconds.append(time.perf_counter() - start)
        self._waits = True

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
