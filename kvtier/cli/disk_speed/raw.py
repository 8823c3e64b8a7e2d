"""The raw limit of a filesystem: direct I/O in requests of 1 MiB by 4 threads, on one file that was written before.

The limit is measured from huge pages. It is also measured from pages of 4 KiB, which bound direct I/O by their number:
most arenas lie in such pages.

It can be measured with checksums, too: XXH3-128 of every request before it is written or after it is read, in as much
memory as an arena has. No store that verifies its blocks can be faster on the machine.

The measuring process gets a path and a number of bytes. It prepares the file and prints a line. Then it reads commands,
one per line of standard input: "write" or "read", then "summed" and "small" where wanted. Each moves the whole file
once and is answered by a line of JSON, {"seconds", "cpu_seconds"}.
"""

from __future__ import annotations

import contextlib
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
from kvtier.stores.integrity.scratch import private_memory

REQUEST_BYTES = 1 << 20
"""Larger ones were no faster here."""
THREADS = 4
"""More were no faster here."""
_REQUESTS_IN_MEMORY = 256
"""With checksums, requests rotate over so many buffers: 256 MiB is more than the processor's caches hold."""


class RawFile:
    """A file of `num_bytes` bytes, a multiple of `REQUEST_BYTES`. It is written once before it is measured."""

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
        small = mmap.mmap(-1, _REQUESTS_IN_MEMORY * REQUEST_BYTES)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages gives no others
            small.madvise(mmap.MADV_NOHUGEPAGE)
        self._small, self._huge = memoryview(small), private_memory(_REQUESTS_IN_MEMORY * REQUEST_BYTES)
        pattern = os.urandom(REQUEST_BYTES)
        for number in range(_REQUESTS_IN_MEMORY):
            for memory in (self._small, self._huge):
                _request(memory, number)[:] = pattern
        if os.fstat(self._descriptor).st_size < num_bytes:
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.move(write=True)

    def move(self, write: bool, summed: bool = False, small: bool = False) -> dict[str, float]:
        """Write or read the whole file once; return the seconds and CPU seconds that this took.

        Args:
            small: from or into pages of 4 KiB, not huge pages.
            summed: compute checksums, and rotate over all buffers. Else each thread has one buffer, which stays in the
                processor's cache.
        """
        numbers = itertools.count()
        call = os.pwritev if write else os.preadv
        memory = self._small if small else self._huge

        def work(thread: int) -> None:
            while (number := next(numbers)) < self._requests:
                buffer = _request(memory, number if summed else thread)
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


def _request(memory: memoryview, number: int) -> memoryview:
    """Return the memory of one request; the requests rotate."""
    start = number % _REQUESTS_IN_MEMORY * REQUEST_BYTES
    return memory[start : start + REQUEST_BYTES]


class RawLimit:
    """A process that measures the raw limit. The tier has its own process, too, so both are measured alike."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Start the process and wait until its file is prepared.

        Raises:
            KVTierError: the process cannot use the file.
        """
        self.num_bytes = num_bytes
        self._process = subprocess.Popen(
            command(__name__, str(path), str(num_bytes)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.direct = bool(self._answer()["direct"])

    def begin(self, write: bool, summed: bool = False, small: bool = False) -> None:
        """Start one pass over the file."""
        if self._process.stdin is None:
            raise KVTierError("the raw limit's process has no input")
        words = ["write" if write else "read", *(["summed"] if summed else []), *(["small"] if small else [])]
        self._process.stdin.write((" ".join(words) + "\n").encode())
        self._process.stdin.flush()

    def ended(self) -> bool:
        """Return whether the pass has ended, without waiting."""
        return self._process.stdout is not None and bool(select([self._process.stdout], [], [], 0)[0])

    def take(self) -> dict[str, float]:
        """Return the result of the pass, as `RawFile.move` returns it; wait for it if needed."""
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
    """Run in the measuring process."""
    file = RawFile(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({"direct": file.direct}), flush=True)
    for line in sys.stdin:
        print(json.dumps(file.move("write" in line, summed="summed" in line, small="small" in line)), flush=True)


if __name__ == "__main__":
    main()
