"""Runs something that is compared with kvtier in a process and an environment of its own: this side of it.

The process runs a script that calls `peer_worker.serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvtier.errors import KVTierError

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvtier"
PEERS_PYTHON = ENVIRONMENTS / "peers" / "bin" / "python"
_END_SECONDS = 30.0
_LAST_WORDS = 2000


class PeerProcess:
    """A peer's process; it waits for commands, and moves nothing meanwhile.

    Attributes:
        ready: its answer to the order; "missing" in it is the package that it lacks.
    """

    def __init__(self, name: str, python: Path, script: Path, order: dict[str, Any]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # Ctrl-C reaches only the benchmark, which then ends this process
        )
        self.ready = self._ask(json.dumps(order))

    def move(self, load: bool, round_number: int) -> dict[str, float]:
        """Store or load a round's blocks; return the figures.

        Raises:
            KVTierError: the process has ended, because a job failed or a byte differed.
        """
        return self._ask(f"{'load' if load else 'store'} {round_number}")

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise KVTierError("a peer's process has no pipes")
        with contextlib.suppress(BrokenPipeError):  # it has ended: its log says why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            print(self._log.read()[-_LAST_WORDS:], file=sys.stderr)
            raise KVTierError(f"{self.name} failed; its last words are above")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """Let the process end; kill it if it does not."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=_END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._log.close()
