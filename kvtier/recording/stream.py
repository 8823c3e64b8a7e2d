"""The engine's end of a recording: a pipe to the process that hashes and writes (`writer`).

A recording that cannot go on ends, and the engine never notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

from kvtier import forks
from kvtier.clock import Clock
from kvtier.descriptors import Descriptor
from kvtier.keys import OffloadKey
from kvtier.log import logger
from kvtier.recording.format import FRAME, LENGTH

DEFAULT_LIMIT_BYTES = 1 << 30
_PIPE_BYTES = 1 << 20
"""The most that Linux lets an ordinary user ask for (fs.pipe-max-size)."""
_FLUSH_BYTES = 32 << 10
_FLUSH_SECONDS = 0.25
"""A write costs microseconds whatever its size: with less than that, and sooner than this, it is not worth one."""
_MAX_BUFFERED_BYTES = 64 << 20
"""Of a writer that does not keep up, what is kept in the engine's memory."""
_CLOSE_SECONDS = 2.0
"""Longest that an exit waits for the last records."""


class Recorder:
    """Sends frames to the writing process; drops everything from the first thing that goes wrong on."""

    def __init__(self, path: str, header: Mapping[str, Any], clock: Clock, limit: int = DEFAULT_LIMIT_BYTES) -> None:
        """Args: path: of a new file; header: JSON values; limit: bytes on disk after which the recording ends."""
        self._path, self._limit, self._clock = path, limit, clock
        text = json.dumps(dict(header)).encode()
        self._buffer = bytearray(LENGTH.pack(len(text)) + text)
        self._writer: subprocess.Popen[bytes] | None = None
        self._pipe: Descriptor | None = None
        self._started = clock()
        self._flushed = 0.0
        self.active = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, record nothing; the parent's recording goes on."""
        self._end()
        if self._writer is not None:
            self._writer.returncode = 0  # it is not this process's child: nothing can be learnt of its end
            self._writer = None

    def start(self) -> None:
        """Start the writing process, without waiting for it."""
        command = [sys.executable, "-m", "kvtier.recording.writer", os.path.abspath(self._path), str(self._limit)]
        theirs = -1
        try:
            theirs, ours = os.pipe()
            self._pipe = Descriptor(ours)
            self._writer = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._give_up(f"{error}")
            return
        finally:
            if theirs >= 0:
                os.close(theirs)
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):  # a user's pipes have a limit together: it stays a short one
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.active = True

    def note(self, kind: bytes, request: int, extra: bytes = b"", keys: Collection[OffloadKey] = ()) -> None:
        """Add a record; keys all have one length."""
        if self.active:
            body = b"".join(keys)
            count = len(keys)
            size = len(body) // count if count else 0
            self._buffer += FRAME.pack(kind, request, self._clock() - self._started, len(extra), count, size)
            self._buffer += extra
            self._buffer += body

    def flush(self) -> None:
        """Hand over what the pipe takes, if there is much of it or a while has passed; never waits."""
        if not self.active or not self._buffer:
            return
        now = self._clock()
        if len(self._buffer) < _FLUSH_BYTES and 0 <= now - self._flushed < _FLUSH_SECONDS:
            return
        self._flushed = now
        if self._pipe is None or not self._pipe.is_ours():
            self._give_up("its pipe was closed")
            return
        try:
            sent = os.write(self._pipe.number, self._buffer)
            del self._buffer[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            ended = isinstance(error, BrokenPipeError)
            self._give_up("its limit is reached, or it cannot be written" if ended else str(error))
        if len(self._buffer) > _MAX_BUFFERED_BYTES:
            self._give_up("the process that writes it does not keep up")

    def close(self) -> None:
        """Hand over what the pipe takes, and wait for the writing process, two seconds in all; idempotent.

        A later one, on a machine so busy that it has not even started, ends by itself: it has all that it needs.
        """
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self.active and self._buffer and (left := deadline - time.monotonic()) > 0:
            if self._pipe is not None and self._pipe.is_ours():
                select.select([], [self._pipe.number], [], left)
            self._flushed = -1e9
            self.flush()
        self._end()
        if self._writer is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._writer.wait(max(0.1, deadline - time.monotonic()))

    def _give_up(self, reason: str) -> None:
        logger.warning("the recording %s ends here: %s", self._path, reason)
        self._end()

    def _end(self) -> None:
        self.active = False
        self._buffer = bytearray()  # the old one cannot shrink in a child that was forked while it was being written
        if self._pipe is not None:
            self._pipe.close()
