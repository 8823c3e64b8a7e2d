"""LMCache's own server, as a process, with kvtier's tiers below."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from adapters import BLOCK_BYTES, config_of
from valkey_server import free_port

from kvtier.testing.patience import PATIENCE_SECONDS, wait_for

CHUNK_TOKENS = 128
"""Tokens in one of the server's objects, as many as in a block of vLLM's CPU platform."""
ENGINE_PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


class CacheServer:
    """A running `lmcache server`. With a second one over the same directory, wait for the end of the first."""

    def __init__(self, tiers, log: Path, *, port=None, **options):
        """Args:
        port: for engines; None for a free one.
        options: keys of "adapter_params".
        """
        self.port, self._http_port = port or free_port(), free_port()
        self.log_path = log
        self._log = log.open("wb")
        program = Path(sys.executable).with_name("lmcache")
        self.process = subprocess.Popen(
            [
                *(str(program), "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--http-port", str(self._http_port), "--chunk-size", str(CHUNK_TOKENS)),
                *("--supported-transfer-mode", "auto", "--eviction-policy", "LRU"),
                *("--l1-size-gb", "0.125", "--no-l1-use-lazy"),
                *(self._named_memory if options.get("shared_memory") else ()),
                *("--l2-adapter", json.dumps(config_of(tiers, **options))),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"},
        )

    def wait_until_up(self):
        """Wait until the server answers and its tiers are up."""

        def is_up():
            assert self.process.poll() is None, self.log()[-6000:]
            try:
                return {tier["state"] for tier in self.adapter_status()["tiers"].values()} == {"up"}
            except OSError:
                return False

        wait_for(is_up, "LMCache's server")
        return self

    @property
    def _named_memory(self):
        return "--shm-name", f"kvtier_{self.port}", "--l1-align-bytes", str(BLOCK_BYTES)

    def engine_options(self):
        """Options of an `Engine` that uses this server, and has no other cache of prefixes."""
        return {
            "kv_transfer_config": self._transfer_config,
            "environment": {"PYTHONPATH": ENGINE_PATH},
            "enable_prefix_caching": False,
        }

    @property
    def _transfer_config(self):
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "connector_on_cpu",  # beside this file
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self.port},
        }

    def ask(self, path, method="GET", body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http_port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return answer.read()

    def status(self):
        return json.loads(self.ask("/status"))

    def adapter_status(self):
        return self.status()["storage_manager"]["l2_adapters"][0]

    def prefetched(self):
        """Return (objects from L1, objects from L2) of the last prefetch."""
        found = re.findall(r"retained keys \((\d+) L1, (\d+) L2\)", self.log())
        return tuple(map(int, found[-1])) if found else None

    def num_stores(self):
        """Return how many stores of engines have ended in the server's memory."""
        return len(re.findall(r"Stored \d+ tokens", self.log()))

    def log(self):
        return self.log_path.read_text(errors="replace")

    def stop(self):
        """End the server in peace."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_SECONDS)
        self._log.close()

    def __enter__(self):
        return self.wait_until_up()

    def __exit__(self, *_):
        self.stop()
