"""A real pool of Mooncake's for tests and for people: a master, and a process that lends memory, on this machine.

Both programs come in the wheel `mooncake-transfer-engine-non-cuda`. Nothing is downloaded, and nothing outlives its
maker.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from valkey_server import free_port

from kvtier.stores.mooncake import lender
from kvtier.stores.mooncake.client import join
from kvtier.stores.mooncake.options import MooncakeOptions
from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

SECONDS_TO_LOSE_A_CLIENT = 2


def program(name: str) -> Path:
    """Return the path of a program in the wheel."""
    spec = find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


class MooncakePool:
    """A master; and, unless `lent_bytes` is 0, memory from a process of Mooncake's own."""

    def __init__(self, lent_bytes: int = 64 << 20, **flags: object) -> None:
        """Args: flags: of the master."""
        self.lent_bytes, self._flags = lent_bytes, flags
        self.port, self.metrics_port = free_port(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-mooncake-"))
        self.master: subprocess.Popen[bytes] | None = None
        self.lender: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where the master listens."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> MooncakePool:
        """Start what does not run, and wait until blocks can be stored."""
        if self.master is None:
            flags = {
                "rpc_address": "127.0.0.1",
                "rpc_port": self.port,
                "metrics_port": self.metrics_port,
                "client_ttl": SECONDS_TO_LOSE_A_CLIENT,
                **self._flags,
            }
            self.master = self._run("mooncake_master", flags)
        wait_for(self._answers, "mooncake_master listens", PATIENCE_SECONDS)
        if self.lender is None and self.lent_bytes:
            port = free_port()
            flags = {
                "master_server_address": self.address,
                "metadata_server": "P2PHANDSHAKE",
                "host": "127.0.0.1",
                "port": port,
                "global_segment_size": self.lent_bytes,
                "protocol": "tcp",
            }
            self.lender = self._run("mooncake_client", flags)
            wait_for(lambda: listens(port), "mooncake_client lends memory", PATIENCE_SECONDS)
        return self

    def _run(self, name: str, flags: dict[str, object]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [str(program(name)), *(f"-{flag}={value}" for flag, value in flags.items())]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)

    def _answers(self) -> bool:
        assert self.master is not None
        assert self.master.poll() is None, (self.folder / "mooncake_master.log").read_text()
        return listens(self.port)

    def kill_master(self) -> None:
        """Kill the master, and with it the index of all blocks."""
        self.master = _kill(self.master)

    def kill_lender(self) -> None:
        """Kill the process that lends memory, and with it the blocks."""
        self.lender = _kill(self.lender)

    def _master_says(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/{path}", timeout=PATIENCE_SECONDS) as reply:
            return reply.read().decode()

    def hosts(self) -> set[str]:
        """Return the hosts whose memory the master gives away."""
        return {_host(segment) for segment in self._master_says("get_all_segments").split()}

    def host_of_blocks(self) -> dict[str, str]:
        """Return, per value, the host that keeps it."""
        hosts = {}
        for name in self._master_says("get_all_keys").split():
            (copy,) = json.loads(self._master_says(f"query_key?key={name}"))["data"]
            hosts[name] = _host(copy["transport_endpoint_"])
        return hosts

    def num_evicted(self) -> int:
        """Return how many values the master has evicted."""
        lines = self._master_says("metrics").splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith("master_evicted_key_count "))
        return int(value)

    def kvtier_lenders(self, host: str = "") -> list[int]:
        """Return the processes of kvtier's that lend memory to this pool; with `host`, those whose option says so."""
        said = json.dumps({"host": host})[1:-1] if host else self.address
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = (folder / "cmdline").read_text(errors="replace")
                if lender.__name__ in command and self.address in command and said in command:
                    found.append(int(folder.name))
        return found

    def close(self) -> None:
        """Kill everything, and remove the logs."""
        for process in self.kvtier_lenders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        wait_for(lambda: not self.kvtier_lenders(), "kvtier's lenders have ended", PATIENCE_SECONDS)
        self.kill_lender()
        self.kill_master()
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def listens(port: int) -> bool:
    """Return whether somebody listens at a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def why_not() -> str:
    """Return why Mooncake cannot be loaded here; "" if it can."""
    if find_spec("mooncake") is None:
        return "mooncake-transfer-engine-non-cuda, the wheel with Mooncake, is not installed"
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        import mooncake.store  # noqa: F401 - whether it loads
    except ImportError as error:
        return f"Mooncake cannot be loaded ({error})"
    return ""


def remedy() -> str:
    """Return the command that helps against `why_not`."""
    if find_spec("mooncake") is None:
        return f"{sys.executable} -m pip install mooncake-transfer-engine-non-cuda"
    return "make system-packages"


class PoolValues:
    """Reads and writes values past the store."""

    def __init__(self, address: str) -> None:
        self.client = join(MooncakeOptions(master=address))
        self._memory = np.zeros(1 << 20, np.uint8)
        assert self.client.register_buffer(self._memory.ctypes.data, self._memory.nbytes) == 0

    def plant(self, name: str, raw: bytes) -> None:
        """Replace a value; an empty one is removed, since Mooncake keeps none."""
        self.client.remove(name, force=True)
        self._memory[: len(raw)] = bytearray(raw)
        if raw:
            assert self.client.put_from(name, self._memory.ctypes.data, len(raw)) == 0

    def peek(self, name: str) -> bytes | None:
        """Return a value; None if there is none."""
        length = self.client.get_into(name, self._memory.ctypes.data, self._memory.nbytes)
        return self._memory[:length].tobytes() if length > 0 else None

    def close(self) -> None:
        """Leave the pool."""
        self.client.close()
