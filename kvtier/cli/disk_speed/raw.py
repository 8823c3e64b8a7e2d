"""The raw limit of a filesystem: direct I/O in requests of 1 MiB, 4 threads, one file that was written before.

Beside it, the same with checksums: every request's bytes summed by XXH3-128 before they are written or after they are
read, in as much memory as an arena has. No store that knows its bytes can be quicker on the machine.

Its process, given a path and a number of bytes, prepares the file, prints a line, then obeys lines on its standard
input: "write" and "read", "write summed" and "read summed" move the whole file once and answer with a line of JSON,
{"seconds", "cpu_seconds"}.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from select import select
from typing import Any

import xxhash

from kvtier.cli.disk_speed.processes import command
from kvtier.errors import KVTierError

REQUEST_BYTES = 1 << 20
"""As the slab's largest vectored calls."""
THREADS = 4
"""As a disk tier's default."""
_REQUESTS_IN_MEMORY = 256
"""Requests whose bytes have places of their own, when they are summed: more than any cache holds."""


class RawFile:
    """A file of `num_bytes` bytes (a multiple of `REQUEST_BYTES`), every byte written once before it is measured."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._requests = num_bytes // REQUEST_BYTES
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
            self.direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o600)
            self.direct = False
        self._memory = memoryview(mmap.mmap(-1, _REQUESTS_IN_MEMORY * REQUEST_BYTES))
        pattern = os.urandom(REQUEST_BYTES)
        for number in range(_REQUESTS_IN_MEMORY):
            self._buffer(number)[:] = pattern
        if os.fstat(self._descriptor).st_size < num_bytes:
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.move(write=True)

    def move(self, write: bool, summed: bool = False) -> dict[str, float]:
        """Write or read the whole file once; return the seconds and the CPU seconds that took.

        Args: summed: with checksums, and not from one buffer per thread, which a cache holds.
        """
        numbers = itertools.count()
        call = os.pwritev if write else os.preadv

        def work(thread: int) -> None:
            while (number := next(numbers)) < self._requests:
                buffer = self._buffer(number if summed else thread)
                if summed and write:
                    xxhash.xxh3_128_digest(buffer)
                if call(self._descriptor, [buffer], number * REQUEST_BYTES) != REQUEST_BYTES:
                    raise KVTierError("a request of the raw limit was cut short")
                if summed and not write:
                    xxhash.xxh3_128_digest(buffer)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
        cpu, start = time.process_time(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    def _buffer(self, number: int) -> memoryview:
        start = number % _REQUESTS_IN_MEMORY * REQUEST_BYTES
        return self._memory[start : start + REQUEST_BYTES]


class RawLimit:
    """A process that measures the raw limit, as another one moves the tier's bytes."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Start it and wait until the file is prepared.

        Raises:
            KVTierError: it cannot use the file.
        """
        self.num_bytes = num_bytes
        self._process = subprocess.Popen(
            command(__name__, str(path), str(num_bytes)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.direct = bool(self._answer()["direct"])

    def begin(self, write: bool, summed: bool) -> None:
        """Start one pass over the file."""
        if self._process.stdin is None:
            raise KVTierError("the raw limit's process has no input")
        self._process.stdin.write((b"write" if write else b"read") + (b" summed\n" if summed else b"\n"))
        self._process.stdin.flush()

    def ended(self) -> bool:
        """Return whether the pass has ended, at once."""
        return self._process.stdout is not None and bool(select([self._process.stdout], [], [], 0)[0])

    def take(self) -> dict[str, float]:
        """Return what `RawFile.move` measured."""
        return {name: float(value) for name, value in self._answer().items()}

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = b"" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise KVTierError("the raw limit's process failed")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """Be the process."""
    file = RawFile(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"direct": file.direct}), flush=True)
    for line in sys.stdin:
        print(json.dumps(file.move(write="write" in line, summed="summed" in line)), flush=True)


if __name__ == "__main__":
    main()
