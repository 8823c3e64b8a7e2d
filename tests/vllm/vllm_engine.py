"""The test's end of an engine process."""

import json
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

from kvtier.testing.patience import PATIENCE_SECONDS, TEST_SECONDS, wait_for

VOCABULARY = 512

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "PYTHONHASHSEED": "0",
}


def prompt(seed: int, length: int, prefix=()) -> list[int]:
    """Return random token ids, the same for the same seed."""
    tokens = random.Random(seed)
    return [*prefix, *(tokens.randrange(3, VOCABULARY) for _ in range(length - len(prefix)))]


CONNECTORS = {
    "offloading": {"kv_connector": "OffloadingConnector"},
    "kvtier": {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm.connector",
        "kv_load_failure_policy": "recompute",
    },
    "kvtier, policy fail": {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.adapters.vllm.connector",
    },
}


def transfer_config(connector=None, **keys):
    """Return vLLM's option for kvtier, with `keys` in its configuration.

    The connector is vLLM's own, unless a test names one, or `KVTIER_TEST_CONNECTOR` names one for all tests.

    A tiny model computes sooner than a disk on a busy machine reads: what is tested with it is told to be slow.
    """
    extra = {"spec_name": "KVTierOffloadingSpec", "cpu_bytes_to_use": "32MiB", "prefill_rate": SLOW} | keys
    chosen = CONNECTORS[connector or os.environ.get("KVTIER_TEST_CONNECTOR", "offloading")]
    return {**chosen, "kv_role": "kv_both", "kv_connector_extra_config": extra}


SLOW = 1.0
"""Tokens per second: so slow that it pays to wait for any tier."""

TIERS_OF_TESTS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
"""Environment in which an engine and its processes find the tiers and workers that lie beside the tests."""


def environment_of(*changes):
    """Return the environment of an engine's process; None takes a variable out."""
    merged = os.environ | ENVIRONMENT
    for change in changes:
        merged |= change
    return {name: value for name, value in merged.items() if value is not None}


class Engine:
    """A vLLM engine in a process of its own."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        processes=False,
        environment=None,
        kvtier=None,
        connector=None,
        python=sys.executable,
        **options,
    ):
        """Args:
        connector: as for `transfer_config`.
        python: of the environment whose vLLM is wanted.
        processes: vLLM runs its core and its workers in processes of their own.
        environment: variables to set; None takes one out.
        kvtier: keys of kvtier's configuration; None runs without a connector.
        """
        self.log_path = log
        reading, writing = os.pipe()
        self._log = log.open("wb")
        kv = {} if kvtier is None else {"kv_transfer_config": transfer_config(connector, **kvtier)}
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("vllm_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
            env=environment_of(
                {"KVTIER_TEST_REPLIES": str(writing), "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))},
                environment or {},
            ),
        )
        os.close(writing)
        self._replies = os.fdopen(reading)
        extra = kv.get("kv_transfer_config", {}).get("kv_connector_extra_config", {})
        keeps_rate = extra.get("prefill_rate") == SLOW  # it would measure that after the first prompt
        self._send([{"model": str(model)} | kv | options, {"keeps_rate": keeps_rate}])
        self._started = False

    def wait_until_started(self):
        if not self._started:
            self._receive(TEST_SECONDS)
            self._started = True
        return self

    def ask(self, command, **arguments):
        self.wait_until_started()
        self._send([command, arguments])
        return self._receive(TEST_SECONDS)["result"]

    def generate(self, *prompts, **arguments) -> list[list[int]]:
        return self.ask("generate", prompts=prompts, **arguments)["tokens"]

    def metrics(self):
        return self.ask("metrics")

    def external_hits(self) -> int:
        return int(self.metrics().get("external_prefix_cache_hits", 0))

    def reset(self, **arguments) -> bool:
        return self.ask("reset", **arguments)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Return the engine's process and everything below it."""
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            left += map(int, children)
        return found

    def stop(self, timeout=PATIENCE_SECONDS):
        """End the engine in peace."""
        try:
            self.process.stdin.close()
            self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self):
        """Kill whatever is left of it."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(PATIENCE_SECONDS)
        self._log.close()

    def _send(self, message):
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def _receive(self, timeout):
        readable, _, _ = select.select([self._replies], [], [], timeout)
        line = self._replies.readline() if readable else ""
        if not line:
            raise RuntimeError(f"no reply from the engine:\n{self.log()[-6000:]}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def wait_until_up(engine, tier="disk"):
    """Wait until a tier takes blocks; a tier that outlives the engine opens when the weights have been read."""
    wait_for(lambda: engine.generate(prompt(1, 20)) and engine.metrics().get(f"kvtier_tier_up.{tier}"), f"{tier} up")


def written(engine, tier="disk") -> int:
    """Return how many blocks a tier has taken; an idle engine does a step for it."""
    engine.generate(prompt(1, 20))
    return int(engine.metrics().get(f"kvtier_written_blocks.{tier}", 0))
