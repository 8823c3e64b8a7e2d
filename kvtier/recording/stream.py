"""The engine's end of a recording: it sends records through a pipe to the process that hashes and writes them.

If a recording cannot continue, it ends; the engine is not affected. See `writer` for that process.
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
"""Largest pipe that Linux allows to ordinary users by default (fs.pipe-max-size)."""
_FLUSH_BYTES = 32 << 10
_FLUSH_SECONDS = 0.25
"""The buffer is written when it has `_FLUSH_BYTES`, or this long after the last write. A system call takes microseconds
even for few bytes, so not every record makes one."""
_MAX_BUFFERED_BYTES = 64 << 20
"""Most bytes in the engine's memory when the writing process is too slow; then the recording ends."""
_CLOSE_SECONDS = 2.0
"""Longest wait for the last records at shutdown."""


class Recorder:
    """Sends frames to the writing process. After the first failure it drops everything."""

    def __init__(self, path: str, header: Mapping[str, Any], clock: Clock, limit: int = DEFAULT_LIMIT_BYTES) -> None:
        """Args: path: of the new file; header: JSON values; limit: size of the file at which the recording ends."""
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
            self._writer.returncode = 0  # it is no child of this process, which cannot wait for it
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
        with contextlib.suppress(OSError):  # the kernel limits all pipes of a user together; a short pipe works, too
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.active = True

    def note(self, kind: bytes, request: int, extra: bytes = b"", keys: Collection[OffloadKey] = ()) -> None:
        """Add a record. All keys must have one length."""
        if self.active:
            body = b"".join(keys)
            count = len(keys)
            size = len(body) // count if count else 0
            self._buffer += FRAME.pack(kind, request, self._clock() - self._started, len(extra), count, size)
            self._buffer += extra
            self._buffer += body

    def flush(self) -> None:
        """Write as much as the pipe accepts, if there are enough bytes or enough time has passed. Never blocks."""
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
            self._give_up("its size limit is reached, or it cannot be written" if ended else str(error))
        if len(self._buffer) > _MAX_BUFFERED_BYTES:
            self._give_up("the process that writes it is too slow")

    def close(self) -> None:
        """Send the rest and wait for the writing process, two seconds in total. A second call does nothing.

        If the process needs longer, on a busy machine, it ends by itself after it has written what it was sent.
        """
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self.active and self._buffer and (left := deadline - time.monotonic()) > 0:
            if self._pipe is not None and self._pipe.is_ours():
                poller = select.poll()  # select(2) refuses descriptors above 1,023, which a busy engine has
                poller.register(self._pipe.number, select.POLLOUT)
                poller.poll(1000 * left)
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
        # Not cleared: in a child that was forked during os.write, the old buffer is exported and cannot be resized.
        self._buffer = bytearray()
        if self._pipe is not None:
            self._pipe.close()
