"""Directories of a disk tier, and the commands over them as processes; shared by the tests of these commands."""

import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore
from kvtier.testing.patience import PATIENCE_SECONDS
from kvtier.testing.stores import make_key, make_payload

BLOCK = 64 << 10
RECORD_BYTES = 128

HOLDER = """
import sys
from kvtier.abc import StoreContext
from kvtier.namespace import Namespace
from kvtier.stores.slab import SlabStore

SlabStore.open({"path": sys.argv[1], "capacity": 8 << 20}, StoreContext(Namespace({"model": sys.argv[2]}), 65536))
print("held", flush=True)
sys.stdin.read()
"""


def folder_of(slab, model="model"):
    return slab / Namespace({"model": model}).fingerprint.hex()


def make_slab(slab, blocks=10, model="model", days_old=0, **options):
    """Store blocks 0, 1, ... in the slots of their numbers; the slab is not in use afterwards."""
    context = StoreContext(Namespace({"model": model}), block_bytes=BLOCK)
    store = SlabStore.open({"path": str(slab), "capacity": 8 << 20, **options}, context)
    payloads = [memoryview(make_payload(number, BLOCK)) for number in range(blocks)]
    assert all(store.write(range(blocks), [make_key(number) for number in range(blocks)], payloads))
    store.close()
    folder = folder_of(slab, model)
    then = time.time() - 86400 * days_old
    for path in folder.iterdir():
        os.utime(path, (then, then))
    return folder


def flip(folder, slot):
    """Change a byte of a block."""
    with open(folder / "data-00000", "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, slot * BLOCK + 77)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), slot * BLOCK + 77)


def kvtier(*arguments, **options):
    command = [sys.executable, "-m", "kvtier", *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def as_json(*arguments, code=0, **options):
    done = kvtier(*arguments, "--json", **options)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def refused(*arguments, **options):
    """Return the one line on stderr of a command that cannot be done; JSON says the same."""
    done = kvtier(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


@contextlib.contextmanager
def used_by_an_engine(slab, model="model"):
    """Yield the pid of a process that has a slab open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(slab), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder.pid
        finally:
            holder.kill()


def at_a_terminal(*arguments, typed=""):
    """Return (exit code, everything shown) of a command at a terminal of 120 columns, into which `typed` is typed."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "kvtier", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI")}
    environment["TERM"] = "xterm"
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        os.write(main, typed if isinstance(typed, bytes) else typed.encode())
        shown, deadline = b"", time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if not select.select([main], [], [], 1.0)[0]:
                continue
            try:
                shown += os.read(main, 65536)
            except OSError:  # the other side was closed
                break
        code = process.wait()
    os.close(main)
    return code, shown.decode(errors="replace")
